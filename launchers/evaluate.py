"""Evaluate an encoder: k-NN, linear probes, dense measures. Also under torchrun and srun.

python launchers/evaluate.py knn --checkpoint RUN_DIR --train PATH --test PATH
python launchers/evaluate.py linear --timm vit_small_patch14_dinov2.lvd142m --train PATH --split 0.8
python launchers/evaluate.py segmentation --checkpoint RUN_DIR --train VOC2012
"""

from cmtmae_scale.commands.evaluate import evaluate

if __name__ == "__main__":
    raise SystemExit(evaluate())

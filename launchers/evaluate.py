"""Evaluate an encoder on labelled images: k-NN, linear probes. Also under torchrun and srun.

python launchers/evaluate.py knn --checkpoint RUN_DIR --train PATH --test PATH
python launchers/evaluate.py linear --timm vit_small_patch14_dinov2.lvd142m --train PATH --split 0.8
"""

from cmtmae_scale.commands.evaluate import evaluate

if __name__ == "__main__":
    raise SystemExit(evaluate())

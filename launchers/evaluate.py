"""What are weights worth? k-NN, linear probes or fine-tuning on labelled images.

Also under torchrun and srun; fine-tuning also under deepspeed.

python launchers/evaluate.py knn --checkpoint RUN_DIR --train PATH --test PATH
python launchers/evaluate.py linear --timm vit_small_patch14_dinov2.lvd142m --train PATH --split 0.8
python launchers/evaluate.py finetune --config configs/finetune_base.yaml --checkpoint RUN_DIR
"""

from cmtmae_scale.commands.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())

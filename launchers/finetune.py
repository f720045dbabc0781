"""Fine-tune an encoder on labelled images: plain python, torchrun, srun, or deepspeed's launcher.

python launchers/finetune.py --config configs/finetune_base.yaml --checkpoint RUN_DIR
"""

from cmtmae_scale.commands.finetune import finetune

if __name__ == "__main__":
    raise SystemExit(finetune())

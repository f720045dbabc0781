"""Pre-train a student: plain python, torchrun, srun, or deepspeed's launcher.

python launchers/pretrain.py --config configs/demo.yaml [--dry-run] [key=value ...]
"""

from cmtmae_scale.commands.pretrain import pretrain

if __name__ == "__main__":
    raise SystemExit(pretrain())

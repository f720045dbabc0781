"""Plan a run on N GPUs: memory, time, cost and traffic, counted or modelled; needs no GPU.

python launchers/plan.py --config configs/vit_huge.yaml --gpus 64 [--device h200] [--price X]
"""

from cmtmae_scale.commands.plan import plan_run

if __name__ == "__main__":
    raise SystemExit(plan_run())

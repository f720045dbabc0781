"""Measure the training step, or the decoders.

python launchers/benchmark.py train --config configs/vit_large.yaml [--sweep KEY=A,B]
python launchers/benchmark.py train --config configs/mae_base.yaml --against hf_mae
python launchers/benchmark.py data datasets/imagenet-1k/train
"""

from cmtmae_scale.benchmark.command import main

if __name__ == "__main__":
    raise SystemExit(main())

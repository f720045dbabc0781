"""Measure the training step, the decoders, a teacher cache, the start-up of commands, or all.

python launchers/benchmark.py suite --minutes 12 --data TARS
python launchers/benchmark.py smoke TARS
python launchers/benchmark.py model --config configs/vit_large.yaml
python launchers/benchmark.py train --config configs/vit_large.yaml [--sweep KEY=A,B]
python launchers/benchmark.py train --config configs/mae_base.yaml --against hf_mae
python launchers/benchmark.py data datasets/imagenet-1k/train
python launchers/benchmark.py cache [--config configs/demo.yaml]
python launchers/benchmark.py startup
"""

from cmtmae_scale.commands.benchmark import run_benchmark

if __name__ == "__main__":
    raise SystemExit(run_benchmark())

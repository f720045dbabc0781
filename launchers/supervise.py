"""Run a launcher in a container or a batch script: pass signals on, return the run's exit code.

python launchers/supervise.py [--grace SECONDS] -- torchrun ... launchers/pretrain.py --config ...
"""

from cmtmae_scale.commands.supervise import supervise

if __name__ == "__main__":
    raise SystemExit(supervise())

"""Decode every image of a data set, report its faults, and pack it as shuffled tars.

python launchers/check_data.py datasets/imagenet-1k/train [--sheet FILE] [--report FILE]
python launchers/check_data.py datasets/imagenet-1k/train --pack datasets/imagenet-1k-tars
"""

from cmtmae_scale.commands.check_data import check_data

if __name__ == "__main__":
    raise SystemExit(check_data())

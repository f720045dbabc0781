"""Compute a teacher's attention maps and features once, or verify a cache of them.

python launchers/precompute_teacher.py --config RECIPE [--verify | --repair | --plan]
python launchers/precompute_teacher.py --follow RUN_DIR
"""

from cmtmae_scale.commands.precompute import precompute_teacher

if __name__ == "__main__":
    raise SystemExit(precompute_teacher())

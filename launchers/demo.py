"""Prepare images and a teacher, train a small student, show the results.

python launchers/demo.py [--steps N] [--fresh] [key=value ...]
"""

from cmtmae_scale.commands.demo import run_demo

if __name__ == "__main__":
    raise SystemExit(run_demo())

"""Prepare photographs and a teacher, train a small student, show what it does.

python launchers/demo.py [--steps N] [--fresh] [key=value ...]
"""

from pathlib import Path

from cmtmae_scale.commands.demo import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).resolve().parents[1]))

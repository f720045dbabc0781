"""Run the missing jobs of a table of runs (method x setting x seed), write table and figure.

python launchers/study.py configs/studies/smoke.yaml [--minutes M] [--jobs N] [--rows NAME ...]
python launchers/study.py configs/studies/first.yaml --dry-run
python launchers/study.py preflight configs/tiny_imagenet.yaml [--steps N] [--candidate "key=value"]
"""

from cmtmae_scale.commands.study import run_study

if __name__ == "__main__":
    raise SystemExit(run_study())

"""Write an encoder of a run for timm.

python launchers/export.py encoder --checkpoint RUN_DIR [--weights momentum] [--output FILE]
"""

from cmtmae_scale.export import main

if __name__ == "__main__":
    raise SystemExit(main())

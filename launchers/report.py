"""What runs did, as one page that needs no network: settings, curves, pictures, time, accuracy.

python launchers/report.py RUN_DIR [RUN_DIR ...] [--out FILE]
"""

from cmtmae_scale.commands.report import main

if __name__ == "__main__":
    raise SystemExit(main())

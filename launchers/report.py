"""Write one page about runs, readable offline: settings, curves, figures, time, accuracy.

python launchers/report.py RUN_DIR [RUN_DIR ...] [--out FILE]
"""

from cmtmae_scale.commands.report import write_report

if __name__ == "__main__":
    raise SystemExit(write_report())

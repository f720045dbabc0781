"""Compute a teacher's maps and features once, or check what was computed."""

import sys

from cmtmae_scale.precompute.command import main

if __name__ == "__main__":
    sys.exit(main())

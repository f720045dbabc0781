"""Compute a teacher's maps and features once, or check what was computed."""

import sys

from cmtmae_scale.commands.precompute import main

if __name__ == "__main__":
    sys.exit(main())

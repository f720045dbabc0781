"""Compute a teacher's attention and features once, or verify what was computed."""

import sys

from cmtmae_scale.commands.precompute import precompute_teacher

if __name__ == "__main__":
    sys.exit(precompute_teacher())

"""Logging: rank 0 from INFO on, other ranks from WARNING on with their rank."""

import logging
import sys


def set_up_logging(rank: int, world_size: int) -> None:
    """Send the packages' log records to standard error in one format."""
    mark = f"[rank {rank}] " if world_size > 1 and rank else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s {mark}%(message)s", "%H:%M:%S")
    )
    for name in ("cmtmae_scale", "dataloading"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)

"""Log lines: rank 0 at INFO, the others from WARNING with their rank."""

import logging
import sys


def set_up_logging(rank: int, world_size: int) -> None:
    """Send the packages' records to standard error, one format for all."""
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

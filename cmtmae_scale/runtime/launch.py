"""Who am I: rank and device, from torchrun, deepspeed, srun, a Kubernetes job, or alone."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from cmtmae_scale.errors import ConfigError


class World(NamedTuple):
    """Place of this process among all."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    meeting: str = "env://"
    """Where the ranks meet, as ``torch.distributed`` names it."""


def find_world(environment: Mapping[str, str] = os.environ) -> World:
    """Read the place from the environment.

    A launcher's variables come first, then those of an srun step, then those of a Kubernetes
    Indexed Job, whose pods are on their own unless WORLD_SIZE and MASTER_ADDR are given.

    Raises:
        ConfigError: if the variables are incomplete or contradict each other.
    """
    if "RANK" in environment:
        world = launched(environment)
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        world = srun_task(environment)
    elif "JOB_COMPLETION_INDEX" in environment and {"WORLD_SIZE", "MASTER_ADDR"} & {*environment}:
        world = pod(environment)
    else:
        return World(0, 1, 0, 1, "alone")
    inside = 0 <= world.local_rank < world.local_world_size <= world.world_size
    if not inside or not 0 <= world.rank < world.world_size:
        raise ConfigError(f"the launcher's variables contradict each other: {world}")
    return world


def launched(environment: Mapping[str, str]) -> World:
    """A process of torchrun, of the deepspeed command, or of whoever sets the same variables."""
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "environment"
    local_size = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE"))
    if "LOCAL_SIZE" in environment and "LOCAL_WORLD_SIZE" not in environment:
        launcher = "deepspeed"
    try:
        return World(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            int(environment["LOCAL_RANK"]),
            int(local_size or ""),
            launcher,
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"RANK={environment['RANK']} is set, but WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE is "
            "absent or no number; start with torchrun or unset RANK"
        ) from error


def srun_task(environment: Mapping[str, str]) -> World:
    """A task of ``srun python``; the ranks meet on the step's first node.

    The port follows from the numbers of job and step, unless MASTER_PORT is set; the first node may
    be given as MASTER_ADDR.
    """
    try:
        node = int(environment["SLURM_NODEID"])
        tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        number = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
        address = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
        port = environment.get("MASTER_PORT") or str(20000 + number % 20000)
        return World(
            int(environment["SLURM_PROCID"]),
            int(environment["SLURM_STEP_NUM_TASKS"]),
            int(environment["SLURM_LOCALID"]),
            tasks[node],
            "srun",
            f"tcp://{address}:{port}",
        )
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"SLURM's variables of this step are incomplete ({error}); start with srun, or with "
            "torchrun within it"
        ) from error


def pod(environment: Mapping[str, str]) -> World:
    """A pod of an Indexed Job that runs one process; the number of pods must be said in its spec.

    MASTER_ADDR is the first pod's name in the job's headless service, as ``NAME-0.SERVICE``.
    """
    try:
        return World(
            int(environment["JOB_COMPLETION_INDEX"]),
            int(environment["WORLD_SIZE"]),
            0,
            1,
            "kubernetes",
            f"tcp://{environment['MASTER_ADDR']}:{environment.get('MASTER_PORT', '29500')}",
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"JOB_COMPLETION_INDEX={environment['JOB_COMPLETION_INDEX']} is set, but {error}: give "
            "WORLD_SIZE (the job's completions) and MASTER_ADDR in the pod's env, or start with "
            "torchrun"
        ) from error


def tasks_per_node(text: str) -> list[int]:
    """Read SLURM's short form: ``4(x2),3`` is ``[4, 4, 3]``."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def first_host(text: str) -> str:
    """The first name of SLURM's short form: ``gpu[007-012,020],big1`` gives ``gpu007``."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", text)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST={text!r}")
    return found[1] + (found[2] or "")

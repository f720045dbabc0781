"""Export of an encoder as a folder of ``torch.distributed.checkpoint``.

Programs on FSDP2, such as torchtitan, load the folder into shards of any layout.
"""

from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from cmtmae_scale.checkpoint.shards import ENCODERS
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.export.encoder import Exported, timm_call
from cmtmae_scale.export.origin import Weights, open_origin
from cmtmae_scale.export.place import default_output, publish
from cmtmae_scale.teachers.dcp import read_dcp, without_group


def export_dcp(place: Path, output: Path | None, weights: Weights) -> Exported:
    """Write an encoder under timm's names in float32, read it back, and compare every bit.

    The tensors have no prefix, as torchtitan saves a model's. Moments of the optimizer, decoder and
    progress are not exported: other programs train another model with another optimizer.

    Args:
        place: a checkpoint's folder, or a run's for its newest intact checkpoint.
        output: folder to write; ``None``: see ``default_output``.
        weights: student or momentum encoder.

    Raises:
        CheckpointError: no checkpoint, a broken one, one without these weights, or a folder that
            reads back differently.
        ConfigError: an output that exists or cannot be written.
    """
    origin = open_origin(place, weights)
    output = output or default_output(origin, "dcp")
    tensors = origin.tensors(ENCODERS[weights])
    with publish(output) as draft:
        with without_group():
            save(tensors, storage_writer=FileSystemWriter(draft), no_dist=True)
        found = read_dcp(draft)
        if found.keys() != tensors.keys() or not all(
            torch.equal(found[name].view(torch.int32), value.view(torch.int32))
            for name, value in tensors.items()
        ):
            raise CheckpointError(
                f"torch {torch.__version__} reads other values from its folder than were written; "
                "please report this"
            )
    parameters = sum(value.numel() for value in tensors.values())
    return Exported(output, origin.step, timm_call(origin.config), len(tensors), parameters)

"""Export and import of the full model: encoder, decoder and prediction heads in one folder.

``model.safetensors`` has the state dict of ``CollaborativeMAE`` in float32: ``encoder.*`` (timm's
names behind the prefix), ``decoder.*``, ``heads.teacher.*``, ``heads.student.*``,
``heads.pixel.*``. ``config.yaml`` is the run's.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cmtmae_scale.checkpoint.chunks import ChunkReader
from cmtmae_scale.checkpoint.tensor_file import Entry, write_tensors
from cmtmae_scale.config.load import load_config, save_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import teacher_shares
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.export.compare import Agreement, require_agreement
from cmtmae_scale.export.origin import Origin
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.masking import PatchChoice, choose_masks
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.runtime.storage import require_inside
from cmtmae_scale.teachers.state_dicts import find_non_finite

WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
PREFIX = "model."
TEACHER_HEAD = "heads.{}.weight"
SNIPPET = """from cmtmae_scale.export.full import load_full
model = load_full("FOLDER").eval()
tokens = model.encoder(images)  # normalised [B, 3, S, S] to [B, P + N, D]
"""


def load_full(folder: str | Path) -> CollaborativeMAE:
    """Load a folder that ``cmtmae export full`` wrote: on the CPU, float32, in training mode.

    Raises:
        CheckpointError: if a file is absent or cannot be read, or weights and config do not fit
            each other.
        ConfigError: if the config is not this version's.
    """
    folder = Path(folder)
    try:
        for name in (CONFIG, WEIGHTS):
            require_inside(folder, folder / name)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    found = find_non_finite(tensors)
    if found:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {found}; export it again from an intact checkpoint"
        )
    return build_full(load_config(folder / CONFIG), tensors, str(folder))


def build_full(config: Config, tensors: dict[str, Tensor], place: str) -> CollaborativeMAE:
    """Build a config's model and load these weights strictly.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    heads = {name: TEACHER_HEAD.format(name) for name in teacher_shares(config)}
    widths = {name: len(tensors[key]) for name, key in heads.items() if key in tensors}
    if config.decoder.depth > len(tensors):
        raise CheckpointError(
            f"{place}: weights and config differ: decoder.depth={config.decoder.depth}, but there "
            f"are only {len(tensors)} tensors"
        )
    try:
        model = CollaborativeMAE(config, widths)
        model.load_state_dict(tensors, strict=True)
    except (RuntimeError, TypeError, ValueError) as error:
        first = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{place}: weights and config differ: {first}") from error
    return model


def write_full(draft: Path, origin: Origin) -> None:
    """Write weights and config.

    Raises:
        OSError: if the store refuses.
    """
    with ChunkReader(origin.folder) as reader:
        entries = [
            Entry(key.removeprefix(PREFIX), reader.shape(key), partial(reader.read_tensor, key))
            for key in reader.index
            if key.startswith(PREFIX)
        ]
        write_tensors(draft / WEIGHTS, entries, {"format": "pt"})
    # A DeepSpeed config may be a file on the training machine; no network depends on it.
    backend = replace(origin.config.backend, deepspeed=None)
    save_config(replace(origin.config, backend=backend), draft / CONFIG)


@torch.no_grad()
def check_full(folder: Path, origin: Origin, images: Tensor) -> Agreement:
    """Load a folder and compare all predictions with those of the checkpoint's weights.

    Images are uint8, ``[B, S, S, 3]``.

    Raises:
        CheckpointError: if the folder does not load or predicts something else.
    """
    ours = build_full(origin.config, origin.tensors(PREFIX), str(origin.folder)).eval()
    theirs = load_full(folder).eval()
    pixels = normalise_images(images, IMAGENET_MEAN, IMAGENET_STD)
    choice = random_masks(origin.config, ours, len(images))
    pairs = zip(tree_leaves(ours(pixels, choice)), tree_leaves(theirs(pixels, choice)), strict=True)
    flat = [(a.flatten(), b.flatten()) for a, b in pairs]
    one, other = (torch.cat(side) for side in zip(*flat, strict=True))
    return require_agreement(one, other, "CollaborativeMAE")


def random_masks(config: Config, model: CollaborativeMAE, count: int) -> PatchChoice:
    """Return random masks of the run's ratios, always the same."""
    rows, columns = model.encoder.grid
    mask = replace(config.mask, sampler="random", hint_fraction=0.0, prob=1.0)
    positions = torch.arange(count)
    return choose_masks(mask, None, positions, config.run.seed, 0.0, length=rows * columns)

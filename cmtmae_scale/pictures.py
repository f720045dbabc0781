"""Pictures of what a run does: view, the three attention maps, and the mask."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cmtmae_scale.checkpoint import layout as checkpoints
from cmtmae_scale.checkpoint.chunks import ChunkReader
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.method.attention import normalise_map
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.masking import choose_masks
from cmtmae_scale.method.schedules import evaluate
from cmtmae_scale.method.student import MomentumStudent, build_student
from cmtmae_scale.teachers.build import build_teacher
from cmtmae_scale.training.prepare import mix
from dataloading.index import load_or_build
from dataloading.stream import Stream


def draw_views(run_dir: Path, output: Path, count: int = 8) -> Path:
    """Draw views with teacher, momentum and collaborative attention and the mask of the last step.

    Args:
        run_dir: a run with a checkpoint.
        output: folder of the picture.
        count: number of views, the first of the global sequence.

    Returns:
        Path of ``views.png``.

    Raises:
        CheckpointError: if the run has no intact checkpoint.
    """
    config = load_config(run_dir / "config.yaml")
    folder = next(
        (f for f in checkpoints.candidates(run_dir / "checkpoints") if not checkpoints.fault(f)),
        None,
    )
    if folder is None:
        raise CheckpointError(f"{run_dir}: no intact checkpoint to draw; train first")
    progress = checkpoints.read_state(folder)["progress"]
    share = progress["position"] / progress["horizon"]
    with torch.no_grad(), ExitStack() as stack:
        columns = compute(config, folder, share, count, stack)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "views.png"
    draw(columns, caption(config, progress["step"], share), path)
    return path


def caption(config: Config, step: int, share: float) -> str:
    """Title that says which teacher, sampler and mixing weight are seen."""
    alpha = evaluate(config.collaboration.alpha_attention, share)
    origin = "RANDOM WEIGHTS" if config.teacher.weights == "random" else "frozen teacher"
    return (
        f"step {step}: {config.teacher.model} ({origin}), sampler {config.mask.sampler}, "
        f"{config.mask.ratio:.0%} hidden, teacher's weight in the mix {alpha:g}"
    )


def compute(
    config: Config, folder: Path, share: float, count: int, stack: ExitStack
) -> dict[str, Tensor]:
    """Views ``[n, S, S, 3]`` in 0..1, maps ``[n, h, w]`` and the mask, by column title."""
    device = torch.device("cpu")
    teacher = build_teacher(config, device, torch.float32)
    momentum = build_student(config, MomentumStudent)
    reader = ChunkReader(folder)
    names = momentum.state_dict()
    average = any(key.startswith("momentum.") for key in reader.index)
    prefix = "momentum." if average else "model.encoder."
    momentum.load_state_dict({name: reader.read_whole(prefix + name) for name in names})
    momentum.eval()
    sizes = [config.views.size]
    if teacher is not None and teacher.image_size != config.views.size:
        sizes.append(teacher.image_size)
    index_folder = Path(config.data.index) if config.data.index else Path(config.run.dir) / "index"
    index = load_or_build(
        config.data.path,
        index_folder,
        source=config.data.source,
        max_pixels=config.data.max_pixels,
    )
    stream = stack.enter_context(
        Stream(
            index,
            seed=config.run.seed,
            micro_batch=count,
            sizes=tuple(sizes),
            scale=config.views.scale,
            ratio=config.views.ratio,
            flip=config.views.flip,
            count=config.views.count,
            shuffle=config.data.shuffle,
            threads=1,
            decode=config.data.decode,
        )
    )
    batch = next(iter(stream))
    _, student_map = momentum(normalise_images(batch.images[0], IMAGENET_MEAN, IMAGENET_STD))
    teacher_map = teacher(batch.images[-1]).attention if teacher is not None else None
    maps = {"teacher": teacher_map, "momentum": student_map}
    alpha = torch.tensor(evaluate(config.collaboration.alpha_attention, share))
    mixed = mix(config.attention, teacher_map, student_map, alpha)
    height, width = momentum.grid
    choice = choose_masks(
        config.mask,
        mixed,
        batch.position,
        config.run.seed,
        evaluate(config.mask.salient_frac, share),
        length=height * width,
    )
    hidden = choice.mask(height * width)[:: config.mask.masks_per_view].reshape(-1, height, width)
    views = batch.images[0].float() / 255
    columns = {"view": views}
    for name, one in {**maps, "collaborative": mixed}.items():
        if one is not None:
            columns[f"{name} attention"] = normalise_map(one, "minmax").reshape(-1, height, width)
    columns["visible patches"] = cover(views, hidden)
    return columns


def cover(views: Tensor, hidden: Tensor) -> Tensor:
    """Grey out hidden patches; views ``[n, S, S, 3]``, hidden bool ``[n, h, w]``."""
    side = views.shape[1] // hidden.shape[1]
    pixels = hidden.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]
    return torch.where(pixels, torch.full_like(views, 0.55), views)


def draw(columns: dict[str, Tensor], title: str, path: Path) -> None:
    """Write a grid, one row a view, as PNG."""
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.9 * len(columns), 1.9 * rows + 0.6))
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, values) in enumerate(columns.items()):
        axes[0][column].set_title(name, fontsize=10)
        for row in range(rows):
            axis = axes[row][column]
            axis.set_axis_off()
            axis.imshow(np.asarray(values[row]), cmap="magma", interpolation="nearest")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=90)

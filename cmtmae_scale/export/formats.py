"""The formats of exported folders, and how a folder is verified before publication."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from cmtmae_scale.errors import ConfigError, remedy_for
from cmtmae_scale.evaluation.encoders import weights_digest
from cmtmae_scale.export import full, hugging_face, timm_folder
from cmtmae_scale.export.card import CardFacts, model_card
from cmtmae_scale.export.compare import TOLERANCE, Agreement
from cmtmae_scale.export.origin import Origin, Weights, open_origin
from cmtmae_scale.export.views import open_views
from cmtmae_scale.runtime.log import progress_bar
from cmtmae_scale.runtime.storage import atomic_path, sync, write_atomic


class Format(NamedTuple):
    """A format of exported folders."""

    library: Callable[[], str]
    """Return the loading library with its version; raises ``ConfigError`` where it is missing."""
    hub_name: str
    title: str
    write: Callable[[Path, Origin], None]
    check: Callable[[Path, Origin, Tensor], Agreement]
    snippet: Callable[[Origin], str]


FORMATS = {
    "timm": Format(
        timm_folder.timm_version,
        "timm",
        "an encoder for timm",
        timm_folder.write_timm,
        timm_folder.check_timm,
        timm_folder.timm_snippet,
    ),
    "hf": Format(
        lambda: f"transformers {hugging_face.require_transformers().__version__}",
        "transformers",
        "an encoder for transformers",
        hugging_face.write_hf,
        hugging_face.check_hf,
        lambda _: hugging_face.SNIPPET,
    ),
    "full": Format(
        lambda: "CollaborativeMAE",
        "cmtmae_scale",
        "encoder, decoder and prediction heads",
        full.write_full,
        full.check_full,
        lambda _: full.SNIPPET,
    ),
}


def export_folder(
    what: str, place: Path, output: Path | None, weights: Weights, images: Path | None
) -> str:
    """Write a folder, load it back, compare its outputs on images, then publish it.

    Args:
        what: one of ``FORMATS``.
        place: a checkpoint's folder, or a run's for its newest intact checkpoint.
        output: ``None``: named after weights, format and step, in the working folder.
        weights: student or momentum encoder.
        images: images to verify on; ``None``: the run's own.

    Returns:
        Location and verification of the export.

    Raises:
        CheckpointError: no checkpoint, a broken one, one without these weights, or an export that
            computes something else.
        ConfigError: an output that exists or cannot be written, no images, a missing library, or
            an architecture that the library does not know.
        DataError: unusable images.
    """
    kind = FORMATS[what]
    library = kind.library()
    origin = open_origin(place, weights)
    output = output or Path(f"{weights}-{what}-{origin.folder.name}")
    with publish_folder(output) as draft, progress_bar("exporting", 3, "stages") as report_done:
        kind.write(draft, origin)
        report_done(1)
        views = open_views(images, origin)
        report_done(2)
        found = kind.check(draft, origin, views.images)
        report_done(3)
        checked = (
            f"loaded back by {library}; largest difference on {len(views.images)} images "
            f"{found} (allowed: {TOLERANCE:g} of that)"
        )
        facts = CardFacts(
            kind.hub_name,
            kind.title,
            kind.snippet(origin),
            f"Checked when exported: {checked}.",
            weights_digest(origin.encoder().state_dict()),
            views.num_images,
        )
        write_atomic(draft / "README.md", model_card(origin, facts))
    return (
        f"{output}: {kind.title}, {weights} at step {origin.step}, {checked}\nimages: {views.place}"
    )


@contextmanager
def publish_folder(output: Path) -> Iterator[Path]:
    """Yield a draft folder; rename it when the block ends, remove it when the block fails.

    Raises:
        ConfigError: if the output exists or cannot be written.
    """
    if output.exists() or output.is_symlink():
        raise ConfigError(f"--output={output} exists; delete it or name another folder")
    try:
        with atomic_path(output) as draft:
            draft.mkdir()
            yield draft
        sync(output.parent)
    except OSError as error:
        raise ConfigError(
            f"--output={output} cannot be written ({error}); "
            f"{remedy_for(error, 'name another folder')}"
        ) from error

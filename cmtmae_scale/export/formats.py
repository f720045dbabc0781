"""The formats of exported folders, and how a folder is verified before publication."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torch import Tensor

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.evaluation.encoders import weights_digest
from cmtmae_scale.export import full, hugging_face, onnx_folder, timm_folder
from cmtmae_scale.export.card import CardFacts, model_card
from cmtmae_scale.export.compare import TOLERANCE, Agreement
from cmtmae_scale.export.hub import Target, require_hub, upload
from cmtmae_scale.export.origin import Origin, Weights, open_origin
from cmtmae_scale.export.place import default_output, explain_refusal, publish
from cmtmae_scale.export.views import open_views
from cmtmae_scale.runtime.log import progress_bar
from cmtmae_scale.runtime.storage import digest, write_atomic

logger = logging.getLogger(__name__)

CARD = "README.md"


class Format(NamedTuple):
    """A format of exported folders."""

    library: Callable[[], str]
    """Return the loading library with its version; raises ``ConfigError`` where it is missing."""
    hub_name: str
    title: str
    write: Callable[[Path, Origin], None]
    check: Callable[[Path, Origin, Tensor], Agreement | None]
    """Return the difference of the outputs; ``None``: the library to compare is not installed."""
    snippet: Callable[[Origin, str | None], str]
    """Return Python code that loads the folder, or the repository of the hub."""


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
        hugging_face.hf_snippet,
    ),
    "full": Format(
        lambda: "CollaborativeMAE",
        "cmtmae_scale",
        "encoder, decoder and prediction heads",
        full.write_full,
        full.check_full,
        lambda *_: full.SNIPPET,
    ),
    "onnx": Format(
        onnx_folder.onnx_version,
        "onnx",
        "an encoder as an ONNX graph",
        onnx_folder.write_onnx,
        onnx_folder.check_onnx,
        lambda *_: onnx_folder.SNIPPET,
    ),
}


def export_folder(
    what: str,
    place: Path,
    output: Path | None,
    weights: Weights,
    images: str | Path | None,
    target: Target | None = None,
    image_size: int | None = None,
) -> str:
    """Write a folder, load it back, compare its outputs on images, then publish it.

    Args:
        what: one of ``FORMATS``.
        place: a checkpoint's folder, or a run's for its newest intact checkpoint.
        output: ``None``: see ``default_output``.
        weights: student or momentum encoder.
        images: images to verify on; ``None``: the run's own.
        target: repository of the hub to which the published folder is uploaded. An output that
            exists is uploaded as it is, if it holds the same weights and settings.
        image_size: side of the images that the network takes, in pixels; ``None``: the run's.

    Returns:
        Location and verification of the export.

    Raises:
        CheckpointError: no checkpoint, a broken one, one without these weights, or an export that
            computes something else.
        ConfigError: an output that exists or cannot be written, no images, a missing library, an
            architecture that the library does not know, or an upload that the hub refuses.
        DataError: unusable images.
        UploadError: if the hub cannot be reached or fails; the published folder stays.
    """
    kind = FORMATS[what]
    library = kind.library()
    if target is not None:
        require_hub(target)
    origin = open_origin(place, weights, image_size)
    size = "" if image_size is None else f"-{image_size}"
    output = output or default_output(origin, f"{what}{size}")
    is_repeated = target is not None and output.is_dir()
    draft_folder = open_twin(output) if is_repeated else publish(output)
    with draft_folder as draft, progress_bar("exporting", 3, "stages") as report_done:
        draft.mkdir(exist_ok=True)
        kind.write(draft, origin)
        report_done(1)
        views = open_views(images, origin)
        report_done(2)
        found = kind.check(draft, origin, views.images)
        report_done(3)
        checked = (
            f"loaded back by {library}; largest difference on {len(views.images)} images "
            f"{found} (allowed: {TOLERANCE:g} of that)"
            if found
            else onnx_folder.UNVERIFIED
        )
        facts = CardFacts(
            kind.hub_name,
            kind.title,
            kind.snippet(origin, target.repo if target else None),
            f"{'Checked when exported: ' if found else ''}{checked}.",
            weights_digest(origin.encoder().state_dict()),
            views.num_images,
        )
        write_atomic(draft / CARD, model_card(origin, facts))
    lines = [
        f"{output}: {kind.title}, {weights} at step {origin.step}, {checked}",
        f"images: {views.place}",
    ]
    if target is not None:
        logger.info("uploading %s to %s", output, target.repo)
        lines.append(f"uploaded to {upload(output, target)}")
    return "\n".join(lines)


@contextmanager
def open_twin(output: Path) -> Iterator[Path]:
    """Yield a temporary folder for a second copy of an export, and compare it with ``output``.

    The card may differ: it may have been edited.

    Raises:
        ConfigError: if a file of the export is absent or differs, or nothing can be written there.
    """
    with (
        explain_refusal(output),
        TemporaryDirectory(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent) as twin,
    ):
        yield Path(twin)
        names = sorted(path.name for path in Path(twin).iterdir() if path.name != CARD)
        other = [name for name in names if not has_same_bytes(output / name, Path(twin) / name)]
    if other:
        raise ConfigError(
            f"{output} exists and is another export: {', '.join(other)} is absent or differs; "
            "delete it, or name another place with --output"
        )


def has_same_bytes(path: Path, other: Path) -> bool:
    """Return whether the first file exists and equals the second."""
    return path.is_file() and digest(path) == digest(other)

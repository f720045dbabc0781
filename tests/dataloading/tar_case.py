"""Tars written and listed by the standard library, which the package's own reader must equal."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(
    path: Path, content: Iterable[tuple[str, bytes]], form: str = "pax", **options: Any
) -> Path:
    """Write (name, bytes) pairs; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[form], **options) as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def reference(path: Path) -> list[tuple[str, int, int]]:
    """List name, offset and size of regular files."""
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]

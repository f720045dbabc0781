"""Versions of the libraries that compute, for checkpoints and result files."""

from importlib.metadata import version

from cmtmae_scale import __version__


def library_versions() -> dict[str, str]:
    """Return the versions of this package, torch and timm, without importing torch or timm."""
    return {"cmtmae_scale": __version__, "torch": version("torch"), "timm": version("timm")}

"""Options of ``cmtmae export`` that need no checkpoint."""

import pytest

from cmtmae_scale.commands.export import parse_options


@pytest.mark.parametrize("what", ["timm", "hf", "onnx", "full"])
def test_the_images_of_the_check_may_be_an_address(what: str) -> None:
    """As a path ``s3://`` would lose a slash, and be refused as a folder that does not exist."""
    address = "s3://BUCKET/imagenet/val-{00..49}.tar"
    assert parse_options([what, "--checkpoint", "run", "--images", address]).images == address

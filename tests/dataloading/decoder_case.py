"""The decoders that a test of the stream runs with."""

from importlib.util import find_spec

import pytest

NO_DALI = find_spec("nvidia") is None or find_spec("nvidia.dali") is None
DECODERS = [
    "torch",
    pytest.param(
        "dali",
        marks=[pytest.mark.dali, pytest.mark.skipif(NO_DALI, reason="DALI is not installed")],
    ),
]

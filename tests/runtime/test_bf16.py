"""Which CPUs compute bf16, and the warning for those that emulate it."""

import pytest
import torch

from cmtmae_scale.runtime.bf16 import bf16_instructions, emulation_warning

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ZEN3 = {"architecture": "x86_64", "avx2": True, "avx512_f": False, "amx_bf16": False}
ICE_LAKE = {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False}
SAPPHIRE_RAPIDS = ICE_LAKE | {"avx512_bf16": True, "amx_tile": True, "amx_bf16": True}
GRAVITON_3 = {"architecture": "arm64", "bf16": True, "sve_bf16": True, "sve_max_length": 256}


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (ZEN3, ()),
        (ICE_LAKE, ()),
        (SAPPHIRE_RAPIDS, ("amx_bf16", "avx512_bf16")),
        (GRAVITON_3, ("bf16", "sve_bf16")),
        ({}, ()),
    ],
)
def test_instructions_are_found_by_name(capabilities, expected):
    assert bf16_instructions(capabilities) == expected


@pytest.mark.parametrize(
    ("device", "precision", "capabilities", "is_warned"),
    [
        (CPU, "bf16", ZEN3, True),
        (CPU, "fp32", ZEN3, False),
        (CPU, "bf16", SAPPHIRE_RAPIDS, False),
        (GPU, "bf16", ZEN3, False),
    ],
)
def test_emulated_bf16_is_warned_of_with_a_remedy(device, precision, capabilities, is_warned):
    text = emulation_warning(device, precision, capabilities)
    assert (text is not None) == is_warned
    assert text is None or ("amx_bf16" in text and text.endswith("set backend.precision=fp32"))


def test_torch_names_this_cpu() -> None:
    """``torch.cpu.get_capabilities`` knows the names that are asked for."""
    found = torch.cpu.get_capabilities()
    names = {"x86_64": {"amx_bf16", "avx512_bf16"}, "arm64": {"bf16", "sve_bf16"}}
    assert names.get(found["architecture"], set()) <= set(found)

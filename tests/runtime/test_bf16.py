"""Which CPUs compute bf16, and the warning for those on which it is slower."""

import pytest
import torch

from cmtmae_scale.runtime import bf16
from cmtmae_scale.runtime.bf16 import bf16_instructions, slow_bf16_warning

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
    ("device", "precision", "cost", "is_warned"),
    [
        (CPU, "bf16", 15.0, True),
        (CPU, "bf16", 1.4, True),
        (CPU, "bf16", 1.0, False),
        (CPU, "bf16", 0.2, False),
        (CPU, "fp32", 15.0, False),
        (GPU, "bf16", 15.0, False),
    ],
)
@pytest.mark.parametrize("capabilities", [ZEN3, SAPPHIRE_RAPIDS])
def test_slow_bf16_is_warned_of_with_a_remedy(
    device, precision, cost, is_warned, capabilities, monkeypatch
):
    monkeypatch.setattr(bf16, "bf16_cost", lambda: cost)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    text = slow_bf16_warning(device, precision)
    assert (text is not None) == is_warned
    if text is not None:
        assert f"{cost:.1f} times as long" in text and text.endswith("set backend.precision=fp32")
        assert ("amx_bf16, avx512_bf16" in text) == (capabilities is SAPPHIRE_RAPIDS)


def test_the_cost_is_of_products_in_both_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest of the rounds, so that a busy moment does not warn."""
    found: list[torch.dtype] = []

    def clock(call):
        found.append(call.args[0].dtype)
        return 3.0 if found[-1] == torch.bfloat16 and len(found) > 2 else 2.0

    monkeypatch.setattr(bf16, "seconds", clock)
    assert bf16.bf16_cost() == 1.0
    assert found == [torch.bfloat16, torch.float32] * bf16.ROUNDS


def test_torch_names_this_cpu() -> None:
    """``torch.cpu.get_capabilities`` has the requested names."""
    found = torch.cpu.get_capabilities()
    names = {"x86_64": {"amx_bf16", "avx512_bf16"}, "arm64": {"bf16", "sve_bf16"}}
    assert names.get(found["architecture"], set()) <= set(found)

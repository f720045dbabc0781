import os

import pytest
import torch
import torch._inductor.config as inductor
from torch.utils import deterministic

from cmtmae_scale.runtime.determinism import deterministic_kernels


def flags() -> tuple[bool, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        not torch.backends.cuda.cudnn_sdp_enabled(),
        inductor.deterministic,
        not deterministic.fill_uninitialized_memory,  # pyright: ignore[reportAttributeAccessIssue]
    )


def test_torch_is_asked_for_deterministic_kernels_within(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with deterministic_kernels(enabled=True):
        assert flags() == (True, True, True, True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.zeros(1).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
    assert flags() == before
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with deterministic_kernels(enabled=False):
        assert flags() == before
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ

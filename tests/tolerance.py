"""The accuracy rule: at most twice the error of PyTorch in the same dtype, both against float64 (+1e-6 for fp32)."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_accurate(
    out: Tensor, yardstick: Tensor, truth: Tensor, *, factor: float = 2.0, label: str = ""
) -> None:
    assert out.shape == truth.shape, label
    if out.numel() == 0:
        return
    error = (out.double() - truth).abs().max().item()
    allowed = factor * (yardstick.double() - truth).abs().max().item()
    allowed += 1e-6 if out.dtype == torch.float32 else 0.0
    # One key means out = v to the last bit in every dtype: nothing is allowed, nothing is needed.
    assert error <= allowed, f"{label}: error {error:.3e}, allowed {allowed:.3e}"

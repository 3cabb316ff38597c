"""The per-token steps between a decoder's linear layers, each one pass over its rows.

On the CPU kernels a row's bits depend on that row alone: not on the other tokens, nor on the threads.
Inference only: no gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.backends import cpu, cpu_serves
from fastattn.checks import Shapes, check_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (arXiv 1910.07467).

    Args:
        x: (tokens, hidden) float32, any strides.
        weight: (hidden,) float32.
        eps: added to the mean of squares.

    Returns:
        (tokens, hidden) float32.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, naming the argument.
    """
    shapes = Shapes()
    shapes.match("x", x, "tokens hidden")
    shapes.match("weight", weight, "hidden")
    _check(x, "x")
    check_dtype("weight", weight, (torch.float32,))
    if weight.device != x.device:
        raise ValueError(f"weight: expected the device of x, {x.device}, got {weight.device}")
    if cpu_serves(x):
        return cpu.rms_norm(x, weight, eps)
    return F.rms_norm(x, (x.shape[1],), weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of a gated MLP (arXiv 2002.05202), where gate and up lie side by side.

    Args:
        gate_up: (tokens, 2 * ffn) float32, any strides; the gate comes first.

    Returns:
        (tokens, ffn) float32.

    Raises:
        ValueError, TypeError: a wrong shape or dtype, naming the argument.
    """
    Shapes().match("gate_up", gate_up, "tokens 2*ffn")
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected (tokens, 2*ffn), got {tuple(gate_up.shape)}")
    _check(gate_up, "gate_up")
    if cpu_serves(gate_up):
        return cpu.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def _check(x: Tensor, name: str) -> None:
    if x.dtype is not torch.float32:
        check_dtype(name, x, (torch.float32,))
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{name}: gradients do not flow through here; use torch.no_grad()")

"""The per-token steps between a decoder's linear layers, each one pass over its rows.

On the CPU kernels a row's bits depend on that row alone: not on the other tokens, nor on the threads.
Inference only: no gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.backends import cpu, cpu_serves
from fastattn.checks import Shapes, check_dtype

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


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


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation function of an MLP, element by element.

    Args:
        x: (tokens, ffn) float32, any strides.
        activation: "silu", "gelu" (exact), "gelu_tanh" (its approximation by tanh) or "relu".

    Returns:
        (tokens, ffn) float32.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or name, naming the argument.
    """
    Shapes().match("x", x, "tokens ffn")
    _check(x, "x")
    function = _function(activation)
    return cpu.activate(x, activation, False) if cpu_serves(x) else function(x)


def activate_mul(gate_up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` of a gated MLP (arXiv 2002.05202), where gate and up lie side by side.

    Args:
        gate_up: (tokens, 2 * ffn) float32, any strides; the gate comes first.
        activation: as in ``activate``.

    Returns:
        (tokens, ffn) float32.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or name, naming the argument.
    """
    Shapes().match("gate_up", gate_up, "tokens 2*ffn")
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected (tokens, 2*ffn), got {tuple(gate_up.shape)}")
    _check(gate_up, "gate_up")
    function = _function(activation)
    if cpu_serves(gate_up):
        return cpu.activate(gate_up, activation, True)
    gate, up = gate_up.chunk(2, dim=1)  # each (tokens, ffn)
    return function(gate) * up


def _function(activation: str) -> Callable[[Tensor], Tensor]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS[activation]


def _check(x: Tensor, name: str) -> None:
    if x.dtype is not torch.float32:
        check_dtype(name, x, (torch.float32,))
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{name}: gradients do not flow through here; use torch.no_grad()")

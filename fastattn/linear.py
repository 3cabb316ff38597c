"""The linear layer of the decoder loop: weights packed once, results independent of batchmates and threads.

``PackedLinear(weight, bias)(x)`` is ``x (tokens, in_features) @ weight.T + bias``. On the CPU kernels a
token's result has the same bits alone, among 512 others, and on any number of threads; so generated text does
not depend on what else is in the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.backends import cpu, cpu_serves
from fastattn.checks import Shapes, check_dtype

DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear:
    """An inference-only linear layer.

    float32 weights multiply x as it is. bfloat16 weights multiply x rounded to bfloat16 (to nearest, ties to
    even), as bfloat16 models do; products are exact, and sums and results float32.

    The CPU kernels serve weights on the CPU, packed for the instruction set in use at construction: after
    ``select_isa`` of another one a call raises RuntimeError. Without the compiled extension, on other
    devices, or where ``FASTATTN_BACKEND`` forces another backend, PyTorch's own ``linear`` serves instead;
    with bfloat16 weights it rounds results to bfloat16 too.

    Args:
        weight: (out_features, in_features) float32 or bfloat16, any strides; neither size may be 0.
        bias: (out_features,) of either dtype.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, naming the argument.
        RuntimeError: ``FASTATTN_BACKEND=cpu``, and the kernels cannot run here.
    """

    __slots__ = ("_packed", "_plain", "device", "dtype", "in_features", "nbytes", "out_features")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        shapes = Shapes()
        shapes.match("weight", weight, "out_features in_features")
        check_dtype("weight", weight, DTYPES)
        self.out_features, self.in_features = weight.shape
        if 0 in weight.shape:
            raise ValueError(f"weight: expected sizes of at least 1, got {tuple(weight.shape)}")
        if bias is not None:
            shapes.match("bias", bias, "out_features")
            check_dtype("bias", bias, DTYPES)
            if bias.device != weight.device:
                raise ValueError(f"bias: expected the device of weight, {weight.device}, got {bias.device}")
            bias = bias.detach().float()
        weight = weight.detach()
        self.dtype, self.device = weight.dtype, weight.device
        self._packed = cpu.pack_linear(weight, bias) if cpu_serves(weight) else None
        self._plain = (weight, bias) if self._packed is None else None
        stored = (weight, bias) if self._packed is None else (self._packed.data,)
        self.nbytes = sum(t.nbytes for t in stored if t is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """``x (tokens, in_features)`` float32, any strides, to ``(tokens, out_features)`` float32."""
        if (
            not isinstance(x, Tensor)
            or x.dtype is not torch.float32
            or x.dim() != 2
            or x.size(1) != self.in_features
            or x.device != self.device
            or x.requires_grad
        ):
            self._check(x)
        if self._packed is not None:
            return cpu.linear(self._packed, x)
        assert self._plain is not None
        weight, bias = self._plain
        out = F.linear(x.to(self.dtype), weight).float()
        return out if bias is None else out + bias

    def _check(self, x: Tensor) -> None:
        Shapes(in_features=self.in_features).match("x", x, "tokens in_features")
        check_dtype("x", x, (torch.float32,))
        if x.device != self.device:
            raise ValueError(f"x: expected the device of weight, {self.device}, got {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("x: gradients do not flow through PackedLinear; use torch.no_grad()")

    def __repr__(self) -> str:
        kernel = "torch" if self._packed is None else self._packed.isa
        return (
            f"PackedLinear(in_features={self.in_features}, out_features={self.out_features}, "
            f"dtype={self.dtype}, kernel={kernel!r})"
        )

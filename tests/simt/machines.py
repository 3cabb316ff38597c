"""Where the CUDA kernels run in tests: in the emulator, and on a GPU where there is one. Tensors go in and come out on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from nested import map_tensors
from simt.emulator import Emulator
from torch import Tensor

from fastattn.args import AttentionArgs, KVAppendArgs, SamplingArgs
from fastattn.backends import cuda

MACHINES = ["emulated", "gpu"] if torch.cuda.is_available() else ["emulated"]


class Hopper:
    """The emulator as a GPU of compute capability 9.0. A call must run on the kernel that ``forward_kernel`` names."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.served: set[str] = set()

    def attention(
        self, args: AttentionArgs, seed: int = 1, landing: str = "between"
    ) -> tuple[Tensor, Tensor | None]:
        kernel = self.forward_kernel(args)
        with self.emulator.compute_capability(90):
            result = self.emulator.attention(args, seed, landing)
        assert self.emulator.mmas() == 0 or kernel == "mma"
        assert self.emulator.wgmmas() == 0 or kernel == "wgmma"
        self.served.add(kernel)
        return result

    def forward_kernel(self, args: AttentionArgs) -> str:
        with self.emulator.compute_capability(90):
            return self.emulator.forward_kernel(args)

    def faults(self) -> dict[str, int]:
        return self.emulator.faults()

    def report(self) -> str:
        return self.emulator.report()


class Gpu:
    """The interface of ``Emulator``, on the real thing: schedules and landings are what they are."""

    def attention(
        self, args: AttentionArgs, seed: int = 1, landing: str = "between"
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = cuda.attention(_moved(args))
        return out.cpu(), None if lse is None else lse.cpu()

    def attention_backward(
        self, args: AttentionArgs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None = None,
        seed: int = 1, landing: str = "between",
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        given = [None if x is None else x.cuda() for x in (out, lse, dout, dlse)]
        grads = cuda.attention_backward(_moved(args), *given, needs_dbias=args.attn_bias is not None)  # type: ignore[arg-type]
        return tuple(None if x is None else x.cpu() for x in grads)

    def append_kv(self, args: KVAppendArgs, seed: int = 1) -> tuple[Tensor, Tensor]:
        moved = _moved(args)
        q, seqlens = cuda.append_kv(moved)
        args.k_cache.copy_(moved.k_cache)
        args.v_cache.copy_(moved.v_cache)
        return q.cpu(), seqlens.cpu()

    def sample(self, args: SamplingArgs, seed: int = 1) -> Tensor:
        return self.sample_with_logprobs(args, seed)[0]

    def sample_with_logprobs(
        self, args: SamplingArgs, seed: int = 1
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        return map_tensors(cuda.tokens_or_errors(_moved(args)), Tensor.cpu)

    def survivors(self, args: SamplingArgs, seed: int = 1) -> Tensor:
        return cuda.survivors(_moved(args)).cpu()

    def faults(self) -> dict[str, int]:
        torch.cuda.synchronize()  # an illegal access is an error here
        return {}

    def report(self) -> str:
        return ""


def _moved(args: Any) -> Any:
    if isinstance(args, SamplingArgs):
        return map_tensors(args, Tensor.cuda)
    tensors = {
        name: x.cuda()
        for name in args.__slots__
        if isinstance(x := getattr(args, name), Tensor) and name != "rng_state"
    }
    return replace(args, **tensors)

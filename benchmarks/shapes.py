"""Shapes of real models, by name: what the benchmarks run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One attention call; ``model`` says whose layer it is."""

    model: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    nheads: int
    nheads_k: int
    headdim: int
    causal: bool

    @property
    def flops(self) -> float:
        """Useful FLOPs: a causal mask leaves half of a square."""
        pairs = self.seqlen_q * self.seqlen_k
        if self.causal and self.seqlen_q > 1:
            pairs -= self.seqlen_q * (self.seqlen_q - 1) / 2
        return 4.0 * self.batch * self.nheads * pairs * self.headdim

    def kv_bytes(self, itemsize: int) -> float:
        """Bytes of K and V: what a decode step has to read."""
        return 2.0 * self.batch * self.seqlen_k * self.nheads_k * self.headdim * itemsize


def square(model: str, seqlen: int, nheads: int, nheads_k: int, headdim: int, causal: bool) -> Shape:
    """A prompt of one sequence."""
    return Shape(model, 1, seqlen, seqlen, nheads, nheads_k, headdim, causal)


FORWARD = [
    square(model, seqlen, nheads, nheads_k, headdim, causal)
    for model, nheads, nheads_k, headdim in (("GPT-2", 12, 12, 64), ("Llama-3-8B, quarter", 8, 2, 128))
    for seqlen in (1024, 4096)
    for causal in (False, True)
]

DECODE = [
    Shape(model, batch, 1, seqlen_k, nheads, nheads_k, headdim, False)
    for model, nheads, nheads_k, headdim in (("SmolLM2-135M", 9, 3, 64), ("Llama-3-8B", 32, 8, 128))
    for seqlen_k in (8192, 32768)
    for batch in (1,)
]

"""Shapes of real models, by name: what the benchmarks run, what it costs, and what issue 3 requires of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

UNLIMITED = (-1, -1)
TRAINING_FLOPS = 3.5  # forward 2 products; backward 5: the scores again, dP, dV, dK, dQ


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
    causal: bool = False
    window: tuple[int, int] = UNLIMITED
    extra: str = ""  # "padding mask" or "position bias"

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head: masks are aligned bottom-right, a padding mask is not counted."""
        left, right = self.window
        right = 0 if self.causal else right
        total = 0
        for i in range(self.seqlen_k - self.seqlen_q, self.seqlen_k):  # query i sits at key i
            first = 0 if left < 0 else max(0, i - left)
            last = self.seqlen_k - 1 if right < 0 else min(self.seqlen_k - 1, i + right)
            total += max(0, last - first + 1)
        return total

    @property
    def flops(self) -> float:
        """Useful FLOPs of the forward pass: two products, visible pairs only."""
        return 4.0 * self.batch * self.nheads * self.pairs * self.headdim

    @property
    def training_flops(self) -> float:
        """Useful FLOPs of forward and backward."""
        return TRAINING_FLOPS * self.flops

    def kv_bytes(self, itemsize: int) -> int:
        """Bytes of K and V: what a decode step has to read."""
        return 2 * self.batch * self.seqlen_k * self.nheads_k * self.headdim * itemsize

    @property
    def heads(self) -> str:
        """Heads/KV heads and headdim, as the tables show them."""
        return f"{self.nheads}/{self.nheads_k}, {self.headdim}"

    @property
    def work(self) -> str:
        """What is asked, without the model."""
        if self.seqlen_q == 1 and self.seqlen_k > 1:
            return f"{self.seqlen_k} keys, batch {self.batch}"
        batch = f"{self.batch} x " if self.batch > 1 else ""
        notes = [note for note in ("causal" if self.causal else "", self.extra) if note]
        tokens = "1 token" if self.seqlen_q == 1 else f"{self.seqlen_q} tokens"
        return ", ".join([batch + tokens, *notes])

    def record(self) -> dict[str, Any]:
        """For the JSON."""
        return {**vars(self), "heads": self.heads, "work": self.work}


def square(model: str, seqlen: int, causal: bool) -> Shape:
    """A prompt of one sequence."""
    return Shape(model, 1, seqlen, seqlen, *HEADS[model], causal)


HEADS = {  # nheads, nheads_k, headdim of one layer
    "GPT-2": (12, 12, 64),
    "Llama-3-8B, quarter": (8, 2, 128),
    "Llama-3-8B": (32, 8, 128),
    "SmolLM2-135M": (9, 3, 64),
    "BERT-base": (12, 12, 64),
    "T5-base": (12, 12, 64),
    "ViT-B": (12, 12, 64),
}

FORWARD = [
    square(model, seqlen, causal)
    for model in ("GPT-2", "Llama-3-8B, quarter")
    for seqlen in (1024, 4096, 8192)
    for causal in (False, True)
]
AVX2 = [shape for shape in FORWARD if shape.seqlen_q <= 4096]
TRAINING = [
    square(model, seqlen, True) for model in ("GPT-2", "Llama-3-8B, quarter") for seqlen in (1024, 4096)
]
DECODE = [
    Shape(model, batch, 1, seqlen_k, *HEADS[model])
    for model in ("Llama-3-8B", "SmolLM2-135M")
    for batch in (1, 8)
    for seqlen_k in (4096, 8192, 16384, 32768)
]
SHORT = [
    Shape(model, 32, seqlen, seqlen, *HEADS[model], extra=extra)
    for model, extra in (("BERT-base", "padding mask"), ("T5-base", "position bias"), ("ViT-B", ""))
    for seqlen in (64, 128, 256)
]
SMALLEST = Shape("smallest", 1, 1, 1, 1, 1, 64)
MEMORY = [Shape("4 heads", 1, seqlen, seqlen, 4, 4, 64, True) for seqlen in (2048, 16384)]
FEATURES = square("GPT-2", 2048, True)
WINDOWED = replace(FEATURES, window=(256, 0))


def required(kind: str, shape: Shape, dtype: str) -> dict[str, float]:
    """What issue 3 asks: a share of the limit, a speed-up over SDPA; no listed shape may be slower than SDPA."""
    need = {} if kind == "avx2" else {"speedup": 1.0}
    if kind in ("forward", "avx2"):
        share = _forward_share(shape, dtype)
        if share:
            need["share"] = share if kind == "forward" else 0.8 * share
    elif kind == "training":
        need["share"] = 0.65 if dtype == "float32" else 0.60
    elif kind == "decode":
        need["share"] = 0.88
    elif kind == "short":
        need["speedup"] = 1.3
    return need


def _forward_share(shape: Shape, dtype: str) -> float | None:
    if shape.seqlen_q < 4096 and not shape.causal:
        return None
    if dtype != "float32":
        return 0.72
    if shape.seqlen_q < 4096:
        return 0.68
    return 0.75 if shape.causal else 0.80

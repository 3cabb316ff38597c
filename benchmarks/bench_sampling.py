"""pytest-benchmark cases, one per operation: ``pytest benchmarks/bench_sampling.py --benchmark-autosave``."""

from __future__ import annotations

import pytest
import torch
from sampling_rows import ADVERSARIAL, PENALTIES, SEEN, VOCABULARIES, WORK, logits_of

import fastattn
from fastattn import sampling

ROWS = ("random", *ADVERSARIAL)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("work", WORK)
def test_sample(benchmark, work: str, vocab: int, row: str) -> None:
    """One row."""
    logits = logits_of(row, vocab)
    benchmark.extra_info.update(bytes=logits.nbytes, threads=torch.get_num_threads(), isa=fastattn.cpu_isa())
    benchmark(fastattn.sample, logits, seeds=1, backend="cpu", **WORK[work])


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_penalties(benchmark, vocab: int) -> None:
    """All penalties, sparse counts."""
    counts = fastattn.TokenCounts([range(SEEN // 2)], vocab)
    for token in range(SEEN // 2, SEEN):
        counts.add(torch.tensor([token]))
    call = {"seeds": 1, "token_counts": counts, **PENALTIES, **WORK["temperature, top-k 50, top-p 0.9"]}
    benchmark(fastattn.sample, logits_of("random", vocab), **call)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_batch(benchmark, vocab: int) -> None:
    """64 rows, torch's threads."""
    logits = logits_of("random", vocab, 64)
    benchmark(fastattn.sample, logits, seeds=1, backend="cpu", top_k=50, top_p=0.9)


BLOCKS = {
    "top_k_renorm_probs": (sampling.top_k_renorm_probs, 50),
    "top_p_renorm_probs": (sampling.top_p_renorm_probs, 0.9),
    "top_k_mask_logits": (sampling.top_k_mask_logits, 50),
    "min_p_sampling_from_probs": (sampling.min_p_sampling_from_probs, 0.05),
}


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(benchmark, name: str, vocab: int) -> None:
    """The building blocks, on one row of probabilities."""
    block, parameter = BLOCKS[name]
    benchmark(block, logits_of("random", vocab).softmax(1), parameter)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_speculative(benchmark, vocab: int) -> None:
    """Four drafted tokens."""
    draft, target = (logits_of("random", vocab, n).softmax(1)[None] for n in (4, 5))
    benchmark(sampling.speculative_sample, draft, draft.argmax(2), target, seeds=1)

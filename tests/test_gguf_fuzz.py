"""A valid GGUF file, changed 20,000 times at random: it loads or it is a ModelFileError, nothing else."""

from __future__ import annotations

import random
import struct

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf")

from test_gguf import tiny_llama

from fastattn.model import ModelFileError, load_decoder

MUTATIONS = 20_000
INTERESTING = (
    0,
    1,
    2,
    7,
    8,
    9,
    31,
    64,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def mutate(rng: random.Random, good: bytes, header: int) -> bytes:
    """One to three changes, most of them in the header, where the structure is."""
    raw = bytearray(good)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        size = len(raw)
        if size < 16:
            break
        at = rng.randrange(min(size, header)) if rng.random() < 0.9 else rng.randrange(size)
        kind = rng.randrange(6)
        if kind == 0:  # a bit
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:  # a byte
            raw[at] = rng.randrange(256)
        elif kind == 2:  # an integer
            code = rng.choice("IQ")
            value = struct.pack(
                "<" + code, rng.choice(INTERESTING) & (2**32 - 1 if code == "I" else 2**64 - 1)
            )
            raw[at : at + len(value)] = value
        elif kind == 3:  # the end is missing
            del raw[at:]
        elif kind == 4:  # a piece comes again, or replaces another
            start, length = rng.randrange(size), rng.randrange(1, 200)
            raw[at : at + rng.choice((0, length))] = raw[start : start + length]
        else:  # a piece is missing
            del raw[at : at + rng.randrange(1, 64)]
    return bytes(raw)


def test_mutations(tmp_path):
    file = tiny_llama()
    good, header = file.build(), len(file.header())
    assert header < 20_000
    path = tmp_path / "model.gguf"
    ids = torch.tensor([1, 2, 3])
    tried = loaded = 0

    # derandomize: every run tries the same files; on a failure hypothesis prints the generator's seed.
    @settings(max_examples=MUTATIONS, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
    @given(rng=st.randoms(use_true_random=True))
    def loads_or_says_why(rng: random.Random) -> None:
        nonlocal tried, loaded
        tried += 1
        out.seek(0)
        out.write(mutate(rng, good, header))
        out.truncate()
        try:
            decoder, _ = load_decoder(path)
        except ModelFileError:
            return
        loaded += 1
        if loaded % 20 == 0 and decoder.config.max_seqlen >= 3:
            logits = decoder.forward(ids, [3], decoder.new_cache(1, 3))
            assert logits.shape == (1, decoder.config.vocab_size)

    # One file, rewritten in place: opening it anew takes most of the time on some file systems.
    with path.open("w+b", buffering=0) as out:
        loads_or_says_why()
    print(f"{loaded} of {tried} loaded")
    assert tried >= MUTATIONS
    assert MUTATIONS * 0.02 < loaded < MUTATIONS * 0.9  # neither all broken nor all harmless

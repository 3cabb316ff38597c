"""What every decoder is held to beside transformers' model: a test module imports these with a ``pair`` of its own.

``pair`` is (transformers' model, our decoder), with a vocabulary of 101 and room for 64 tokens.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from fastattn.model import load_decoder

TOLERANCE = 1e-4  # float32 against float32, logits of size 1 to 10


def randomised(config, name: str, attention: str = "eager"):
    """A model of transformers with that attention; the weights are random by its name.

    They are large enough that attention is not uniform and that the best token wins by a margin. A token vector that
    is the head's row too is small beside what the layers add: it would else predict itself for ever.
    """
    config._attn_implementation = attention
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_embedding = "emb" in key or "wte" in key
            if p.dim() == 2:
                p.copy_(noise * (1.0 if is_embedding else 2.0 / p.shape[-1] ** 0.5))
            else:
                p.copy_(0.2 * noise + (0 if key.endswith("bias") else 1))
            if is_embedding and config.tie_word_embeddings:
                p.mul_(0.2)
    return model


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits (seqlen, vocab) of one sequence."""
    with torch.no_grad():
        return model(ids[None]).logits[0].float()


def prompt(seqlen: int, seed: int = 0) -> torch.Tensor:
    """(seqlen,) random token ids."""
    return torch.randint(0, 101, (seqlen,), generator=torch.Generator().manual_seed(seed))


def test_prefill(pair):
    model, decoder = pair
    ids = prompt(40)
    wanted = reference(model, ids)
    assert wanted.std() > 0.5
    logits = decoder.forward(ids, [40], decoder.new_cache(1, 40), all_logits=True)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    last = decoder.forward(ids, [40], decoder.new_cache(1, 0))
    torch.testing.assert_close(last, wanted[-1:], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("pieces", [[1] * 24, [24], [1, 5, 11, 7], [23, 1]], ids=str)
def test_pieces(pair, pieces):
    """One-token steps and chunked prefill give each position the logits of the full prefill."""
    model, decoder = pair
    ids = prompt(24)
    cache = decoder.new_cache(1, 4)  # too small on purpose: it grows
    logits = [decoder.forward(piece, [len(piece)], cache, all_logits=True) for piece in ids.split(pieces)]
    torch.testing.assert_close(torch.cat(logits), reference(model, ids), atol=TOLERANCE, rtol=TOLERANCE)
    assert cache.seqlens.tolist() == [24]
    assert cache.capacity >= 24


def test_ragged_batch(pair):
    """Rows of different lengths, then steps of one token, then rows that leave."""
    model, decoder = pair
    rows = [prompt(n, seed=n) for n in (17, 9, 9, 30)]
    splits = [[5, 1, 6, 5], [3, 3, 2, 1], [3, 3, 2, 1], [20, 4, 5, 1]]
    wanted = [reference(model, row) for row in rows]
    cache = decoder.new_cache(4, 8)
    done = [0] * 4
    for step in range(4):
        seqlens = [split[step] for split in splits]
        pieces = [row[start : start + n] for row, start, n in zip(rows, done, seqlens)]
        done = [start + n for start, n in zip(done, seqlens)]
        logits = decoder.forward(torch.cat(pieces), seqlens, cache)
        expected = torch.stack([w[n - 1] for w, n in zip(wanted, done)])
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)

    cache.select([3, 1])
    assert cache.seqlens.tolist() == [30, 9]
    new = prompt(2, seed=99)
    logits = decoder.forward(new, [1, 1], cache)
    expected = [reference(model, torch.cat([rows[r], new[i : i + 1]]))[-1] for i, r in enumerate((3, 1))]
    torch.testing.assert_close(logits, torch.stack(expected), atol=TOLERANCE, rtol=TOLERANCE)


def test_greedy(pair):
    model, decoder = pair
    ids = prompt(6, seed=3)
    cache = decoder.new_cache(1, 8)
    logits, ours = decoder.forward(ids, [6], cache), ids
    for _ in range(20):
        ours = torch.cat([ours, logits.argmax(-1)])
        logits = decoder.forward(ours[-1:], [1], cache)
    theirs = ids
    for _ in range(20):
        theirs = torch.cat([theirs, reference(model, theirs)[-1:].argmax(-1)])
    assert ours.tolist() == theirs.tolist()


def test_bits(pair):
    """A row's logits have the same bits alone on one thread and in a ragged batch on two."""
    _, decoder = pair
    rows = [prompt(n, seed=n) for n in (17, 9, 30)]
    alone = [decoder.forward(row, [len(row)], decoder.new_cache(1, 32), all_logits=True) for row in rows]
    torch.set_num_threads(2)
    seqlens = [len(row) for row in rows]
    together = decoder.forward(torch.cat(rows), seqlens, decoder.new_cache(3, 32), all_logits=True)
    torch.set_num_threads(1)
    assert torch.equal(torch.cat(alone), together)


def check_bfloat16(model, path) -> None:
    """Close to the float32 model with the same rounded weights; only products round to bfloat16."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(p.bfloat16())
    model.save_pretrained(path)
    decoder, _ = load_decoder(path, torch.bfloat16)
    assert decoder.dtype == torch.bfloat16
    cache = decoder.new_cache(1, 32)
    assert cache.k[0].dtype == torch.bfloat16
    ids = prompt(20)
    logits = decoder.forward(ids, [20], cache, all_logits=True)
    wanted = reference(model, ids)
    assert logits.dtype == torch.float32
    assert (logits - wanted).abs().mean() < 0.03 * wanted.std()

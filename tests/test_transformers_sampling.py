"""fastattn.sample inside transformers' generate: the same texts as a plain loop, in any batch; frequencies; errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import sampling_oracle as oracle
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    T5Config,
    T5ForConditionalGeneration,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import fastattn
from fastattn.integrations.transformers_sampling import (
    SampleProcessor,
    Sampling,
    generate,
    row_seeds,
    split_filters,
)

VOCAB, EOS, PAD = 97, 5, 0
PROMPTS = [[11, 12, 13, 14, 15, 16, 17], [21, 22, 23], [31, 32, 33, 34, 31]]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    if request.param == "gpt2":
        config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        made: Any = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64,
        )  # fmt: skip
        made = LlamaForCausalLM(config)
    for weight in made.parameters():  # far from uniform
        weight.data *= 6.0
    made.generation_config.pad_token_id = PAD
    return made.eval()


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """Left-padded input_ids and attention_mask, (batch, seqlen)."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def plain_loop(model: Any, prompt: list[int], steps: int, seed: int, **options: Any) -> list[int]:
    """One prompt without a cache: the model, the public sample, append. Penalties by dense counts."""
    ids = list(prompt)
    penalised = any(name.endswith("penalty") for name in options)
    for _ in range(steps):
        logits = model(torch.tensor([ids])).logits[:, -1].float()
        if penalised:
            counts, seen = torch.zeros(1, VOCAB, dtype=torch.int64), torch.zeros(1, VOCAB, dtype=torch.bool)
            seen[0, prompt] = True
            for token in ids[len(prompt) :]:
                counts[0, token] += 1
            options = options | {"token_counts": counts, "prompt_mask": seen}
        ids.append(int(fastattn.sample(logits, seeds=seed, positions=len(ids), **options)))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


def new_tokens(sequences: Tensor, prompt_length: int) -> list[list[int]]:
    """What was generated, up to and with EOS."""
    rows = [row[prompt_length:].tolist() for row in sequences]
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.4, "min_p": 0.05},
    {"top_k": 30, "repetition_penalty": 1.4},
    {"top_p": 0.95, "repetition_penalty": 1.2, "presence_penalty": 0.6, "frequency_penalty": 0.4},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_generate_is_the_plain_loop(model: Any, options: dict[str, Any]) -> None:
    """A batch with padding gives each prompt the text that it gets alone."""
    inputs, seeds, steps = padded(PROMPTS), [3, 4, 2**62], 12
    theirs = {"top_k": 0} | options
    made = generate(
        model, **inputs, do_sample=True, seeds=seeds, max_new_tokens=steps, eos_token_id=EOS, **theirs
    )
    texts = new_tokens(made, inputs["input_ids"].shape[1])
    assert texts == [plain_loop(model, p, steps, s, **options) for p, s in zip(PROMPTS, seeds)]
    assert len({tuple(text) for text in texts}) == 3
    for prompt, seed, text in zip(PROMPTS, seeds, texts):
        alone = generate(
            model,
            torch.tensor([prompt]),
            do_sample=True,
            seeds=seed,
            max_new_tokens=steps,
            eos_token_id=EOS,
            **theirs,
        )
        assert new_tokens(alone, len(prompt)) == [text]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_processor_does_the_same(model: Any, options: dict[str, Any], do_sample: bool) -> None:
    """Whether the rest of the loop takes the largest logit or draws: there is one."""
    inputs = padded(PROMPTS)
    common = {"max_new_tokens": 10, "eos_token_id": EOS}
    processor = SampleProcessor(seeds=[3, 4, 5], attention_mask=inputs["attention_mask"], **options)
    made = model.generate(
        **inputs, **common, do_sample=do_sample, logits_processor=LogitsProcessorList([processor]), top_k=0
    )
    expected = generate(
        model, **inputs, **common, do_sample=True, seeds=[3, 4, 5], **({"top_k": 0} | options)
    )
    assert torch.equal(made, expected)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}])
def test_greedy_is_transformers_greedy(model: Any, options: dict[str, Any]) -> None:
    inputs = padded(PROMPTS)
    common = {**inputs, "do_sample": False, "max_new_tokens": 15, **options}
    assert torch.equal(generate(model, **common), model.generate(**common))


def test_the_config_s_parameters_hold(model: Any) -> None:
    """Those of the GenerationConfig, unless the call has others."""
    inputs = padded(PROMPTS[:1])
    config = model.generation_config
    before = (config.do_sample, config.temperature, config.top_k)
    try:
        config.do_sample, config.temperature, config.top_k = True, 0.6, 7
        made = generate(model, **inputs, seeds=1, max_new_tokens=10)
        other = generate(model, **inputs, seeds=1, max_new_tokens=10, temperature=3.0, top_k=0)
    finally:
        config.do_sample, config.temperature, config.top_k = before
    assert made[0, len(PROMPTS[0]) :].tolist() == plain_loop(
        model, PROMPTS[0], 10, 1, temperature=0.6, top_k=7
    )
    assert other[0, len(PROMPTS[0]) :].tolist() == plain_loop(model, PROMPTS[0], 10, 1, temperature=3.0)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01}])
def test_frequencies_are_transformers(model: Any, options: dict[str, Any]) -> None:
    """The first token of 50,000 sequences, against the distribution that transformers itself draws from."""
    draws = 50_000
    ids = torch.tensor([PROMPTS[0]])
    theirs = {"top_k": 0} | options
    given = model.generate(
        ids, do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True, **theirs
    ).scores[0][0]  # (vocab,)
    expected = given.double().softmax(0).numpy()
    made = generate(
        model, ids, do_sample=True, max_new_tokens=1, num_return_sequences=draws, seeds=17, **theirs
    )
    assert oracle.g_test(made[:, -1].numpy(), expected / expected.sum()) > 0.001
    step = plain_loop(model, PROMPTS[0], 1, 17 + 4, **options)
    assert int(made[4, -1]) == step[0]  # the fifth sequence has the fifth seed


def test_other_processors_stay(model: Any) -> None:
    inputs = padded(PROMPTS)
    banned = list(range(40, VOCAB))
    made = generate(
        model, **inputs, do_sample=True, seeds=1, max_new_tokens=15, top_k=0, suppress_tokens=banned,
        repetition_penalty=1.3, min_new_tokens=15, eos_token_id=EOS,
    )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
    assert made.shape[1] == 15
    assert not set(made.flatten().tolist()) & {*banned, EOS}


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamer_and_dictionary(model: Any) -> None:
    streamer = Collect()
    made = generate(
        model, torch.tensor([PROMPTS[0]]), do_sample=True, seeds=2, max_new_tokens=6, streamer=streamer,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    assert streamer.ended
    assert streamer.got == [PROMPTS[0], *([t] for t in made.sequences[0, len(PROMPTS[0]) :].tolist())]
    for token, scores, logits in zip(made.sequences[0, len(PROMPTS[0]) :], made.scores, made.logits):
        assert torch.isfinite(scores).nonzero().tolist() == [[0, int(token)]]
        assert scores[0, token] == logits[0, token]


def test_fresh_seeds_follow_torch(model: Any) -> None:
    inputs = padded(PROMPTS) | {"do_sample": True, "max_new_tokens": 8, "top_k": 0, "temperature": 3.0}

    def once() -> Tensor:
        torch.manual_seed(5)
        return generate(model, **inputs)

    first = once()
    assert torch.equal(once(), first)
    assert not torch.equal(generate(model, **inputs), first)
    processor = SampleProcessor(temperature=3.0)
    texts = [
        model.generate(**padded(PROMPTS), do_sample=False, max_new_tokens=8, logits_processor=[processor])
        for _ in range(2)
    ]
    assert not torch.equal(*texts)


def test_encoder_decoder() -> None:
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=PAD
    )
    t5 = T5ForConditionalGeneration(config).eval()
    inputs = padded(PROMPTS)
    seeds = [1, 2, 3]
    made = generate(t5, **inputs, do_sample=True, top_k=0, seeds=seeds, max_new_tokens=8)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, seeds)):
        ids = [PAD]
        for _ in range(8):
            with torch.inference_mode():
                out = t5(
                    input_ids=inputs["input_ids"][row : row + 1], decoder_input_ids=torch.tensor([ids]),
                    attention_mask=inputs["attention_mask"][row : row + 1],
                )  # fmt: skip
            ids.append(int(fastattn.sample(out.logits[:, -1], seeds=seed, positions=len(ids))))
        assert made[row, : len(ids)].tolist()[: ids.index(1) + 1 if 1 in ids else None] == (
            ids[: ids.index(1) + 1] if 1 in ids else ids
        ), prompt


def test_seeds_of_sequences() -> None:
    assert row_seeds(7, 6, 3).tolist() == [7, 8, 9, 7, 8, 9]
    assert row_seeds([10, 20], 6, 3).tolist() == [10, 11, 12, 20, 21, 22]
    assert row_seeds(torch.arange(6), 6, 3).tolist() == list(range(6))
    assert len(set(row_seeds(None, 1000, 1).tolist())) == 1000
    with pytest.raises(
        ValueError, match="seeds: expected one number, or one for each of 2 prompts or 6 sequences, got 3"
    ):
        row_seeds([1, 2, 3], 6, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_beams": 2}, "custom_generate: expected sampling or greedy search, got beam_search"),
        ({"do_sample": True, "typical_p": 0.9}, "nothing like TypicalLogitsWarper"),
        ({"do_sample": True, "temperature": 0.5, "epsilon_cutoff": 0.1}, "got TemperatureLogitsWarper.*, EpsilonLogitsWarper"),
        ({"do_sample": True, "seeds": [1, 2]}, "seeds: expected one number"),
        ({"do_sample": True, "assistant_model": "anything"}, "assistant_model: expected None"),
    ],
)  # fmt: skip
def test_what_has_no_equivalent_is_refused(model: Any, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, **padded(PROMPTS), max_new_tokens=3, **({"top_k": 0} | call))


def test_filters_in_another_order_are_refused() -> None:
    with pytest.raises(ValueError, match="in this order, got TopPLogitsWarper, TopKLogitsWarper"):
        split_filters(LogitsProcessorList([TopPLogitsWarper(0.5), TopKLogitsWarper(5)]))
    with pytest.raises(ValueError, match="got TopPLogitsWarper"):
        split_filters(LogitsProcessorList([TopPLogitsWarper(0.5, min_tokens_to_keep=2)]))


def test_a_bad_row_is_named(model: Any) -> None:
    def ruin(_: Tensor, scores: Tensor) -> Tensor:
        scores[1, 3] = math.nan
        return scores

    with pytest.raises(ValueError, match="logits: row 1 has NaN"):
        generate(
            model,
            **padded(PROMPTS),
            do_sample=True,
            max_new_tokens=3,
            logits_processor=LogitsProcessorList([ruin]),
        )


def test_custom_generate_takes_it(model: Any) -> None:
    inputs = padded(PROMPTS)
    common = {"do_sample": True, "max_new_tokens": 6, "top_k": 9}
    made = model.generate(**inputs, **common, custom_generate=Sampling(seeds=8))
    assert torch.equal(made, generate(model, **inputs, **common, seeds=8))
    assert np.unique(made[:, -6:].numpy()).size > 3

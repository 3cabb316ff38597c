"""Whole models of transformers, random weights: a forward pass and a training step with each way to attend.

One model object serves all ways; switching between them happens outside the clock, and the calls take turns. The
default is what transformers chooses when nothing is said. BLOOM and LLaMA have four layers of the real width, so that
a step takes seconds, and every model 8192 tokens of vocabulary, so that it is layers that are timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import alternate, environment

from fastattn.integrations.transformers import disable, enable

VOCAB = 8192
SEQLENS = (512, 2048)
OURS = "fastattn"


@dataclass(frozen=True)
class Model:
    """A published shape."""

    name: str
    model_class: str
    config_class: str
    settings: dict[str, Any]
    seq2seq: bool = False


MODELS = (
    Model("BERT-base", "BertForMaskedLM", "BertConfig", {"max_position_embeddings": 2048}),
    Model("T5-small", "T5ForConditionalGeneration", "T5Config", {}, seq2seq=True),
    Model("GPT-2", "GPT2LMHeadModel", "GPT2Config", {"n_positions": 2048}),
    Model("BLOOM-560M, 4 layers", "BloomForCausalLM", "BloomConfig", {"hidden_size": 1024, "n_layer": 4, "n_head": 16}),
    Model(
        "Llama-3.2-1B, 4 layers", "LlamaForCausalLM", "LlamaConfig",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 2048, "rope_theta": 500000.0},
    ),
)  # fmt: skip
TINY = {
    "BertConfig": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "T5Config": {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    "GPT2Config": {"n_embd": 64, "n_layer": 1, "n_head": 2},
    "BloomConfig": {"hidden_size": 64, "n_layer": 1, "n_head": 2},
    "LlamaConfig": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "head_dim": 32},
}  # fmt: skip


def build(model: Model, quick: bool) -> Any:
    """Random weights, no dropout, eval mode: what is timed is the same work every time."""
    import transformers

    settings = {**model.settings, **(TINY[model.config_class] if quick else {}), "vocab_size": VOCAB}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, model.config_class)(**settings, **tokens)
    return getattr(transformers, model.model_class)(config).eval()


def given(model: Model, seqlen: int) -> dict[str, Any]:
    """One sequence, and what it should become."""
    ids = torch.randint(3, VOCAB, (1, seqlen), generator=torch.Generator().manual_seed(1))
    extra = {"decoder_input_ids": ids} if model.seq2seq else {}
    return {"input_ids": ids, "labels": ids, "use_cache": False, **extra}


def ways(instance: Any) -> tuple[str, dict[str, Callable[[], None]]]:
    """The default's name, and by name how to switch to each way that this model has."""
    default = instance.config._attn_implementation

    def theirs(name: str) -> Callable[[], None]:
        def switch() -> None:
            if getattr(instance, "switched_to", None) == OURS:
                disable(instance)
            if instance.config._attn_implementation != name:
                instance.set_attn_implementation(name)
            instance.switched_to = name

        return switch

    def ours() -> None:
        if getattr(instance, "switched_to", None) != OURS:
            enable(instance)
        instance.switched_to = OURS

    names = [default, *(["sdpa"] if instance._supports_sdpa else []), "eager"]
    found = {name: theirs(name) for name in dict.fromkeys(names)}
    return default, {OURS: ours, **found}


def model_rows(model: Model, seqlen: int, quick: bool) -> list[dict[str, Any]]:
    """Forward and training, and how far our logits are from the default's."""
    instance, inputs = build(model, quick), given(model, seqlen)
    if "use_cache" in inputs and model.config_class == "BertConfig":
        del inputs["use_cache"]
    default, switches = ways(instance)

    def forward() -> Any:
        with torch.inference_mode():
            return instance(**inputs).logits

    def training() -> None:
        instance.zero_grad()
        instance(**inputs).loss.backward()

    logits = {}
    for name in (OURS, default):
        switches[name]()
        logits[name] = forward()
    error = (logits[OURS] - logits[default]).abs().max() / logits[default].abs().max()
    rows = []
    for what, call in (("forward", forward), ("training", training)):
        seconds = alternate(
            dict.fromkeys(switches, call), 0.0 if quick else 8.0, 1 if quick else 3, before=switches
        )
        others = {who: t for who, t in seconds.items() if who != OURS}
        best = min(others, key=lambda who: others[who]["min"])
        rows.append(
            {"model": model.name, "seqlen": seqlen, "what": what, "default": default, "seconds": seconds, "best": best,
             "speedup": others[default]["min"] / seconds[OURS]["min"],
             "speedup_median": others[default]["median"] / seconds[OURS]["median"],
             "speedup_best": others[best]["min"] / seconds[OURS]["min"], "error": error.item()}
        )  # fmt: skip
    return rows


def geometric_mean(values: list[float]) -> float:
    """Of speed-ups."""
    return math.exp(sum(map(math.log, values)) / len(values))


def bench_models(quick: bool) -> dict[str, Any]:
    """Every model at every length; a quick run is of tiny ones, for development."""
    start, rows = environment(), []
    for model in MODELS:
        for seqlen in (32,) if quick else SEQLENS:
            for row in model_rows(model, seqlen, quick):
                rows.append(row)
                times = ", ".join(f"{who} {t['min'] * 1e3:.1f} ms" for who, t in row["seconds"].items())
                print(
                    f"{row['model']}, {seqlen} tokens, {row['what']}: {times}: {row['speedup']:.2f}x",
                    flush=True,
                )
    mean = geometric_mean([row["speedup"] for row in rows])
    slower = [f"{r['model']}, {r['seqlen']}, {r['what']}" for r in rows if r["speedup_best"] < 1]
    print(f"geometric mean {mean:.2f}x the default; slower than another way: {', '.join(slower) or 'none'}")
    return {"environment": start, "rows": rows, "geometric_mean": mean}

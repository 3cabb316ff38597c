"""Whole models of transformers, random weights: a forward pass and a training step with each way to attend.

One model object serves all ways; switching between them happens outside the clock, and the calls take turns. The
default is what transformers chooses when nothing is said. "free" is the limit of all ways, where the model goes through
transformers' interface: attention that returns its queries and costs nothing. Layers have the published width, but are
fewer, so that a row takes a minute, and the vocabulary is one of 8192, so that it is layers that are timed.

A row is called ``dtype:model:seqlen:forward`` or ``:training``; ``--only`` takes beginnings of such names, and with
``--save`` the other rows stay as they were saved: a machine that is shared can be had to oneself for one row at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import alternate, environment

from fastattn.integrations.transformers import disable, enable

VOCAB = 8192
SEQLENS = (512, 2048)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS, FREE = "fastattn", "free"


@dataclass(frozen=True)
class Model:
    """A published shape, with as many of its layers as make a row of each length last a minute."""

    name: str
    model_class: str
    config_class: str
    layers: tuple[str, tuple[int, int]]  # the setting's name, and how many at each of SEQLENS
    settings: dict[str, Any]
    seq2seq: bool = False


MODELS = (
    Model(
        "BERT-base", "BertForMaskedLM", "BertConfig", ("num_hidden_layers", (6, 2)), {"max_position_embeddings": 2048}
    ),
    Model("T5-small", "T5ForConditionalGeneration", "T5Config", ("num_layers", (6, 2)), {}, seq2seq=True),
    Model("GPT-2", "GPT2LMHeadModel", "GPT2Config", ("n_layer", (6, 2)), {"n_positions": 2048}),
    Model("BLOOM-560M", "BloomForCausalLM", "BloomConfig", ("n_layer", (4, 2)), {"hidden_size": 1024, "n_head": 16}),
    Model(
        "Llama-3.2-1B", "LlamaForCausalLM", "LlamaConfig", ("num_hidden_layers", (2, 1)),
        {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 64, "max_position_embeddings": 2048, "rope_theta": 500000.0},
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


def build(model: Model, layers: int, dtype: str, quick: bool) -> Any:
    """Random weights, no dropout, eval mode: what is timed is the same work every time."""
    import transformers

    sizes = {**model.settings, model.layers[0]: layers}
    settings = {**sizes, **(TINY[model.config_class] if quick else {}), "vocab_size": VOCAB}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, model.config_class)(**settings, **tokens)
    return getattr(transformers, model.model_class)(config).to(DTYPES[dtype]).eval()


def given(model: Model, seqlen: int) -> dict[str, Any]:
    """One sequence, and what it should become."""
    ids = torch.randint(3, VOCAB, (1, seqlen), generator=torch.Generator().manual_seed(1))
    answer = ids[:, : seqlen // 4] if model.seq2seq else ids  # a translation or summary is the shorter one
    extra = {"decoder_input_ids": answer} if model.seq2seq else {}
    return {"input_ids": ids, "labels": answer, "use_cache": False, **extra}


def register_free() -> None:
    """Attention and masks that cost nothing, under a name of transformers' interfaces."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(module: Any, q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> tuple[Any, None]:
        return q.transpose(1, 2), None  # (batch, seqlen_q, nheads, headdim)

    AttentionInterface.register(FREE, attend)
    AttentionMaskInterface.register(FREE, lambda *args, **more: None)


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

    through_interface = ["sdpa", FREE] if instance._supports_sdpa else []
    names = [default, *through_interface, "eager"]
    found = {name: theirs(name) for name in dict.fromkeys(names)}
    return default, {OURS: ours, **found}


WORKS = ("forward", "training")


def model_rows(model: Model, seqlen: int, dtype: str, works: list[str], quick: bool) -> list[dict[str, Any]]:
    """Forward or training or both, and how far our logits are from the default's."""
    layers = dict(zip(SEQLENS, model.layers[1])).get(seqlen, 1)
    instance, inputs = build(model, layers, dtype, quick), given(model, seqlen)
    if model.config_class == "BertConfig":
        del inputs["use_cache"]
    register_free()
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
    for what in works:
        call = {"forward": forward, "training": training}[what]
        seconds = alternate(
            dict.fromkeys(switches, call), *((0.0, 1) if quick else (15.0, 5)), before=switches
        )
        others = {who: t for who, t in seconds.items() if who not in (OURS, FREE)}
        best = min(others, key=lambda who: others[who]["min"])
        rows.append(
            {"model": model.name, "seqlen": seqlen, "dtype": dtype, "layers": layers, "what": what,
             "default": default, "seconds": seconds, "best": best,
             "speedup": others[default]["min"] / seconds[OURS]["min"],
             "speedup_median": others[default]["median"] / seconds[OURS]["median"],
             "speedup_best": others[best]["min"] / seconds[OURS]["min"],
             "limit": others[default]["min"] / seconds[FREE]["min"] if FREE in seconds else None,
             "error": error.item()}
        )  # fmt: skip
    return rows


def geometric_mean(values: list[float]) -> float:
    """Of speed-ups."""
    return math.exp(sum(map(math.log, values)) / len(values))


def name_of(row: dict[str, Any]) -> str:
    """As ``--only`` has it."""
    return f"{row['dtype']}:{row['model']}:{row['seqlen']}:{row['what']}"


def bench_models(quick: bool, only: list[str], saved: dict[str, Any] | None) -> dict[str, Any]:
    """Every model at every length, or those of ``only``, and of ``saved`` the rest; a quick run is of tiny ones."""
    start, rows = environment(), {name_of(row): row for row in (saved or {"rows": []})["rows"]}
    names = []
    for dtype, model, seqlen in itertools.product(DTYPES, MODELS, (32,) if quick else SEQLENS):
        all_works = {f"{dtype}:{model.name}:{seqlen}:{what}": what for what in WORKS}
        names += all_works
        works = [what for name, what in all_works.items() if not only or name.startswith(tuple(only))]
        for row in model_rows(model, seqlen, dtype, works, quick) if works else []:
            rows[name_of(row)] = row
            times = ", ".join(f"{who} {t['min'] * 1e3:.1f} ms" for who, t in row["seconds"].items())
            print(f"{name_of(row)}: {times}: {row['speedup']:.2f}x", flush=True)
    kept = [rows[name] for name in names if name in rows]
    speedups = {
        name: [r["speedup"] for r in kept if name in ("all", r["dtype"])] for name in ("all", *DTYPES)
    }
    means = {name: geometric_mean(x) for name, x in speedups.items() if x}
    slower = [name_of(row) for row in kept if row["speedup_best"] < 1]
    missing = [name for name in names if name not in rows]
    told = ", ".join(f"{mean:.2f}x ({name})" for name, mean in means.items())
    print(f"geometric means over the default: {told}; slower than another way: {', '.join(slower) or 'none'}")
    if missing:
        print(f"not measured yet: {', '.join(missing)}")
    return {"environment": start, "rows": kept, "geometric_means": means}

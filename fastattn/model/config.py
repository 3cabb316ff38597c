"""What a model is (``ModelConfig``), and typed access to the key/values that say so (``Fields``).

An architecture maps its keys once, ``{field: (key in config.json, key in GGUF metadata)}``, and
``read_sizes`` does the rest. Every message names the file, the key and, in GGUF, where the value is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

from fastattn.args import MAX_HEADDIM
from fastattn.model.weights import ModelFileError, TensorSource

MAX_INT = 2**31 - 1

# The names that files use, and ours (fused.ACTIVATIONS).
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# ModelConfig field: key in GGUF metadata, behind the architecture's name.
GGUF_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "nlayers": "block_count",
    "nheads": "attention.head_count",
    "nheads_k": "attention.head_count_kv",
    "headdim": "attention.key_length",
    "ffn_size": "feed_forward_length",
    "max_seqlen": "context_length",
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies stretch beyond the trained length, ``original_max_seqlen`` (``rope.frequencies``)."""

    kind: str  # "linear", "dynamic", "yarn" or "llama3"
    factor: float
    original_max_seqlen: int = 8192
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # of rotated q and k alike, so that scores grow by its square


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding (RoFormer, arXiv 2104.09864) of the first ``rotary_dim`` dimensions of q and k."""

    base: float
    rotary_dim: int
    scaling: RopeScaling | None = None
    stored_as_pairs: bool = False  # a pair's rows lie side by side, as in GPT-J and in GGUF's llama


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and constants of a decoder-only model."""

    arch: str  # a key of registry.ARCHITECTURES
    vocab_size: int
    hidden_size: int
    nlayers: int
    nheads: int
    nheads_k: int  # KV heads; divides nheads
    headdim: int
    ffn_size: int
    max_seqlen: int  # positions
    norm_eps: float
    rope: RopeConfig | None  # None: learned absolute positions, or ALiBi
    tie_embeddings: bool  # the LM head is the token embedding
    activation: str  # a key of fused.ACTIVATIONS
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    alibi: bool = False  # scores fall linearly with the distance
    parallel: bool = False  # attention and MLP of a layer read the same x
    qkv_grouped: bool = (
        False  # the file keeps each KV head's queries, key and value together, as Megatron does
    )
    softmax_scale: float | None = None  # None: 1 / sqrt(headdim)
    attn_softcap: float = 0.0  # of attention scores; 0: none
    logit_softcap: float = 0.0  # of the logits; 0: none
    embedding_scale: float = 1.0  # of token vectors on their way in
    norm_offset: float = 0.0  # added to RMSNorm's weights as the file has them
    window: int = 0  # tokens that one sees in local layers, itself included; 0: no layer is local
    local_layers: tuple[int, ...] = ()  # the layers with that window
    local_rope: RopeConfig | None = None  # of local layers; None: as in the others


class Fields:
    """Key/values of one file, read with a type and a range. A null counts as missing, as in transformers.

    Args:
        path: the file, for messages.
        values: key -> value.
        offsets: key -> byte offset in the file, where there is such a thing.
        prefix: of nested objects, for messages: "rope_parameters."
    """

    def __init__(
        self,
        path: Path,
        values: Mapping[str, Any],
        offsets: Mapping[str, int] | None = None,
        prefix: str = "",
    ) -> None:
        self.path = path
        self.values = values
        self.offsets = offsets or {}
        self.prefix = prefix

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def first(self, *keys: str) -> str:
        """Of several names for one value the one that is there; the first of them if none is."""
        return next((key for key in keys if self.has(key)), keys[0])

    def fail(self, key: str, problem: str) -> NoReturn:
        """ModelFileError about this key."""
        raise ModelFileError(self.path, f"key '{self.prefix}{key}': {problem}", self.offsets.get(key))

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_INT) -> int:
        """An int in [low, high]; required unless a default is given."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fail(key, f"expected an integer in [{low}, {high}], got {shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite float > 0; required unless a default is given."""
        value = self._get(key, default)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        # float() of a JSON integer with hundreds of digits overflows: compare it as it is.
        if not is_number or not 0 < value <= 1e30 or not math.isfinite(value):
            self.fail(key, f"expected a number > 0, got {shown(value)}")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string; required unless a default is given."""
        value = self._get(key, default)
        if not isinstance(value, str):
            self.fail(key, f"expected a string, got {shown(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A bool."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"expected true or false, got {shown(value)}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them; () if missing."""
        if not self.has(key):
            return ()
        value = self.values[key]
        ids = value if isinstance(value, list) else [value]
        for i in ids:
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= MAX_INT:
                self.fail(key, f"expected token ids in [0, {MAX_INT}], got {shown(value)}")
        return tuple(ids)

    def nested(self, key: str) -> Fields:
        """The object under this key; empty if missing."""
        value = self.values[key] if self.has(key) else {}
        if not isinstance(value, dict):
            self.fail(key, f"expected an object, got {shown(value)}")
        return Fields(self.path, value, prefix=f"{self.prefix}{key}.")

    def require(self, key: str, wanted: Any, default: Any) -> None:
        """The model is supported only where this key has one value."""
        value = self._get(key, default)
        if value != wanted:
            self.fail(key, f"only {wanted!r} is supported, got {shown(value)}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            self.fail(key, "missing")
        return default


def shown(value: Any) -> str:
    """A value for a message, kept short: it comes from a file that may be hostile."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value[:8] if isinstance(value, (str, list)) and len(value) > 40 else value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_sizes(fields: Fields, keys: Mapping[str, str], **defaults: int) -> dict[str, Any]:
    """The integer fields of ``ModelConfig`` that every architecture has, checked against each other.

    Args:
        fields: the file's key/values.
        keys: ModelConfig field -> key; without ``nheads_k`` and ``headdim`` where the architecture has none.
        defaults: for keys that the file may lack.
    """
    required = ("vocab_size", "hidden_size", "nlayers", "nheads", "ffn_size", "max_seqlen")
    sizes = {name: fields.integer(keys[name], defaults.get(name)) for name in required}
    hidden_size, nheads = sizes["hidden_size"], sizes["nheads"]

    sizes["nheads_k"] = fields.integer(keys["nheads_k"], nheads) if "nheads_k" in keys else nheads
    if nheads % sizes["nheads_k"]:
        wanted = f"expected a divisor of {keys['nheads']}={nheads}"
        fields.fail(keys["nheads_k"], f"{wanted}, got {sizes['nheads_k']}")

    if "headdim" in keys and (fields.has(keys["headdim"]) or "headdim" in defaults):
        sizes["headdim"] = fields.integer(keys["headdim"], defaults.get("headdim"), high=MAX_HEADDIM)
    elif hidden_size % nheads or hidden_size // nheads > MAX_HEADDIM:
        wanted = f"expected a divisor of {keys['hidden_size']}={hidden_size}"
        fields.fail(keys["nheads"], f"{wanted} that leaves at most {MAX_HEADDIM}, got {nheads}")
    else:
        sizes["headdim"] = hidden_size // nheads
    return sizes


def read_hf(
    config: Fields, generation_config: Fields, keys: Mapping[str, str], **defaults: int
) -> dict[str, Any]:
    """What every config.json says: sizes (``read_sizes``) and the ids of special tokens, fields of ModelConfig."""
    bos_id, eos_ids = read_hf_ids(config, generation_config)
    return {**read_sizes(config, keys, **defaults), "bos_id": bos_id, "eos_ids": eos_ids}


def read_gguf(fields: Fields, source: TensorSource, arch: str) -> dict[str, Any]:
    """What every GGUF file says: sizes, ids of special tokens, whether it has a head; fields of ModelConfig.

    Without a vocab_size the embedding's rows count; without a head it is tied.
    """
    shapes = source.shapes()
    rows = shapes.get("token_embd.weight", (0,))[0]
    keys = {field: f"{arch}.{key}" for field, key in GGUF_SIZES.items()}
    sizes = read_sizes(fields, keys, **({"vocab_size": rows} if rows else {}))
    fields.require(f"{arch}.attention.value_length", sizes["headdim"], sizes["headdim"])
    bos_id, eos_ids = read_gguf_ids(fields)
    tied = "output.weight" not in shapes
    return {**sizes, "bos_id": bos_id, "eos_ids": eos_ids, "tie_embeddings": tied}


def read_activation(fields: Fields, key: str, default: str) -> str:
    """Our name of the activation function."""
    name = fields.text(key, default)
    if name not in ACTIVATION_NAMES:
        fields.fail(key, f"expected one of {', '.join(ACTIVATION_NAMES)}, got {shown(name)}")
    return ACTIVATION_NAMES[name]


def read_rotary_dim(fields: Fields, key: str, default: int, headdim: int) -> int:
    """How many dimensions turn: even, at most headdim."""
    rotary_dim = fields.integer(key, default, low=2, high=MAX_HEADDIM)
    if rotary_dim % 2 or rotary_dim > headdim:
        fields.fail(key, f"expected an even number of at most headdim={headdim}, got {rotary_dim}")
    return rotary_dim


def read_hf_ids(config: Fields, generation_config: Fields) -> tuple[int | None, tuple[int, ...]]:
    """(bos_id, eos_ids); generation_config.json has the last word, as in transformers' generate."""
    bos = generation_config.token_ids("bos_token_id") or config.token_ids("bos_token_id")
    eos = generation_config.token_ids("eos_token_id") or config.token_ids("eos_token_id")
    return (bos[0] if bos else None), eos


def read_gguf_ids(fields: Fields) -> tuple[int | None, tuple[int, ...]]:
    """(bos_id, eos_ids): end of sequence, of turn and of message all end a generation."""
    bos = fields.token_ids("tokenizer.ggml.bos_token_id")
    eos = [i for kind in ("eos", "eot", "eom") for i in fields.token_ids(f"tokenizer.ggml.{kind}_token_id")]
    return (bos[0] if bos else None), tuple(dict.fromkeys(eos))

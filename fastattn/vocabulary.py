"""What a model's files say about tokens: a tokenizer.json with its config, or the metadata of a GGUF file."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.model.config import Fields
from fastattn.model.weights import ModelFileError

# tokenizer.ggml.token_type
CONTROL, USER_DEFINED = 3, 4

# Control tokens that end a turn in one chat format or another: they end a text where a file does not say so too.
TURN_ENDS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")

# How a vocabulary spells bytes; "other" ones only the tokenizers package can decode.
BYTE_LEVEL, SENTENCEPIECE, OTHER = "byte-level", "sentencepiece", "other"


@dataclass(frozen=True)
class Vocabulary:
    """A ``tokenizers.Tokenizer`` and what it does not know about itself."""

    backend: Any
    bos_id: int | None = None  # starts a sequence
    eos_ids: tuple[int, ...] = ()  # end one
    add_bos: bool = False  # whether a text is to start with bos_id
    chat_template: str | None = None  # Jinja source
    spelling: str = BYTE_LEVEL
    space_prefix: bool = False  # encoding puts a space before the text; decoding is to take it away


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut into words before BPE merges within them."""

    patterns: tuple[str, ...] = ()  # each cuts what the one before left, (): as GPT-2 does
    split_digits: bool = False  # every digit on its own, before the patterns
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges say
    add_bos: bool = False  # where the file does not say


def _contractions_words_numbers(numbers: str) -> str:
    """The pattern that Llama 3 and Qwen 2 share but for how they cut numbers."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA3 = PreTokenizer((_contractions_words_numbers(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PUNCTUATION = r"[\p{P}$+<=>^~|`]+"

# tokenizer.ggml.pre
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "default": PreTokenizer(),
    "smollm": PreTokenizer(split_digits=True),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": PreTokenizer((_contractions_words_numbers(r"\p{N}"),)),
    "olmo": PreTokenizer(),  # GPT-NeoX's too
    "phi-2": PreTokenizer(),
    "bloom": PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    "falcon": PreTokenizer((_PUNCTUATION, _GPT2, "[0-9]{3}")),
}


def from_folder(tokenizer_json: Path, metadata: dict[str, Any]) -> Vocabulary:
    """From a Hugging Face folder: tokenizer.json, and ``metadata["tokenizer_config"]``.

    Raises:
        ModelFileError: one of them is broken.
        ImportError: the package 'tokenizers' is not installed.
    """
    config = Fields(tokenizer_json.with_name("tokenizer_config.json"), metadata.get("tokenizer_config", {}))
    package = _tokenizers()
    try:
        backend = package.Tokenizer.from_buffer(tokenizer_json.read_bytes())
    except Exception as error:  # the package raises bare Exception
        raise ModelFileError(tokenizer_json, f"not a tokenizer: {error}") from error
    bos_id = _id_of(backend, config.values.get("bos_token"))
    eos_id = _id_of(backend, config.values.get("eos_token"))
    # What the file's own post-processor puts around an empty text; an EOS there would end the prompt.
    around = [i for i in backend.encode("").ids if i != eos_id or i == bos_id]
    first = around[0] if around else None
    decoder = _decoder_steps(backend)
    return Vocabulary(
        backend,
        bos_id=first if bos_id is None else bos_id,
        eos_ids=() if eos_id is None else (eos_id,),
        add_bos=config.flag("add_bos_token", first is not None and bos_id in (None, first)),
        chat_template=_folder_template(config),
        spelling=_spelling(decoder),
        space_prefix=_strips_space(decoder),
    )


def from_gguf(path: Path, metadata: dict[str, Any]) -> Vocabulary:
    """From the ``tokenizer.*`` key/values of a GGUF file.

    Byte-level vocabularies ("gpt2") become BPE with the file's merges. SentencePiece ones ("llama") become
    BPE with byte fallback, its merges derived from the scores: joining the two neighbours whose union scores
    best, as SentencePiece does, is applying the merges in the order of the score of what they make.

    Raises:
        ModelFileError: a key is missing, broken, or of a kind that is not supported.
        ImportError: the package 'tokenizers' is not installed.
    """
    fields = Fields(path, metadata)
    tokens = _strings(fields, "tokenizer.ggml.tokens")
    kind = fields.text("tokenizer.ggml.model")
    if kind == "gpt2":
        pre = _pre_tokenizer(fields)
        backend, spelling, space_prefix = _byte_level(fields, tokens, pre), BYTE_LEVEL, False
    elif kind == "llama":
        pre = PreTokenizer(add_bos=True)
        space_prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
        backend, spelling = _sentencepiece(fields, tokens, space_prefix), SENTENCEPIECE
    else:
        fields.fail("tokenizer.ggml.model", f"expected 'gpt2' or 'llama', got {kind[:40]!r}")
    _add_tokens(fields, backend, tokens)
    bos = _ids(fields, "bos", len(tokens))
    eos = [i for name in ("eos", "eot", "eom") for i in _ids(fields, name, len(tokens))]
    eos += [i for i in map(backend.token_to_id, TURN_ENDS) if i in backend.get_added_tokens_decoder()]
    has_template = fields.has("tokenizer.chat_template")
    return Vocabulary(
        backend,
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(dict.fromkeys(eos)),
        add_bos=fields.flag("tokenizer.ggml.add_bos_token", pre.add_bos),
        chat_template=fields.text("tokenizer.chat_template") if has_template else None,
        spelling=spelling,
        space_prefix=space_prefix,
    )


def _byte_level(fields: Fields, tokens: list[str], pre: PreTokenizer) -> Any:
    tk = _tokenizers()
    key = "tokenizer.ggml.merges"
    merges = []
    for n, merge in enumerate(_strings(fields, key)):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            fields.fail(key, f"entry {n}: expected two tokens and a space between, got {merge[:40]!r}")
        merges.append((left, right))
    backend = tk.Tokenizer(_bpe(fields, tokens, merges, ignore_merges=pre.ignore_merges))
    pt = tk.pre_tokenizers
    steps = [pt.Digits(individual_digits=True)] if pre.split_digits else []
    steps += [pt.Split(tk.Regex(pattern), behavior="isolated") for pattern in pre.patterns]
    steps.append(pt.ByteLevel(add_prefix_space=False, use_regex=not pre.patterns))
    backend.pre_tokenizer = pt.Sequence(steps)
    return backend


def _sentencepiece(fields: Fields, tokens: list[str], space_prefix: bool) -> Any:
    tk = _tokenizers()
    scores = fields.values.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        fields.fail("tokenizer.ggml.scores", f"expected one number for each of the {len(tokens)} tokens")
    unknown = _ids(fields, "unknown", len(tokens))
    options = {"unk_token": tokens[unknown[0]]} if unknown else {}
    merges = list(_merges_of(tokens, scores))
    backend = tk.Tokenizer(_bpe(fields, tokens, merges, byte_fallback=True, fuse_unk=True, **options))
    prefix = [tk.normalizers.Prepend("▁")] if space_prefix else []
    backend.normalizer = tk.normalizers.Sequence([*prefix, tk.normalizers.Replace(" ", "▁")])
    return backend


def _merges_of(tokens: list[str], scores: list[float]) -> Iterator[tuple[str, str]]:
    """Every way to make a token from two others, the best scores first."""
    known = {token: i for i, token in enumerate(tokens)}
    for i in sorted(range(len(tokens)), key=lambda i: -scores[i]):
        token = tokens[i]
        splits = ((token[:n], token[n:]) for n in range(1, len(token)))
        yield from sorted((s for s in splits if s[0] in known and s[1] in known), key=lambda s: known[s[0]])


def _bpe(fields: Fields, tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Any:
    vocab: dict[str, int] = {}
    for i, token in enumerate(tokens):
        vocab.setdefault(token, i)  # of equal tokens the first counts
    try:
        return _tokenizers().models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the package raises bare Exception
        fields.fail("tokenizer.ggml.merges", str(error))


def _add_tokens(fields: Fields, backend: Any, tokens: list[str]) -> None:
    """Tokens that are found in the text before any merging: control tokens, and those that a user defined."""
    key = "tokenizer.ggml.token_type"
    types = fields.values.get(key, [])
    if not isinstance(types, list) or len(types) not in (0, len(tokens)):
        fields.fail(key, f"expected one for each of the {len(tokens)} tokens")
    token_of = _tokenizers().AddedToken

    def added(kind: int) -> list[Any]:
        chosen = [token for token, its_kind in zip(tokens, types) if its_kind == kind and token]
        return [token_of(token, special=kind == CONTROL, normalized=False) for token in chosen]

    backend.add_special_tokens(added(CONTROL))
    backend.add_tokens(added(USER_DEFINED))


def _pre_tokenizer(fields: Fields) -> PreTokenizer:
    key = "tokenizer.ggml.pre"
    if not fields.has(key):
        warnings.warn(f"{fields.path}: no key '{key}'; splitting words as gpt-2 does", stacklevel=2)
        return PRE_TOKENIZERS["gpt-2"]
    name = fields.text(key)
    if name not in PRE_TOKENIZERS:
        fields.fail(key, f"expected one of {', '.join(PRE_TOKENIZERS)}, got {name[:40]!r}")
    return PRE_TOKENIZERS[name]


def _strings(fields: Fields, key: str) -> list[str]:
    value = fields.values.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        fields.fail(key, "missing" if value is None else "expected a list of strings, not empty")
    return value


def _ids(fields: Fields, name: str, vocab_size: int) -> tuple[int, ...]:
    """The token ids under tokenizer.ggml.<name>_token_id, () if the file has none."""
    key = f"tokenizer.ggml.{name}_token_id"
    ids = fields.token_ids(key)
    if ids and max(ids) >= vocab_size:
        fields.fail(key, f"expected a token id below {vocab_size}, got {max(ids)}")
    return ids


def _id_of(backend: Any, token: Any) -> int | None:
    """Id of a token in tokenizer_config.json: a string, or an object with "content"."""
    content = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(content) if isinstance(content, str) else None


def _folder_template(config: Fields) -> str | None:
    """chat_template.jinja, or the key "chat_template": a string, or a list of named ones with a default."""
    own_file = config.path.with_name("chat_template.jinja")
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    value = config.values.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        config.fail("chat_template", f"expected a string or a list of named ones, got {type(value).__name__}")
    return value


def _decoder_steps(backend: Any) -> list[dict[str, Any]]:
    """The decoder of a tokenizer.json: its steps, as the file writes them."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    return list(state.get("decoders", [state]))


def _spelling(decoder: list[dict[str, Any]]) -> str:
    kinds = {step.get("type") for step in decoder}
    if "ByteLevel" in kinds:
        return BYTE_LEVEL
    replaces = any(s.get("type") == "Replace" and s.get("pattern") == {"String": "▁"} for s in decoder)
    return SENTENCEPIECE if replaces or "Metaspace" in kinds else OTHER


def _strips_space(decoder: list[dict[str, Any]]) -> bool:
    """Whether decoding takes away the space that encoding put before the text."""
    by_kind = {step.get("type"): step for step in decoder}
    strips = by_kind.get("Strip", {}).get("start", 0) > 0
    return bool(strips or by_kind.get("Metaspace", {}).get("prepend_scheme", "never") != "never")


def _tokenizers() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise ImportError("tokenizing needs 'tokenizers': pip install 'fastattn[model]'") from error

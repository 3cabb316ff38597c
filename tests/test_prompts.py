"""Few-shot prompts, their files, and chat templates in the sandbox."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from fastattn import prompts
from fastattn.prompts import PromptTemplate, chat_messages, few_shot, load_shots, render_chat

EXAMPLES = Path(__file__).parent.parent / "examples"
TRANSLATE = PromptTemplate(
    instruction="Translate.", input="EN: {input}", output=" FR: {output}", separator="\n"
)
USER = [{"role": "user", "content": "hi"}]


class TestFewShot:
    def test_nothing_to_add(self):
        assert few_shot("2 + 2 = ") == "2 + 2 = "

    def test_zero_one_and_two_examples(self):
        assert few_shot("cat", [], TRANSLATE) == "Translate.\nEN: cat FR:"
        assert few_shot("cat", [("dog", "chien")], TRANSLATE) == "Translate.\nEN: dog FR: chien\nEN: cat FR:"
        assert few_shot("3", [("1", "one"), ["2", "two"]]) == (
            "Input: 1\nOutput: one\n\nInput: 2\nOutput: two\n\nInput: 3\nOutput:"
        )

    def test_braces_in_the_texts_are_text(self):
        assert few_shot("{output} {x}", [("{input}", "{input}")], TRANSLATE) == (
            "Translate.\nEN: {input} FR: {input}\nEN: {output} {x} FR:"
        )

    def test_stop_strings(self):
        assert TRANSLATE.stops == ("\n",)
        assert PromptTemplate(stop=("END",)).stops == ("END",)
        assert PromptTemplate(separator="").stops == ()

    def test_patterns_need_their_field(self):
        with pytest.raises(ValueError, match=r"input: expected a pattern with one '{input}', got 'x'"):
            PromptTemplate(input="x")
        with pytest.raises(ValueError, match=r"output: expected a pattern with one '{output}'"):
            PromptTemplate(output="{output}{output}")

    @pytest.mark.parametrize("build", [few_shot, chat_messages])
    def test_what_is_no_prompt_and_no_shot(self, build):
        with pytest.raises(TypeError, match="prompt: expected a str, got int"):
            build(3)
        with pytest.raises(TypeError, match=r"shots: expected a list of \(input, output\) pairs, got str"):
            build("x", "ab")
        with pytest.raises(
            TypeError, match=r"shots\[1\]: expected a pair \(input, output\) of str, got \('c',\)"
        ):
            build("x", [("a", "b"), ("c",)])


class TestChatMessages:
    def test_shots_are_turns(self):
        assert chat_messages("cat", [("dog", "chien")], TRANSLATE, system="Be brief.") == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Translate.\nEN: dog"},
            {"role": "assistant", "content": "chien"},
            {"role": "user", "content": "Translate.\nEN: cat"},
        ]

    def test_without_a_template_texts_stay_as_they_are(self):
        assert chat_messages("hi") == USER

    def test_system_is_text(self):
        with pytest.raises(TypeError, match="system: expected a str, got int"):
            chat_messages("x", system=1)


class TestShotFiles:
    def write(self, folder, data) -> Path:
        path = folder / "shots.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    def test_the_one_in_the_examples(self):
        template, shots = load_shots(EXAMPLES / "summarise.json")
        assert len(shots) == 2
        text = few_shot((EXAMPLES / "dialogue.txt").read_text(), shots, template)
        assert text.startswith(
            "Summarise the dialogue in one sentence.\n\nDialogue:\nPriya: The printer on the second floor is jammed again."
        )
        assert text.endswith("\nSummary:")

    def test_all_keys(self, tmp_path):
        data = {
            "instruction": ["a", "b"],
            "input": "I{input}",
            "output": "O{output}",
            "separator": "|",
            "stop": [".", ["x", "y"]],
            "shots": [{"input": "1", "output": ["2", "3"]}],
        }
        template, shots = load_shots(self.write(tmp_path, data))
        assert template == PromptTemplate("a\nb", "I{input}", "O{output}", "|", (".", "x\ny"))
        assert shots == [("1", "2\n3")]

    def test_no_keys(self, tmp_path):
        assert load_shots(self.write(tmp_path, {})) == (PromptTemplate(), [])
        assert load_shots(self.write(tmp_path, {"stop": "."}))[0].stops == (".",)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("{", "shots.json: not a JSON file"),
            ("[" * 100_000, "shots.json: not a JSON file"),
            ([], "shots.json: expected a JSON object, got list"),
            ({"shot": []}, "shots.json: key 'shot': expected one of instruction, input"),
            ({"input": 3}, "shots.json: key 'input': expected a string or a list of lines, got int"),
            ({"input": "x"}, "shots.json: key input: expected a pattern with one '{input}', got 'x'"),
            ({"shots": {}}, r"shots.json: key 'shots': expected a list, got dict"),
            ({"shots": ["x"]}, r"shots.json: key 'shots\[0\]': expected an object with 'input' and 'output'"),
            ({"shots": [{"input": "x"}]}, r"'shots\[0\]': expected .* got the keys \['input'\]"),
            ({"shots": [{"input": "x", "output": None}]}, r"'shots\[0\].output': expected .* got NoneType"),
            ({"stop": 1}, "shots.json: key 'stop': expected a list, got int"),
        ],
    )
    def test_broken(self, tmp_path, data, message):
        with pytest.raises(ValueError, match=message):
            load_shots(self.write(tmp_path, data))


class TestRenderChat:
    def test_chatml(self):
        template = (
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
        text = render_chat(template, USER)
        assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert render_chat(template, USER, add_generation_prompt=False).endswith("<|im_end|>\n")

    def test_the_helpers_that_templates_count_on(self):
        template = """
            {%- for m in messages %}{% if m.role == "tool" %}{% continue %}{% endif %}
            {%- generation %}{{ bos_token + m.content | tojson + eos_token }}{% endgeneration %}{% endfor %}
            {{- strftime_now("%Y")[:2] }}{{ thinking }}"""
        messages = [{"role": "tool", "content": "x"}, {"role": "user", "content": "é<'\""}]
        text = render_chat(template, messages, bos_token="<s>", eos_token="</s>", thinking=True)
        assert text == """<s>"é<'\\""</s>20True"""

    def test_blocks_leave_no_lines(self):
        assert render_chat("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n", USER) == "x\n"

    def test_same_as_transformers(self):
        utils = pytest.importorskip("transformers.utils.chat_template_utils")
        template = (
            "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}\n"
            "  {{ ns.n }}:{{ m | tojson(indent=2) }}{{ bos_token }}\n{% endfor %}\n"
        )
        theirs, _ = utils.render_jinja_template([USER], chat_template=template, bos_token="B")
        assert render_chat(template, USER, bos_token="B") == theirs[0]

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("a\n{% if %}", "chat template, line 2: "),
            ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
            ("{{ messages[0].content.x.y }}", "chat template: .*has no attribute 'x'"),
            ("{{ 1 / 0 }}", "chat template: division by zero"),
            ("{{ messages[0].content + 1 }}", "chat template: "),
            ("{% include 'x' %}", "chat template: "),
        ],
    )
    def test_errors_name_the_problem(self, template, message):
        with pytest.raises(ValueError, match=message):
            render_chat(template, USER)

    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ ''['__class__']['__base__'] }}",
            "{{ raise_exception.__globals__.keys() }}",
            "{{ raise_exception.__code__.co_code }}",
            "{{ self.__init__.__globals__['__builtins__'] }}",
            "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
            "{{ lipsum.__globals__['os'].system('true') }}",
            "{{ '{0.__class__}'.format(1).mro() }}",
            "{{ messages.append(1) }}",
            "{{ messages[0].update(role='x') }}",
            "{% for i in range(10 ** 9) %}{% endfor %}",
        ],
    )
    def test_no_way_out_of_the_sandbox(self, template):
        messages = [dict(USER[0])]
        with pytest.raises(ValueError, match="chat template: "):
            render_chat(template, messages)
        assert messages == USER

    @pytest.mark.parametrize(
        "template",
        ["{{ raise_exception.__globals__ }}", "{{ messages | attr('__class__') | attr('__init__') }}"],
    )
    def test_what_the_sandbox_hides_is_undefined(self, template):
        assert render_chat(template, USER) == ""

    @pytest.mark.parametrize(
        ("messages", "error", "message"),
        [
            ("hi", TypeError, "messages: expected a list of dicts, got str"),
            (USER[0], TypeError, "messages: expected a list of dicts, got dict"),
            ([], ValueError, "messages: expected at least one message"),
            ([*USER, {"role": "user"}], TypeError, r"messages\[1\]: expected a dict with str 'role' and"),
            ([{"role": "user", "content": 3}], TypeError, r"messages\[0\]: expected a dict"),
        ],
    )
    def test_what_is_no_conversation(self, messages, error, message):
        with pytest.raises(error, match=message):
            render_chat("", messages)

    def test_missing_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "jinja2", None)
        prompts._environment.cache_clear()
        with pytest.raises(ImportError, match=re.escape("pip install 'fastattn[model]'")):
            render_chat("", USER)

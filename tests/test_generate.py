"""The generation loop: on a decoder whose logits are a table, and on SmolLM2 where it is installed."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from tiny_vocabulary import END, GGUF, byte_level_metadata, needs_smollm2, tiny_tokenizer

import fastattn
from fastattn import decoding
from fastattn.generate import LLM, default_model, find_model, load_model
from fastattn.model.config import ModelConfig
from fastattn.model.kv_cache import KVCache
from fastattn.model.weights import ModelFileError
from fastattn.prompts import PromptTemplate

VOCAB = 266
MAX_SEQLEN = 64


class TableDecoder:
    """Logits depend on the row's whole history and on nothing else; ``script`` makes texts follow a text."""

    def __init__(self, script: str = "") -> None:
        sizes = {"hidden_size": 4, "nlayers": 1, "nheads": 1, "nheads_k": 1, "headdim": 4, "ffn_size": 4}
        self.config = ModelConfig(
            arch="table",
            vocab_size=VOCAB,
            max_seqlen=MAX_SEQLEN,
            norm_eps=1e-5,
            rope=None,
            tie_embeddings=True,
            activation="silu",
            eos_ids=(END,),
            **sizes,
        )
        self.script = tiny_tokenizer().encode(script)
        self.calls: list[list[int]] = []  # seqlens of every forward

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        return KVCache(self.config, batch, capacity, torch.float32)

    def forward(self, token_ids, seqlens, cache, *, all_logits=False):
        self.calls.append(seqlens)
        assert len(seqlens) == cache.batch
        assert min(seqlens) >= 1
        assert len(token_ids) == sum(seqlens)
        starts = cache.seqlens.tolist()
        cache.reserve(max(start + n for start, n in zip(starts, seqlens)))
        rows = []
        for row, (start, tokens) in enumerate(zip(starts, token_ids.split(seqlens))):
            end = start + len(tokens)
            cache.k[0][row, start:end, 0, 0] = tokens.float()  # the cache remembers, as a real one does
            history = [int(token) for token in cache.k[0][row, :end, 0, 0]]
            logits = [self.logits(history[: n + 1]) for n in range(start, end)]
            rows += logits if all_logits else logits[-1:]
        cache.advance([start + n for start, n in zip(starts, seqlens)])
        return torch.stack(rows)

    def logits(self, history: list[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash(tuple(history)) & 0xFFFF_FFFF)
        logits = torch.randn(VOCAB, generator=generator)
        logits[END] = -math.inf
        if self.script:
            # The script begins after the prompt's last "@".
            at = len(history) - 1 - history[::-1].index(AT) if AT in history else None
            wanted = self.script[len(history) - at - 1 :] if at is not None else []
            logits[wanted[0] if wanted else END] = 100.0
        return logits


AT = tiny_tokenizer().encode("@")[0]


def tiny_llm(script: str = "") -> LLM:
    return LLM(TableDecoder(script), tiny_tokenizer())


DRAW = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}


class TestGenerate:
    def test_text_until_the_end_token(self):
        done = tiny_llm("hello w🙂").generate("say @", temperature=0)
        assert (done.text, done.finish_reason) == ("hello w🙂", "stop")
        assert done.token_ids[-1] == END
        assert done.prompt_tokens == 5
        assert done.prompt_seconds > 0
        assert done.prompt_rate > 0
        assert done.decode_rate > 0

    def test_length(self):
        done = tiny_llm("hello w").generate("@", temperature=0, max_new_tokens=1)
        assert (done.text, done.finish_reason, len(done.token_ids)) == ("hello", "length", 1)

    def test_penalties_see_the_prompt_and_the_text(self):
        # A flat model under a penalty that nothing survives twice writes every token once.
        llm = tiny_llm()
        llm.decoder.logits = lambda history: torch.zeros(VOCAB)
        call = {"max_new_tokens": 50, "seed": 1, "ignore_eos": True}
        prompt = llm.tokenizer.encode("hello w")
        for penalty in ({"presence_penalty": 1e9}, {"frequency_penalty": 1e9}):
            ids = llm.generate("hello w", **call, **penalty).token_ids
            assert len(set(ids)) == 50
        llm.decoder.logits = lambda history: torch.full((VOCAB,), 100.0)
        ids = llm.generate("hello w", **call, repetition_penalty=1e9).token_ids
        assert len(set(ids)) == 50
        assert not set(ids) & set(prompt)

    def test_penalties_do_not_depend_on_batchmates(self):
        call = DRAW | {"repetition_penalty": 1.5, "frequency_penalty": 0.3, "seed": 4, "stop": "e"}
        prompts = ["a", "hello w", "say it again", "xyz"]
        together = tiny_llm().generate(prompts, **call)
        alone = [tiny_llm().generate(prompt, **call) for prompt in prompts]
        assert [done.token_ids for done in together] == [done.token_ids for done in alone]

    def test_logit_bias_and_allowed(self):
        wanted = tiny_tokenizer().encode("xyz")
        call = {"max_new_tokens": 20, "seed": 0}
        biased = tiny_llm().generate("@", **call, logit_bias={wanted[0]: 1e4, wanted[1]: -math.inf})
        assert set(biased.token_ids) == {wanted[0]}
        listed = tiny_llm().generate("@", **call, allowed=wanted)
        assert set(listed.token_ids) == set(wanted)
        mask = torch.zeros(3, VOCAB, dtype=torch.bool)
        mask[range(3), wanted] = True

        def in_turn(drawn: list[int]) -> torch.Tensor | None:
            return mask[len(drawn) % 3] if len(drawn) < 9 else None

        grammar = tiny_llm().generate(["@", "a@"], **call, allowed=in_turn)
        for done in grammar:
            assert done.token_ids[:9] == wanted * 3
            assert not set(done.token_ids[9:]) <= set(wanted)

    def test_logprobs(self):
        llm = tiny_llm()
        done = llm.generate("@hello", **DRAW, max_new_tokens=10, seed=3, logprobs=4, logit_bias={7: -1.0})
        assert done.logprobs is not None
        assert len(done.logprobs) == len(done.top_logprobs) == 10
        history = llm.tokenizer.encode("@hello")
        for token, logprob, best in zip(done.token_ids, done.logprobs, done.top_logprobs):
            expected = llm.decoder.logits(history).log_softmax(0)  # (vocab,)
            assert logprob == pytest.approx(float(expected[token]), abs=1e-5)
            assert [i for i, _ in best] == expected.topk(4).indices.tolist()
            assert [p for _, p in best] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)
            history.append(token)
        assert llm.generate("@", max_new_tokens=1).logprobs is None

    def test_the_context_ends_a_text(self):
        done = tiny_llm().generate("x" * 60, max_new_tokens=100, seed=0)
        assert (len(done.token_ids), done.finish_reason) == (4, "length")

    def test_ignore_eos(self):
        done = tiny_llm("hi").generate("@", temperature=0, ignore_eos=True, max_new_tokens=6)
        assert (done.text, done.finish_reason, len(done.token_ids)) == ("hi", "length", 6)

    @pytest.mark.parametrize(
        ("stop", "text"),
        [("lo", "hel"), (["w!", " w"], "hello"), ("never", "hello w!"), ("h", ""), ((), "hello w!")],
    )
    def test_stop_strings(self, stop, text):
        done = tiny_llm("hello w!").generate("@", temperature=0, stop=stop)
        assert (done.text, done.finish_reason) == (text, "stop")

    def test_stop_ids(self):
        bang = tiny_tokenizer().encode("!")[0]
        done = tiny_llm("hello! w").generate("@", temperature=0, stop_ids=[bang])
        assert (done.text, done.finish_reason, done.token_ids[-1]) == ("hello", "stop", bang)

    def test_a_stop_string_that_never_came_whole(self):
        assert tiny_llm("hello w").generate("@", temperature=0, stop="w!").text == "hello w"
        assert tiny_llm("hello w").generate("@", temperature=0, stop="o w", max_new_tokens=1).text == "hello"

    def test_shots_and_their_stop_strings(self):
        template = PromptTemplate(input="{input}", output="={output}", separator=";")
        llm = tiny_llm("=2;3")  # goes on after "@", and the question ends with "="
        done = llm.generate("@", shots=[("a", "b")], template=template, temperature=0)
        assert done.prompt_tokens == len("a=b;@=")
        assert done.text == "2"

    def test_an_empty_prompt(self):
        with pytest.raises(ValueError, match="prompt: expected at least one token, got an empty text"):
            tiny_llm().generate("")


class TestBatch:
    PROMPTS = ("a", "hello hello", "The quick brown fox", "12345")

    def test_each_text_is_that_of_the_prompt_alone(self):
        options = {**DRAW, "seed": 7, "max_new_tokens": 20}
        alone = [tiny_llm().generate(prompt, **options) for prompt in self.PROMPTS]
        batch = tiny_llm().generate(list(self.PROMPTS), **options)
        assert [done.token_ids for done in batch] == [done.token_ids for done in alone]
        assert [done.text for done in batch] == [done.text for done in alone]

    def test_one_forward_reads_all_prompts(self):
        llm = tiny_llm()
        llm.generate(list(self.PROMPTS), max_new_tokens=3, seed=0)
        lengths = [len(llm.tokenizer.encode(prompt)) for prompt in self.PROMPTS]
        assert llm.decoder.calls == [lengths, [1] * 4, [1] * 4]

    def test_finished_rows_leave_the_batch(self):
        llm = tiny_llm("hello w!")
        done = llm.generate(["@", "@hello w", "@hello"], temperature=0)
        assert [d.text for d in done] == ["hello w!", "!", " w!"]
        assert [len(call) for call in llm.decoder.calls] == [3, 3, 2, 1]

    def test_seeds(self):
        same = tiny_llm().generate(["x", "x"], seed=7, max_new_tokens=20)
        assert same[0].token_ids == same[1].token_ids
        each = tiny_llm().generate(["x", "x"], seed=[7, 8], max_new_tokens=20)
        assert each[0].token_ids == same[0].token_ids != each[1].token_ids
        fresh = tiny_llm().generate(["x", "x"], max_new_tokens=20)
        assert fresh[0].token_ids != fresh[1].token_ids

    def test_long_prompts_are_read_in_parts(self, monkeypatch):
        prompts, options = ["x" * 50, "abcdefgh"], {"seed": 1, "max_new_tokens": 8}
        whole = tiny_llm().generate(prompts, **options)
        monkeypatch.setattr(decoding, "PREFILL_TOKENS", 10)
        llm, seen = tiny_llm(), []
        parts = llm.generate(prompts, progress=lambda done, total: seen.append((done, total)), **options)
        assert [d.token_ids for d in parts] == [d.token_ids for d in whole]
        assert all(sum(call) <= 10 + 1 for call in llm.decoder.calls)  # a part is rounded up in one row
        assert seen == [(sum(map(sum, llm.decoder.calls[: n + 1])), 58) for n in range(6)]

    def test_a_short_prompt_beside_a_long_one(self, monkeypatch):
        monkeypatch.setattr(decoding, "PREFILL_TOKENS", 10)
        llm = tiny_llm()
        llm.generate(["x" * 50, "ab"], seed=1, max_new_tokens=1)
        assert llm.decoder.calls == [[25, 1], [25, 1]]


class TestStream:
    def test_pieces(self):
        stream = tiny_llm("hello w🙂 12").stream("@", temperature=0)
        with pytest.raises(RuntimeError, match="completion: the stream has not been read to its end"):
            _ = stream.completion
        assert list(stream) == ["hello", " w", "🙂", " ", "12"]
        assert stream.completion.text == stream.text == "hello w🙂 12"
        assert next(stream, None) is None

    def test_held_back_text_comes_when_no_stop_string_does(self):
        assert list(tiny_llm("a\nb").stream("@", temperature=0, stop="\n\n")) == ["a", "\nb"]
        assert list(tiny_llm("a\n").stream("@", temperature=0, stop="\n\n")) == ["a", "\n"]

    def test_same_as_generate(self):
        stream = tiny_llm().stream("x", seed=3, max_new_tokens=30, **DRAW)
        assert "".join(stream) == tiny_llm().generate("x", seed=3, max_new_tokens=30, **DRAW).text


class TestChat:
    def test_through_the_template(self):
        llm = tiny_llm("hello")
        done = llm.chat([{"role": "user", "content": "@" * 3}], temperature=0, max_new_tokens=2)
        assert done.prompt_tokens == len(llm.chat_ids([{"role": "user", "content": "@@@"}]))
        assert llm.tokenizer.decode(llm.chat_ids([{"role": "user", "content": "x"}])) == (
            "<|start|>user:x<|end|><|start|>assistant:"
        )

    def test_no_template(self):
        metadata = byte_level_metadata()
        del metadata["tokenizer.chat_template"]
        from fastattn.tokenizer import Tokenizer
        from fastattn.vocabulary import from_gguf

        llm = LLM(TableDecoder(), Tokenizer(from_gguf(GGUF, metadata)))
        with pytest.raises(ValueError, match="model: the model has no chat template; use generate"):
            llm.chat([{"role": "user", "content": "x"}])

    def test_a_conversation_reads_only_what_is_new(self):
        llm = tiny_llm()
        conversation = llm.conversation(system="s")
        first = conversation.send("a", temperature=0, max_new_tokens=3)
        answer = "".join(first)
        llm.decoder.calls.clear()
        second = conversation.send("b", temperature=0, max_new_tokens=3)
        assert conversation.messages[:3] == [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": answer},
        ]
        text = "".join(second)
        done = second.completion
        assert done.cached_tokens >= first.completion.prompt_tokens
        assert llm.decoder.calls[0] == [done.prompt_tokens - done.cached_tokens]
        assert text == tiny_llm().chat(conversation.messages[:-1], temperature=0, max_new_tokens=3).text

    def test_an_answer_cut_short(self):
        conversation = tiny_llm().conversation()
        stream = conversation.send("a", temperature=0, max_new_tokens=8)
        next(stream)
        second = conversation.send("b", temperature=0, max_new_tokens=3)
        assert next(stream, None) is None
        assert conversation.messages[1] == {"role": "assistant", "content": stream.text}
        again = tiny_llm().chat(conversation.messages[:3], temperature=0, max_new_tokens=3)
        assert "".join(second) == again.text

    def test_a_turn_that_does_not_fit_changes_nothing(self):
        conversation = tiny_llm().conversation()
        with pytest.raises(ValueError, match="prompt: expected fewer tokens than the model's context of 64"):
            conversation.send("x" * 100)
        assert conversation.messages == []


class TestLogits:
    def test_all_positions(self):
        llm = tiny_llm()
        logits = llm.logits([5, 6, 7])
        assert logits.shape == (3, VOCAB)
        torch.testing.assert_close(logits[1], llm.decoder.logits([5, 6]))
        torch.testing.assert_close(llm.logits(torch.tensor([5, 6, 7], dtype=torch.int32)), logits)

    @pytest.mark.parametrize(
        ("ids", "error", "message"),
        [
            ([], ValueError, r"token_ids: expected 1 to 64 ids in one dimension, got shape \(0,\)"),
            ([[1]], ValueError, r"got shape \(1, 1\)"),
            ([1] * 65, ValueError, r"got shape \(65,\)"),
            ([0.5], TypeError, "token_ids: expected integers, got torch.float32"),
        ],
    )
    def test_what_are_no_ids(self, ids, error, message):
        with pytest.raises(error, match=message):
            tiny_llm().logits(ids)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            (
                {"max_new_tokens": 0},
                ValueError,
                r"max_new_tokens: expected a value in \[1, 2147483647\], got 0",
            ),
            ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens: expected an int, got float"),
            ({"temperature": -1}, ValueError, r"temperature: expected a value in \[0.0, inf\], got -1"),
            ({"temperature": math.nan}, ValueError, "temperature: .* got nan"),
            ({"temperature": "hot"}, TypeError, "temperature: expected a number, got str"),
            ({"top_k": -2}, ValueError, "top_k: .* got -2"),
            ({"top_k": True}, TypeError, "top_k: expected an int, got bool"),
            ({"top_p": 1.1}, ValueError, r"top_p: expected a value in \[0.0, 1.0\], got 1.1"),
            ({"min_p": -0.1}, ValueError, "min_p: .* got -0.1"),
            ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty: .* got 0.0"),
            ({"presence_penalty": math.inf}, ValueError, "presence_penalty: .* got inf"),
            ({"frequency_penalty": "1"}, TypeError, "frequency_penalty: expected a number, got str"),
            (
                {"logit_bias": [1.0]},
                TypeError,
                "logit_bias: expected a mapping from token ids to numbers, got list",
            ),
            ({"logit_bias": {-1: 1.0}}, ValueError, "logit_bias: .* got -1"),
            ({"logit_bias": {VOCAB: 1.0}}, ValueError, "logit_bias: expected ids below 266, got 266"),
            ({"logit_bias": {1: math.nan}}, ValueError, r"logit_bias\[1\]: .* got nan"),
            ({"allowed": [0, "a"]}, TypeError, r"allowed\[1\]: expected an int, got str"),
            ({"allowed": [VOCAB]}, ValueError, "allowed: expected ids below 266, got 266"),
            ({"logprobs": -1}, ValueError, "logprobs: .* got -1"),
            ({"seed": -1}, ValueError, "seed: .* got -1"),
            ({"seed": [1, 2]}, ValueError, "seed: expected one number or 1, one per prompt, got 2"),
            ({"seed": ["a"]}, TypeError, r"seed\[0\]: expected an int, got str"),
            ({"stop": 3}, TypeError, "stop: expected a str or a list of str, got int"),
            ({"stop": [3]}, TypeError, r"stop\[0\]: expected a str, got int"),
            ({"stop": ["a", ""]}, ValueError, r"stop\[1\]: expected a string that is not empty"),
            ({"stop_ids": 3}, TypeError, "stop_ids: expected a list of token ids, got int"),
            ({"stop_ids": [-1]}, ValueError, r"stop_ids\[0\]: .* got -1"),
            (
                {"max_tokens": 3},
                TypeError,
                "max_tokens: not an option; expected one of max_new_tokens, temperature",
            ),
            ({"shots": "ab"}, TypeError, "shots: expected a list"),
        ],
    )
    def test_options(self, options, error, message):
        with pytest.raises(error, match=message):
            tiny_llm().generate("x", **options)
        with pytest.raises(error, match=message):
            tiny_llm().stream("x", **options)

    @pytest.mark.parametrize(
        ("prompt", "error", "message"),
        [
            ([], ValueError, "prompt: expected at least one prompt, got an empty list"),
            (3, TypeError, "prompt: expected a str or a list of str, got int"),
            (["a", b"b"], TypeError, r"prompt\[1\]: expected a str, got bytes"),
            ("x" * 64, ValueError, "prompt: expected fewer tokens than the model's context of 64, got 64"),
            (["a", "x" * 70], ValueError, r"prompt\[1\]: expected fewer tokens .* got 70"),
        ],
    )
    def test_prompts(self, prompt, error, message):
        with pytest.raises(error, match=message):
            tiny_llm().generate(prompt)

    def test_no_tokenizer(self):
        with pytest.raises(ModelFileError, match=r"model: tokenizer.json is missing"):
            LLM(TableDecoder(), None).generate("x")


class TestLoadModel:
    def test_dtype(self):
        with pytest.raises(ValueError, match="dtype: expected float32 or bfloat16, got float8"):
            load_model("x", dtype="float8")
        with pytest.raises(ValueError, match=r"dtype: expected float32 or bfloat16, got torch.float16"):
            load_model("x", dtype=torch.float16)

    @pytest.mark.parametrize("path", ["missing.gguf", "./missing/folder", "/no/such/folder", "a/b.gguf"])
    def test_no_such_path(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=f"{path}: no such file or folder"):
            load_model(path)

    def test_hub_without_its_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ImportError, match=r"org/name: no such file .*pip install 'fastattn\[hub\]'"):
            find_model("org/name")

    def test_hub(self, monkeypatch, tmp_path):
        hub = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path / name))
        monkeypatch.setattr(hub, "hf_hub_download", lambda name, file: str(tmp_path / name / file))
        assert find_model("org/name") == tmp_path / "org/name"
        assert find_model("org/name/a.gguf") == tmp_path / "org/name/a.gguf"

        def refuse(*_, **__):
            raise OSError("no network\nmore")

        monkeypatch.setattr(hub, "snapshot_download", refuse)
        with pytest.raises(
            ModelFileError, match=r"org/name: neither here nor to be had from the hub: no network$"
        ):
            find_model("org/name")

    def test_it_is_public(self):
        assert fastattn.load_model is load_model
        assert fastattn.LLM is LLM

    def test_threads_are_as_before(self, tmp_path):
        (tmp_path / "x.gguf").write_bytes(b"GGUF")
        before = torch.get_num_threads()
        with pytest.raises(ModelFileError):
            load_model(tmp_path / "x.gguf")
        assert torch.get_num_threads() == before


@pytest.fixture(scope="module")
def llm() -> LLM:
    path = default_model()
    assert path is not None
    return load_model(path)


@needs_smollm2
class TestSmolLM2:
    PROMPTS = ("Once upon a time", "12 + 30 =", "def fibonacci(n):\n", "The")

    def test_paris(self, llm):
        done = llm.generate("The capital of France is", temperature=0, max_new_tokens=16)
        assert done.text.startswith(" Paris")

    def test_chat(self, llm):
        done = llm.chat([{"role": "user", "content": "What is the capital of France?"}], temperature=0)
        assert (done.text, done.finish_reason) == ("The capital of France is Paris.", "stop")

    def test_same_text_on_one_thread_or_two_alone_or_in_a_batch(self, llm):
        options = {**DRAW, "seed": 7, "max_new_tokens": 24}
        alone = [llm.generate(prompt, **options).token_ids for prompt in self.PROMPTS]
        assert [done.token_ids for done in llm.generate(list(self.PROMPTS), **options)] == alone
        threads = torch.get_num_threads()
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                assert [llm.generate(prompt, **options).token_ids for prompt in self.PROMPTS] == alone
        finally:
            torch.set_num_threads(threads)

    def test_a_conversation_answers_as_a_fresh_chat_does(self, llm):
        conversation = llm.conversation()
        for question in ("Name a colour.", "Name another one."):
            answer = "".join(conversation.send(question, temperature=0, max_new_tokens=16))
            assert answer == llm.chat(conversation.messages[:-1], temperature=0, max_new_tokens=16).text

    def test_logits(self, llm):
        ids = llm.tokenizer.encode("The capital of France is")
        logits = llm.logits(ids)
        assert logits.shape == (len(ids), 49152)
        assert llm.tokenizer.decode([int(logits[-1].argmax())]) == " Paris"

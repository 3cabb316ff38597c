"""Tokenizers from GGUF metadata and from tokenizer.json, and the incremental decoder."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_vocabulary import (
    END,
    GGUF,
    START,
    byte_level_metadata,
    needs_smollm2,
    sentencepiece_metadata,
    tiny_tokenizer,
)

from fastattn.generate import default_model
from fastattn.model.gguf import GGUFFile
from fastattn.model.registry import ModelFile
from fastattn.model.weights import ModelFileError
from fastattn.tokenizer import TextStream, Tokenizer
from fastattn.vocabulary import from_folder, from_gguf

TEXTS = [
    "",
    " ",
    "The year 2024, 3.14159 and 1,000,000.",
    "def f(x):\n\treturn x ** 2  # squared\r\n\r\n",
    "naïve café, Ünïcödé, Ελληνικά",
    "🙂 👩‍👩‍👧 🇨🇭",
    "汉字和假名ひらがな",
    "½ ² Ⅷ ١٢٣",
    "\x00\x01\x7f\u200b\ufeff",
    "a<|im_end|>b<|start|>c",
]
# Bytes of valid UTF-8 that SmolLM2 has no token for: some control characters, and two unassigned planes.
LACKING = b"\x04\x06\x13\x14\x16\x1d\xf1\xf2"
any_text = st.one_of(st.text(), st.binary().map(lambda data: data.decode("utf-8", "replace")))

TINY = tiny_tokenizer()
SPM = Tokenizer(from_gguf(GGUF, sentencepiece_metadata(add_bos_token=False)))


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    path = default_model()
    assert path is not None
    return Tokenizer(from_gguf(path, GGUFFile(path).metadata))


@needs_smollm2
class TestSmolLM2:
    @pytest.mark.parametrize("text", TEXTS)
    def test_round_trip(self, smollm2, text):
        assert smollm2.decode(smollm2.encode(text)) == text

    @given(text=any_text)
    def test_round_trip_of_anything(self, smollm2, text):
        assume(not any(byte in text.encode() for byte in LACKING))
        assert smollm2.decode(smollm2.encode(text)) == text
        assert b"".join(map(smollm2.token_bytes, smollm2.encode(text))) == text.encode()

    def test_every_digit_is_a_token(self, smollm2):
        pieces = [smollm2.token_bytes(i) for i in smollm2.encode("in 2024")]
        assert pieces == [b"in", b" ", b"2", b"0", b"2", b"4"]

    def test_special_tokens(self, smollm2):
        assert smollm2.encode("<|im_start|>user<|im_end|>") == [1, *smollm2.encode("user"), 2]
        assert 2 not in smollm2.encode("<|im_end|>", special=False)
        assert smollm2.decode([1, 2], skip_special=True) == ""
        assert (smollm2.bos_token, smollm2.eos_token, smollm2.eos_ids) == ("<|im_start|>", "<|im_end|>", (2,))
        assert not smollm2.add_bos
        assert smollm2.chat_template is not None


class TestByteLevel:
    @given(text=any_text)
    def test_round_trip_of_anything(self, text):
        assert TINY.decode(TINY.encode(text)) == text

    def test_merges(self):
        assert [TINY.token_bytes(i) for i in TINY.encode("hello w")] == [b"hello", b" w"]

    @pytest.mark.parametrize(
        ("pre", "words"),
        [
            ("gpt-2", ["it", "'s", "Ġ12345", "!!", "Ċ", "ĠX"]),
            ("default", ["it", "'s", "Ġ12345", "!!", "Ċ", "ĠX"]),
            ("smollm", ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "!!", "Ċ", "ĠX"]),
            ("llama-bpe", ["it", "'s", "Ġ", "123", "45", "!!Ċ", "ĠX"]),
            ("qwen2", ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "!!Ċ", "ĠX"]),
            ("olmo", ["it", "'s", "Ġ12345", "!!", "Ċ", "ĠX"]),
            ("phi-2", ["it", "'s", "Ġ12345", "!!", "Ċ", "ĠX"]),
            ("bloom", ["it's", "Ġ12345", "!!Ċ", "ĠX"]),
            ("falcon", ["it", "'", "s", "Ġ", "123", "45", "!!", "Ċ", "ĠX"]),
        ],
    )
    def test_words(self, pre, words):
        backend = from_gguf(GGUF, byte_level_metadata(pre=pre)).backend
        assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str("it's 12345!!\n X")] == words

    def test_bos(self):
        assert TINY.encode("a") == TINY.encode("a", add_bos=False)
        assert TINY.encode("a", add_bos=True)[0] == START
        with_bos = tiny_tokenizer(add_bos_token=True)
        assert with_bos.encode("a")[0] == START
        assert with_bos.encode("<|start|>a").count(START) == 1
        assert tiny_tokenizer(pre="llama-bpe").add_bos

    def test_all_ends_count(self):
        assert tiny_tokenizer(eot_token_id=1, eom_token_id=0).eos_ids == (0, 1)

    def test_ends_of_turns_are_known_by_name(self):
        """Only where they are control tokens: in a text they are text."""
        tokens = byte_level_metadata()["tokenizer.ggml.tokens"]
        tokens = ["<end_of_turn>" if token == "<|start|>" else token for token in tokens]
        types = [3 if n < 2 else 1 for n in range(len(tokens))]
        assert tiny_tokenizer(tokens=tokens, token_type=types).eos_ids == (END, START)
        types[START] = 1
        assert tiny_tokenizer(tokens=tokens, token_type=types).eos_ids == (END,)

    def test_user_defined_tokens_are_text(self):
        types = [4 if n == 0 else 1 for n in range(len(byte_level_metadata()["tokenizer.ggml.tokens"]))]
        tokenizer = tiny_tokenizer(token_type=types)
        assert tokenizer.encode("a<|end|>", special=False)[-1] == END
        assert tokenizer.decode([END], skip_special=True) == "<|end|>"

    def test_ids_past_the_vocabulary(self):
        assert TINY.decode([5000, *TINY.encode("hello")]) == "hello"
        with pytest.raises(ValueError, match=r"token_id: expected one of the 266 tokens, got 5000"):
            TINY.token_bytes(5000)
        with pytest.raises(ValueError, match="got -1"):
            TINY.token_bytes(-1)

    def test_what_is_not_text(self):
        with pytest.raises(TypeError, match="text: expected a str, got bytes"):
            TINY.encode(b"a")
        with pytest.raises(ValueError, match="text: expected valid Unicode, got a lone surrogate at 1"):
            TINY.encode("a\ud800")


class TestSentencePiece:
    @given(text=any_text)
    def test_round_trip_of_anything(self, text):
        assert SPM.decode(SPM.encode(text, special=False)) == text.replace("▁", " ")

    @given(text=st.text(alphabet="helowrd ", max_size=24))
    def test_merges_are_those_of_the_scores(self, text):
        """Joining the neighbours whose union scores best, leftmost first, until none is left."""
        metadata = sentencepiece_metadata()
        tokens = metadata["tokenizer.ggml.tokens"]
        score = dict(zip(tokens, metadata["tokenizer.ggml.scores"]))
        parts = list("▁" + text.replace(" ", "▁")) if text else []
        while pairs := [(-score[a + b], n) for n, (a, b) in enumerate(pairwise(parts)) if a + b in score]:
            n = min(pairs)[1]
            parts[n : n + 2] = ["".join(parts[n : n + 2])]
        assert [tokens[i] for i in SPM.encode(text)] == parts

    def test_bytes_of_what_has_no_piece(self):
        assert [SPM.token_bytes(i) for i in SPM.encode("é")] == [b" ", b"\xc3", b"\xa9"]

    def test_bos_by_default_and_space_prefix(self):
        tokenizer = Tokenizer(from_gguf(GGUF, sentencepiece_metadata(add_space_prefix=False)))
        assert tokenizer.encode("he")[0] == 1
        assert tokenizer.decode(tokenizer.encode(" he"), skip_special=True) == " he"
        assert [tokenizer.token_bytes(i) for i in tokenizer.encode("he", add_bos=False)] == [b"he"]


class TestBrokenMetadata:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tokens": None}, r"tiny.gguf: key 'tokenizer.ggml.tokens': missing"),
            ({"tokens": [1, 2]}, "'tokenizer.ggml.tokens': expected a list of strings"),
            ({"merges": ["a b", "ab"]}, "'tokenizer.ggml.merges': entry 1: expected two tokens .* got 'ab'"),
            ({"merges": ["a zz"]}, "'tokenizer.ggml.merges': .*`zz` out of vocabulary"),
            ({"model": "bert"}, "'tokenizer.ggml.model': expected 'gpt2' or 'llama', got 'bert'"),
            ({"pre": "klingon"}, "'tokenizer.ggml.pre': expected one of gpt-2, .*smollm.*, got 'klingon'"),
            ({"token_type": [1]}, "'tokenizer.ggml.token_type': expected one for each of the 266 tokens"),
            ({"eos_token_id": 266}, "'tokenizer.ggml.eos_token_id': expected a token id below 266, got 266"),
            ({"bos_token_id": "x"}, "'tokenizer.ggml.bos_token_id': expected token ids"),
        ],
    )
    def test_byte_level(self, changes, message):
        with pytest.raises(ModelFileError, match=message):
            from_gguf(GGUF, byte_level_metadata(**changes))

    def test_scores(self):
        with pytest.raises(ModelFileError, match=r"'tokenizer.ggml.scores': expected one number for each"):
            from_gguf(GGUF, sentencepiece_metadata(scores=[1.0]))

    def test_no_pre_tokenizer_is_a_warning(self):
        with pytest.warns(UserWarning, match=r"no key 'tokenizer.ggml.pre'; splitting words as gpt-2 does"):
            from_gguf(GGUF, byte_level_metadata(pre=None))

    def test_missing_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ImportError, match=re.escape("pip install 'fastattn[model]'")):
            from_gguf(GGUF, byte_level_metadata())


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        backend = from_gguf(GGUF, byte_level_metadata()).backend
        from tokenizers import decoders

        backend.decoder = decoders.ByteLevel()
        backend.save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    def load(self, folder, **config) -> Tokenizer:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        path = folder / "tokenizer.json"
        return Tokenizer.from_model_file(ModelFile(folder, "hf", {"tokenizer_config": config}, path, 0))

    @pytest.mark.parametrize("text", TEXTS)
    def test_same_as_transformers(self, folder, text):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        ours = self.load(folder)
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text

    def test_config(self, folder):
        tokenizer = self.load(
            folder,
            bos_token={"content": "<|start|>"},
            eos_token="<|end|>",
            add_bos_token=True,
            chat_template="x",
        )
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (START, (END,), "x")
        assert tokenizer.encode("a")[0] == START

    def test_bos_of_the_post_processor(self, folder):
        from tokenizers import Tokenizer as Backend
        from tokenizers.processors import TemplateProcessing

        backend = Backend.from_file(str(folder / "tokenizer.json"))
        backend.post_processor = TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", START)]
        )
        backend.save(str(folder / "tokenizer.json"))
        assert self.load(folder).encode("a")[0] == START
        assert self.load(folder, add_bos_token=False).encode("a")[0] != START

    def test_template_in_its_own_file_or_in_a_list(self, folder):
        named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
        assert self.load(folder, chat_template=named).chat_template == "d"
        (folder / "chat_template.jinja").write_text("own")
        assert self.load(folder, chat_template="x").chat_template == "own"

    def test_broken(self, folder):
        with pytest.raises(
            ModelFileError, match=r"tokenizer_config.json: key 'chat_template': expected a string"
        ):
            self.load(folder, chat_template=3)
        (folder / "tokenizer.json").write_text('{"model": 1}')
        with pytest.raises(ModelFileError, match=r"tokenizer.json: not a tokenizer"):
            from_folder(folder / "tokenizer.json", {})
        with pytest.raises(ModelFileError, match=r"tokenizer.json is missing"):
            Tokenizer.from_model_file(ModelFile(folder, "hf", {}, None, 0))


def streamed(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> list[str]:
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


class TestTextStream:
    @given(text=any_text)
    def test_all_of_the_text_comes(self, text):
        ids = TINY.encode(text, special=False)
        assert "".join(streamed(TINY, ids, [])) == text

    @given(ids=st.lists(st.integers(0, 270)))
    def test_any_tokens_at_all(self, ids):
        assert "".join(streamed(TINY, ids, [])) == TINY.decode(ids, skip_special=True)

    @given(
        text=st.text(alphabet="ab🙂", max_size=30),
        stop=st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=4), min_size=1, max_size=3),
    )
    def test_nothing_of_a_stop_string_comes(self, text, stop):
        """Character by character the stop string that is complete first wins; no piece is ever taken back."""
        ends = [text.find(s) + len(s) for s in stop if s in text]
        seen = text[: min(ends)] if ends else text
        wanted = text[: min(seen.find(s) for s in stop if s in seen)] if ends else text
        assert "".join(streamed(TINY, TINY.encode(text), stop)) == wanted

    def test_whole_characters_only(self):
        pieces = streamed(TINY, TINY.encode("a🙂b"), [])
        assert pieces == ["a", "", "", "", "🙂", "b", ""]

    def test_half_a_character_at_the_end(self):
        assert streamed(TINY, TINY.encode("🙂")[:3], []) == ["", "", "", "\ufffd"]

    def test_what_may_become_a_stop_string_is_held(self):
        assert streamed(TINY, TINY.encode("x\n\ny", special=False), ["\n\n"]) == ["x", "", ""]
        assert streamed(TINY, TINY.encode("x\ny", special=False), ["\n\n"]) == ["x", "", "\ny", ""]

    def test_special_tokens_are_not_text(self):
        assert "".join(streamed(TINY, TINY.encode("a<|end|>b"), [])) == "ab"

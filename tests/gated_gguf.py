"""GGUF files of transformers' Llama, Mistral, Qwen and Gemma models, as llama.cpp's converter would write them."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch

ARCHS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}


def write_gguf(path: Path, model) -> None:
    """By the gguf package's own tables of keys and names. Windows of Qwen have no key there."""
    config = model.config
    arch, kind = ARCHS[config.model_type], config.model_type
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    nlayers, nheads = config.num_hidden_layers, config.num_attention_heads
    headdim = getattr(config, "head_dim", None) or config.hidden_size // nheads
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(nlayers)
    writer.add_head_count(nheads)
    writer.add_eos_token_id(7)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(headdim)
    writer.add_value_length(headdim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(headdim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    rope = config.rope_parameters
    if kind == "gemma3_text":
        assert config.layer_types[-1] == "full_attention"
        writer.add_sliding_window_pattern(nlayers)
        writer.add_float32("gemma3.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    add_rope(writer, rope, headdim, model)

    names = gguf.get_tensor_name_map(arch, nlayers)
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == gguf.MODEL_ARCH.LLAMA and (".q_proj." in key or ".k_proj." in key):
            heads = nheads if "q_proj" in key else config.num_key_value_heads
            # Halves become neighbouring pairs.
            weight = weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        if kind.startswith("gemma") and key.endswith("norm.weight"):
            weight = weight + 1
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_rope(writer: gguf.GGUFWriter, rope: dict, headdim: int, model) -> None:
    """Base and scaling; that of Llama 3 as divisors of the frequencies."""
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key in ("beta_fast", "beta_slow"):
            if key in rope:
                writer.add_float32(f"{writer.arch}.rope.scaling.yarn_{key}", rope[key])
    if rope["rope_type"] == "llama3":
        pairs = torch.arange(0, headdim, 2) / headdim
        factors = rope["rope_theta"] ** -pairs / model.model.rotary_emb.inv_freq
        writer.add_tensor("rope_freqs.weight", factors.numpy())

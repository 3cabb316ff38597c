"""Tiny random models of transformers, one for each way in which attention is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCAB, HIDDEN = 60, 32
LLAMA = {
    "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
WINDOW = {"sliding_window": 4}

# name: (class of the model, class of the configuration, its arguments)
DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**LLAMA, "rotary_pct": 0.5}),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "OPT": ("OPTForCausalLM", "OPTConfig", {"hidden_size": HIDDEN, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": HIDDEN}),
    "BLOOM": ("BloomForCausalLM", "BloomConfig", {"hidden_size": HIDDEN, "n_layer": 2, "n_head": 4}),
    "LLaMA": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "Mistral, window": ("MistralForCausalLM", "MistralConfig", {**LLAMA, **WINDOW}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "Qwen3, window": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, **WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, **WINDOW, "attn_logit_softcapping": 5.0}),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, **WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "GPT-OSS": ("GptOssForCausalLM", "GptOssConfig", {**LLAMA, **WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "Falcon": ("FalconForCausalLM", "FalconConfig", {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True, "parallel_attn": True}),
    "Falcon, new": ("FalconForCausalLM", "FalconConfig", {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "MPT": ("MptForCausalLM", "MptConfig", {"d_model": HIDDEN, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
}  # fmt: skip
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertForMaskedLM", "BertConfig", {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}),
    "ModernBERT": ("ModernBertForMaskedLM", "ModernBertConfig", {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2}),
}  # fmt: skip
_BART = {"d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
_T5 = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
SEQ2SEQ: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BART": ("BartForConditionalGeneration", "BartConfig", {**_BART, "max_position_embeddings": 64}),
    "T5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "FLAN-T5": ("T5ForConditionalGeneration", "T5Config", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "UMT5": ("UMT5ForConditionalGeneration", "UMT5Config", _T5),
    "Switch": ("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", {**_T5, "num_decoder_layers": 2, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {**_BART, "num_mel_bins": 4, "max_source_positions": 10, "max_target_positions": 32, "suppress_tokens": None, "begin_suppress_tokens": None}),
}  # fmt: skip
ALL = {**DECODERS, **ENCODERS, **SEQ2SEQ}


def build(name: str, implementation: str | None = "eager", **changes: Any) -> Any:
    """The model by its name above, with weights large enough for clear margins, in eval mode."""
    import transformers

    model_class, config_class, given = ALL[name]
    settings = {"vocab_size": VOCAB, **TOKENS, **given, **changes}
    config = getattr(transformers, config_class)(**settings)
    if implementation is not None:
        config._attn_implementation = implementation
    torch.manual_seed(1)
    model = getattr(transformers, model_class)(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=1.5 / p.shape[-1] ** 0.5)
        elif "sinks" in next(n for n, x in model.named_parameters() if x is p):
            nn.init.normal_(p)
    return model


def inputs(name: str, padding: str | None = None, seqlen: int = 11) -> dict[str, Any]:
    """A batch of two; the second is shorter with ``padding``, left or right."""
    g = torch.Generator().manual_seed(2)
    if name == "Whisper":
        return {
            "input_features": torch.randn(2, 4, 20, generator=g),
            "decoder_input_ids": torch.randint(3, VOCAB, (2, 6), generator=g),
        }
    ids = torch.randint(3, VOCAB, (2, seqlen), generator=g)
    mask = torch.ones_like(ids)
    if padding:
        hidden = slice(None, 4) if padding == "left" else slice(-4, None)
        ids[1, hidden], mask[1, hidden] = 0, 0
    given = {"input_ids": ids}
    if padding:
        given["attention_mask"] = mask
    if name in SEQ2SEQ:
        given["decoder_input_ids"] = torch.randint(3, VOCAB, (2, 6), generator=g)
    return given

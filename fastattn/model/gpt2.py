"""GPT-2: LayerNorm, learned positions, plain MLP, biases. Hugging Face stores its matrices as (in, out)."""

from __future__ import annotations

from fastattn.model.blocks import MLP, Attention, Decoder, Layer, LayerNorm, Linear
from fastattn.model.config import Fields, ModelConfig, read_activation, read_gguf_ids, read_hf_ids, read_sizes
from fastattn.model.weights import TensorSource, WeightReader

NAME = "gpt2"
HF_CLASSES = ("GPT2LMHeadModel",)
GGUF_ARCHS = ("gpt2",)

HF_PREFIX = "transformer."
HF_TRANSPOSED = ("qkv", "attn_out", "up", "down")
IGNORED = (".attn.bias", ".attn.masked_bias")  # the causal mask, a buffer in old checkpoints

# ModelConfig field: (config.json, GGUF metadata)
KEYS = {
    "vocab_size": ("vocab_size", "gpt2.vocab_size"),
    "hidden_size": ("n_embd", "gpt2.embedding_length"),
    "nlayers": ("n_layer", "gpt2.block_count"),
    "nheads": ("n_head", "gpt2.attention.head_count"),
    "ffn_size": ("n_inner", "gpt2.feed_forward_length"),
    "max_seqlen": ("n_positions", "gpt2.context_length"),
}

# part: (Hugging Face without "transformer.", GGUF)
NAMES = {
    "embedding": ("wte", "token_embd"),
    "positions": ("wpe", "position_embd"),
    "norm": ("ln_f", "output_norm"),
    "head": ("lm_head", "output"),
    "attn_norm": ("h.{}.ln_1", "blk.{}.attn_norm"),
    "qkv": ("h.{}.attn.c_attn", "blk.{}.attn_qkv"),
    "attn_out": ("h.{}.attn.c_proj", "blk.{}.attn_output"),
    "ffn_norm": ("h.{}.ln_2", "blk.{}.ffn_norm"),
    "up": ("h.{}.mlp.c_fc", "blk.{}.ffn_up"),
    "down": ("h.{}.mlp.c_proj", "blk.{}.ffn_down"),
}


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json and generation_config.json."""
    for key, wanted in {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }.items():
        config.require(key, wanted, default=wanted)
    ffn_size = 4 * config.integer("n_embd")  # what a null n_inner means
    sizes = read_sizes(config, {field: keys[0] for field, keys in KEYS.items()}, ffn_size=ffn_size)
    bos_id, eos_ids = read_hf_ids(config, generation_config)
    return ModelConfig(
        arch=NAME,
        **sizes,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        rope=None,
        tie_embeddings=config.flag("tie_word_embeddings", True),
        activation=read_activation(config, "activation_function", "gelu_new"),
        bos_id=bos_id,
        eos_ids=eos_ids,
    )


def gguf_config(fields: Fields, source: TensorSource) -> ModelConfig:
    """From GGUF metadata. Without a vocab_size the embedding's rows count; without a head it is tied."""
    shapes = source.shapes()
    rows = shapes.get("token_embd.weight", (0,))[0]
    keys = {field: keys[1] for field, keys in KEYS.items()}
    sizes = read_sizes(fields, keys, **({"vocab_size": rows} if rows else {}))
    bos_id, eos_ids = read_gguf_ids(fields)
    return ModelConfig(
        arch=NAME,
        **sizes,
        norm_eps=fields.number("gpt2.attention.layer_norm_epsilon"),
        rope=None,
        tie_embeddings="output.weight" not in shapes,
        activation="gelu_tanh",
        bos_id=bos_id,
        eos_ids=eos_ids,
    )


def build(config: ModelConfig, weights: WeightReader) -> Decoder:
    """The decoder, read from the file."""
    hidden, size_q = config.hidden_size, config.nheads * config.headdim

    def norm(part: str, layer: int | None = None) -> LayerNorm:
        weight = weights.vector(part, hidden, layer)  # (hidden,)
        return LayerNorm(weight, weights.vector(part, hidden, layer, "bias"), config.norm_eps)

    def linear(layer: int, cols: int, **rows: int) -> Linear:
        return Linear(*weights.linear(rows, cols, layer, needs_bias=True))

    layers = []
    for i in range(config.nlayers):
        qkv, out = linear(i, hidden, qkv=3 * size_q), linear(i, size_q, attn_out=hidden)
        attn = Attention(qkv, out, config, rotary=None)
        up, down = linear(i, hidden, up=config.ffn_size), linear(i, config.ffn_size, down=hidden)
        mlp = MLP(up, down, config.activation)
        layers.append(Layer(norm("attn_norm", i), attn, norm("ffn_norm", i), mlp))

    embedding = weights.matrix("embedding", config.vocab_size, hidden)  # (vocab, hidden)
    positions = weights.matrix("positions", config.max_seqlen, hidden)  # (max_seqlen, hidden)
    head = weights.head(embedding, config.tie_embeddings)  # (vocab, hidden)
    return Decoder(config, embedding, layers, norm("norm"), Linear(head), positions=positions)

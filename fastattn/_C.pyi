"""The compiled CPU kernels, csrc/bindings.cpp. Addresses and strides are trusted: only ``backends/cpu.py`` calls them.

A view is (address, batch stride, seqlen stride, head stride), strides in elements.
"""

from torch import Tensor

_View = tuple[int, int, int, int]
_Tuple = tuple[object, ...]  # nested, see csrc/binding_params.h
_PerRow = float | tuple[int]  # a number, or (address,) of one per row

def isas() -> list[str]: ...
def isa() -> str: ...
def select_isa(name: str) -> None: ...
def bind_tensor(
    tensor: type, parameter: type, empty_like: object, empty_tokens: object, empty_floats: object
) -> bool: ...
def plain_attention(*call: object) -> Tensor | tuple[Tensor, Tensor] | bool | None: ...
def plain_attention_backward(*call: object) -> bool: ...
def plain_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None,
    cache_seqlens: int | Tensor | None, rotary_cos: Tensor | None, rotary_sin: Tensor | None,
    rotary_interleaved: bool, causal: bool, softmax_scale: float | None, nthreads: int,
) -> Tensor | None: ...  # fmt: skip
def plain_sample(
    logits: Tensor, temperature: object, top_k: object, top_p: object, min_p: object, seeds: object, positions: object,
    repetition_penalty: object, presence_penalty: object, frequency_penalty: object, token_counts: object,
    prompt_mask: object, logit_bias: object, allowed: object, return_logprobs: int, nthreads: int,
) -> Tensor | tuple[Tensor, ...] | None: ...  # fmt: skip

MAX_HEADDIM: int

def attention_forward(call: _Tuple, out: _View, lse: tuple[int, int, int]) -> None: ...
def attention_backward(
    call: _Tuple, out: _View, lse: tuple[int, int, int], dout: _View, dlse: int, delta: int, dq: _View, dk: _View,
    dv: _View, dbias: _Tuple | None,
) -> None: ...  # fmt: skip
def append_kv(call: _Tuple) -> None: ...
def packed_linear_floats(in_features: int, out_features: int, dtype: int) -> int: ...
def pack_linear(
    weight: int, stride_weight: int, bias: int, packed: int, in_features: int, out_features: int, dtype: int,
    nthreads: int,
) -> None: ...  # fmt: skip
def linear(
    x: int, stride_x: int, weights: int, isa: str, out: int, stride_out: int, tokens: int, in_features: int,
    out_features: int, dtype: int, nthreads: int,
) -> None: ...  # fmt: skip
def rms_norm(
    x: int, stride_x: int, weight: int, out: int, tokens: int, hidden: int, eps: float, nthreads: int
) -> None: ...
def activate(
    x: int, stride_x: int, out: int, tokens: int, ffn: int, kind: int, gated: bool, nthreads: int
) -> None: ...
def sample(
    logits: int, stride_batch: int, batch: int, vocab: int, dtype: int, temperature: _PerRow, top_k: _PerRow,
    top_p: _PerRow, min_p: _PerRow, seeds: _PerRow, positions: _PerRow, edits: tuple[object, ...] | None,
    tokens: int, kept: int, logprobs: tuple[int, ...] | None, nthreads: int,
) -> int: ...  # fmt: skip
def speculate(
    draft: tuple[int, int, int], target: tuple[int, int, int], drafted: int, seeds: _PerRow, positions: _PerRow,
    totals: int, tokens: int, accepted: int, batch: int, n: int, vocab: int, dtype: int, nthreads: int,
) -> bool: ...  # fmt: skip
def count_tokens(
    ids: int,
    counts: int,
    lengths: int,
    unseen: int,
    tokens: int,
    batch: int,
    capacity: int,
    unseen_bytes: int,
) -> None: ...
def fma_loop(iterations: int, nthreads: int) -> float: ...
def read_loop(data: int, floats: int, nthreads: int) -> float: ...
def max_loop(data: int, floats: int) -> float: ...

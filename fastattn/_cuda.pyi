"""The compiled CUDA kernels, csrc/bindings_cuda.cpp. Arguments are trusted: only ``backends/cuda.py`` calls them."""

_View = tuple[int, int, int, int]
_Tuple = tuple[object, ...]  # nested, see csrc/binding_params.h

def architectures() -> str: ...
def plan_splits(call: _Tuple) -> tuple[int, int]: ...
def forward_kernel(call: _Tuple) -> str: ...
def attention_forward(
    call: _Tuple, out: _View, lse: tuple[int, int, int], partial_out: int, partial_lse: int, stream: int
) -> None: ...
def attention_backward(
    call: _Tuple,
    out: _View,
    lse: tuple[int, int, int],
    dout: _View,
    dlse: int,
    delta: int,
    dq: _View,
    dk: _View,
    dv: _View,
    dbias: tuple[int, ...] | None,
    stream: int,
) -> None: ...
def append_kv(call: _Tuple, stream: int) -> None: ...
def plan_sampling(batch: int, vocab: int) -> tuple[int, int]: ...
def sample(*call: object) -> None: ...

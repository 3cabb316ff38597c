"""A kernel for test_triton_wgmma.py: two products, as attention has them."""

import triton
import triton.language as tl


@triton.jit
def attend(q, k, v, out, headdim: tl.constexpr, n_rows: tl.constexpr, n_keys: tl.constexpr):
    rows, keys, dims = tl.arange(0, n_rows), tl.arange(0, n_keys), tl.arange(0, headdim)
    a = tl.load(q + rows[:, None] * headdim + dims[None, :])
    b = tl.load(k + keys[:, None] * headdim + dims[None, :])
    scores = tl.dot(a, b.T)
    c = tl.load(v + keys[:, None] * headdim + dims[None, :])
    tl.store(out + rows[:, None] * headdim + dims[None, :], tl.dot(scores.to(tl.float16), c))

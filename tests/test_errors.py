"""Section 5 of the semantics: every refusal names the argument, what was expected and what came."""

from __future__ import annotations

import re

import pytest
import torch

import fastattn
from fastattn import attention, attention_with_kvcache
from fastattn.backends import cpu, reference
from fastattn.flash_attn import flash_attn_qkvpacked_func

q = torch.randn(2, 5, 8, 64)
k = torch.randn(2, 77, 4, 64)
v = torch.randn(2, 77, 4, 64)
meta = torch.device("meta")
cache = torch.zeros(2, 10, 4, 64)
new = torch.zeros(2, 3, 4, 64)
table = torch.zeros(10, 16)
NAMES = ", ".join(fastattn.available_backends())

ATTENTION = [
    ({"k": torch.randn(2, 77, 8, 80)}, ValueError, "k: expected (batch=2, seqlen_k, nheads_k, headdim=64), got (2, 77, 8, 80)"),
    ({"v": torch.randn(2, 76, 4, 64)}, ValueError, "v: expected (batch=2, seqlen_k=77, nheads_k=4, headdim_v), got (2, 76, 4, 64)"),
    ({"q": q[0]}, ValueError, "q: expected (batch, seqlen_q, nheads, headdim), got (5, 8, 64)"),
    ({"q": None}, TypeError, "q: expected a torch.Tensor, got NoneType"),
    ({"q": q.int()}, TypeError, "q: expected dtype float32, bfloat16, float16, float64, got int32"),
    ({"k": k.half()}, TypeError, "k: expected the dtype of q, torch.float32, got torch.float16"),
    ({"v": v.to("meta")}, ValueError, "v: expected the device of q, cpu, got meta"),
    ({"q": torch.randn(2, 5, 6, 64)}, ValueError, "k: expected nheads_k that divides nheads=6, got nheads_k=4"),
    ({"k": k[:, :, :0], "v": v[:, :, :0]}, ValueError, "k: expected nheads_k that divides nheads=8, got nheads_k=0"),
    ({"q": torch.randn(1, 1, 1, 513), "k": torch.randn(1, 1, 1, 513), "v": torch.randn(1, 1, 1, 8)}, ValueError,
     "q: expected headdim from 1 to 512, got 513"),
    ({"v": torch.randn(2, 77, 4, 600)}, ValueError, "v: expected headdim_v from 1 to 512, got 600"),
    ({"causal": 1}, TypeError, "causal: expected a bool, got int"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale: expected a finite number, got nan"),
    ({"window_size": (-2, 0)}, ValueError, "window_size: expected (left, right) with values >= -1, got (-2, 0)"),
    ({"window_size": (1, 2, 3)}, ValueError, "window_size: expected (left, right)"),
    ({"window_size": (1.5, None)}, ValueError, "window_size: expected (left, right)"),
    ({"q": q[:, :, :0]}, ValueError, "q: expected at least 1 head, got 0"),
    ({"softcap": -1.0}, ValueError, "softcap: expected a value in [0.0, 1e+30], got -1.0"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p: expected a value in [0.0, 1.0], got 1.5"),
    ({"softcap": 1.0, "dropout_p": 0.5}, ValueError, "softcap: expected 0 together with dropout_p=0.5, got 1.0"),
    ({"attn_bias": torch.zeros(3, 77)}, ValueError, "attn_bias: expected a shape that broadcasts to (2, 8, 5, 77), got (3, 77)"),
    ({"attn_bias": torch.zeros(5, 77, dtype=torch.bool)}, TypeError, "attn_bias: expected a float dtype, got torch.bool"),
    ({"attn_mask": torch.zeros(5, 77)}, TypeError, "attn_mask: expected dtype bool, got float32"),
    ({"alibi_slopes": torch.zeros(3)}, ValueError, "alibi_slopes: expected (nheads=8,) or (batch=2, nheads=8), got (3,)"),
    ({"alibi_slopes": torch.zeros(8, requires_grad=True)}, ValueError, "alibi_slopes: expected a tensor without requires_grad"),
    ({"sinks": torch.zeros(4)}, ValueError, "sinks: expected (nheads=8), got (4,)"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale: expected a number, got str"),
    ({"window_size": None}, ValueError, "window_size: expected (left, right) with values >= -1, got None"),
    ({"dropout_p": None}, TypeError, "dropout_p: expected a number, got NoneType"),
    ({"dropout_p": 0.1, "rng_state": torch.zeros(2, dtype=torch.int64, device=meta)}, ValueError,
     "rng_state: expected the device of the other tensors, cpu, got meta"),
    ({"attn_bias": [1.0]}, TypeError, "attn_bias: expected a torch.Tensor, got list"),
    ({"attn_bias": torch.zeros(77, device=meta)}, ValueError, "attn_bias: expected the device of the other tensors, cpu, got meta"),
    ({"attn_mask": [True]}, TypeError, "attn_mask: expected a torch.Tensor, got list"),
    ({"attn_mask": torch.ones(77, dtype=torch.bool, device=meta)}, ValueError, "attn_mask: expected the device"),
    ({"alibi_slopes": [1.0]}, TypeError, "alibi_slopes: expected a torch.Tensor, got list"),
    ({"alibi_slopes": torch.zeros(8, device=meta)}, ValueError, "alibi_slopes: expected the device"),
    ({"alibi_slopes": torch.zeros(8, dtype=torch.bool)}, TypeError, "alibi_slopes: expected a float dtype, got torch.bool"),
    ({"sinks": [0.0]}, TypeError, "sinks: expected a torch.Tensor, got list"),
    ({"sinks": torch.zeros(8, device=meta)}, ValueError, "sinks: expected the device"),
    ({"sinks": torch.zeros(8, dtype=torch.int64)}, TypeError, "sinks: expected a float dtype, got torch.int64"),
    ({"backend": "tpu"}, ValueError, "backend: expected one of auto, "),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ATTENTION)
def test_attention(change, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        attention(**{"q": q, "k": k, "v": v, **change})


KVCACHE = [
    ({"k": new}, ValueError, "k, v: expected both or neither, got only k"),
    ({"v": new}, ValueError, "k, v: expected both or neither, got only v"),
    ({"k": new, "v": new, "cache_seqlens": 8}, ValueError,
     "k_cache: expected seqlen_cache >= 11 (cache_seqlens 8 + 3 new), got 10"),
    ({"k": new[:, :, :1], "v": new}, ValueError, "k: expected (batch=2, seqlen_new, nheads_k=4, headdim=64), got (2, 3, 1, 64)"),
    ({"k": new.half(), "v": new.half()}, TypeError, "k: expected the dtype of q, torch.float32, got torch.float16"),
    ({"cache_seqlens": 11}, ValueError, "cache_seqlens: expected a value in [0, 10], got 11"),
    ({"cache_seqlens": 2.5}, TypeError, "cache_seqlens: expected an int or a tensor, got float"),
    ({"q": q[:, :3, :0]}, ValueError, "q: expected at least 1 head, got 0"),
    ({"block_table": torch.zeros(2, 1, dtype=torch.int32), "cache_seqlens": 4, "k": new[0, 0, 0], "v": new[0, 0, 0]},
     ValueError, "k: expected (batch=2, seqlen_new, nheads_k=4, headdim=64), got (64,)"),
    ({"cache_seqlens": torch.tensor([3, -1])}, ValueError, "cache_seqlens: expected a value in [0, 10], got -1"),
    ({"cache_seqlens": torch.tensor([3.0, 1.0])}, TypeError, "cache_seqlens: expected dtype int32, int64, got float32"),
    ({"cache_seqlens": torch.tensor([3])}, ValueError, "cache_seqlens: expected (batch=2), got (1,)"),
    ({"rotary_cos": table}, ValueError, "rotary_cos, rotary_sin: expected both or neither"),
    ({"rotary_cos": table, "rotary_sin": table[:, :8]}, ValueError,
     "rotary_sin: expected (seqlen_rotary=10, half_rotary_dim=16), got (10, 8)"),
    ({"rotary_cos": torch.zeros(10, 40), "rotary_sin": torch.zeros(10, 40)}, ValueError,
     "rotary_cos: expected at most headdim / 2 = 32 columns, got 40"),
    ({"rotary_cos": table[:4], "rotary_sin": table[:4], "k": new, "v": new, "cache_seqlens": 2}, ValueError,
     "rotary_cos: expected at least 5 rows (positions), got 4"),
    ({"k_cache": torch.zeros(2, 10, 64, 4).transpose(2, 3), "k": new, "v": new, "cache_seqlens": 0}, ValueError,
     "k_cache: expected stride(-1) == 1, it is written in place; got strides (2560, 256, 1, 4)"),
    ({"block_table": torch.zeros(2, 1)}, TypeError, "block_table: expected dtype int32, got float32"),
    ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, ValueError, "block_table: expected (batch=2, max_blocks), got (3, 1)"),
    ({"block_table": torch.full((2, 1), 2, dtype=torch.int32)}, ValueError, "block_table: expected pages in [0, 2), got 2"),
    ({"block_table": torch.zeros(2, 1, dtype=torch.int32), "cache_seqlens": 9, "k": new, "v": new}, ValueError,
     "block_table: expected room for 12 tokens, got max_blocks=1 pages of 10"),
    ({"cache_batch_idx": torch.tensor([0, 2])}, ValueError, "cache_batch_idx: expected a value in [0, 1], got 2"),
    ({"cache_leftpad": torch.tensor([0, 5]), "cache_seqlens": 4}, ValueError, "cache_leftpad: expected at most cache_seqlens"),
    ({"cache_batch_idx": torch.tensor([0, 1]), "block_table": torch.zeros(2, 1, dtype=torch.int32)}, ValueError,
     "cache_batch_idx: expected None together with block_table"),
    ({"k_scale": torch.zeros(2, 10, 4)}, ValueError, "k_scale, v_scale: expected both or neither"),
    ({"k_scale": torch.zeros(2, 10, 4), "v_scale": torch.zeros(2, 10, 4)}, ValueError, "k_scale: expected with an int8 cache"),
    ({"num_splits": 1.5}, TypeError, "num_splits: expected an int, got float"),
    ({"block_table": [[0], [1]]}, TypeError, "block_table: expected a torch.Tensor, got list"),
    ({"block_table": torch.tensor(0, dtype=torch.int32)}, ValueError, "block_table: expected (batch=2, max_blocks), got ()"),
    ({"block_table": torch.zeros(2, 1, dtype=torch.int32, device=meta)}, ValueError, "block_table: expected the device"),
    ({"cache_seqlens": torch.tensor([1, 2], device=meta)}, ValueError, "cache_seqlens: expected the device"),
    ({"cache_batch_idx": torch.tensor([0, 1], device=meta)}, ValueError, "cache_batch_idx: expected the device"),
    ({"cache_leftpad": torch.tensor([0, 1], device=meta)}, ValueError, "cache_leftpad: expected the device"),
    ({"rotary_cos": table.to(meta), "rotary_sin": table, "cache_seqlens": 1}, ValueError, "rotary_cos: expected the device"),
    ({"rotary_cos": table, "rotary_sin": table.int(), "cache_seqlens": 1}, TypeError,
     "rotary_sin: expected a float dtype, got torch.int32"),
    ({"k_cache": cache.to(torch.int8), "k_scale": torch.zeros(2, 10, 4, device=meta), "v_scale": torch.zeros(2, 10, 4)},
     ValueError, "k_scale: expected the device"),
    ({"num_splits": -1}, ValueError, "num_splits: expected a value in [0, inf], got -1"),
    ({"k_cache": torch.zeros(2, 10, 5, 64)}, ValueError, "k_cache: expected nheads_k that divides nheads=8, got nheads_k=5"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), KVCACHE)
def test_kvcache(change, error, message):
    call = {"q": q[:, :3], "k_cache": cache, "v_cache": cache, **change}
    if "k_cache" in change:
        call["v_cache"] = change["k_cache"]
    with pytest.raises(error, match="^" + re.escape(message)):
        attention_with_kvcache(**call)


FLASH_ATTN = [
    ({"window_size": None}, ValueError, "window_size: expected (left, right)"),
    ({"window_size": (None, 0)}, ValueError, "window_size: expected (left, right)"),
    ({"dropout_p": "0"}, TypeError, "dropout_p: expected a number, got str"),
    ({"softcap": None}, TypeError, "softcap: expected a number, got NoneType"),
    ({"qkv": None}, TypeError, "qkv: expected a torch.Tensor, got NoneType"),
    ({"qkv": torch.zeros(2, 5, 2, 4, 8)}, ValueError, "qkv: expected (batch, seqlen, 3, nheads, headdim), got (2, 5, 2, 4, 8)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), FLASH_ATTN)
def test_flash_attn(change, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        flash_attn_qkvpacked_func(**{"qkv": torch.zeros(2, 5, 3, 4, 8), **change})


def test_what_a_backend_lacks_is_named(monkeypatch):
    monkeypatch.setattr(cpu, "FEATURES", frozenset({"sinks"}))
    monkeypatch.setattr(cpu, "plain_attention", None)  # it knows what it can
    with pytest.raises(
        NotImplementedError, match=r"^backend 'cpu' lacks 'softcap', 'window'; backends that have it: ref"
    ):
        attention(q, k, v, softcap=3.0, window_size=(3, 3), sinks=torch.zeros(8), backend="cpu")
    assert attention(q, k, v, softcap=3.0).shape == q.shape
    monkeypatch.setattr(reference, "FEATURES", frozenset({"softcap"}))
    with pytest.raises(
        NotImplementedError, match=r"no backend .* \(.*cpu: lacks 'window'; .*reference: lacks 'window'\)"
    ):
        attention(q, k, v, window_size=(3, 3))


def test_forced_by_environment(monkeypatch):
    monkeypatch.setenv("FASTATTN_BACKEND", "cpu")
    monkeypatch.setattr(cpu, "FEATURES", frozenset())
    with pytest.raises(NotImplementedError, match="backend 'cpu' lacks 'softcap'"):
        attention(q, k, v, softcap=2.0)
    monkeypatch.setenv("FASTATTN_BACKEND", "gpu")
    with pytest.raises(ValueError, match=f"backend: expected one of auto, {NAMES}, got 'gpu'"):
        attention(q, k, v)
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    assert attention(q, k, v).shape == q.shape


def test_unknown_isa_turns_the_backend_off(monkeypatch):
    with pytest.raises(ValueError, match=r"FASTATTN_CPU_ISA: expected one of .*baseline, got 'avx1024'"):
        cpu._C.select_isa("avx1024")
    monkeypatch.setattr(cpu, "_ISA_ERROR", "FASTATTN_CPU_ISA: expected one of baseline, got 'avx1024'")
    monkeypatch.setattr(cpu, "plain_attention", None)  # as import would have left it
    assert fastattn.available_backends()["cpu"].startswith("FASTATTN_CPU_ISA")
    for backend in ("cpu", "auto"):  # a forced instruction set does not fall back either
        with pytest.raises(RuntimeError, match="backend 'cpu' cannot run here: FASTATTN_CPU_ISA"):
            attention(q, k, v, backend=backend)
    with pytest.raises(RuntimeError, match="FASTATTN_CPU_ISA"):
        fastattn.cpu_isa()

"""Code written for flash_attn runs: imports, packing and unpacking, rotary embeddings, and a whole layer."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch.nn.functional import pad
from tree import run

import fastattn
from fastattn.integrations.flash_attn import install, uninstall


@pytest.fixture(autouse=True)
def installed():
    install()
    yield
    uninstall()


def test_imports_as_the_package_is_imported():
    import flash_attn
    from flash_attn import flash_attn_func, flash_attn_varlen_func
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
    from flash_attn.flash_attn_interface import flash_attn_with_kvcache
    from flash_attn.layers.rotary import apply_rotary_emb

    assert flash_attn.__version__.startswith("2.8.")
    assert importlib.util.find_spec("flash_attn.bert_padding") is not None
    assert flash_attn_func is fastattn.flash_attn.flash_attn_func
    for fn in (
        flash_attn_varlen_func,
        index_first_axis,
        pad_input,
        unpad_input,
        flash_attn_with_kvcache,
        apply_rotary_emb,
    ):
        assert callable(fn)
    with pytest.raises(ImportError):
        from flash_attn.ops.fused_dense import FusedDense  # noqa: F401
    install()
    assert sys.modules["flash_attn"] is flash_attn
    uninstall()
    assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]


def test_the_real_package_is_left_alone(tmp_path):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("owner = 'somebody else'\n")
    code = (
        "from fastattn.integrations.flash_attn import install\n"
        "import sys\n"
        "for attempt in range(2):\n"
        "    try: install()\n"
        "    except RuntimeError as error: print(error)\n"
        "    import flash_attn\n"
        "print(flash_attn.owner)"
    )
    out = run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path))
    assert out.count("flash_attn: expected no package of that name, got the one at") == 2
    assert "somebody else" in out


def test_a_padded_batch_through_packed_attention():
    from flash_attn import flash_attn_varlen_qkvpacked_func
    from flash_attn.bert_padding import pad_input, unpad_input

    qkv = torch.randn(3, 7, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([7, 2, 5])
    mask = torch.arange(7) < lengths[:, None]
    packed, indices, cu_seqlens, longest, used = unpad_input(qkv, mask)
    assert packed.shape == (14, 3, 2, 8)
    assert cu_seqlens.tolist() == [0, 7, 9, 14]
    assert cu_seqlens.dtype == used.dtype == torch.int32
    assert (longest, used.tolist()) == (7, [7, 2, 5])
    out = pad_input(flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, longest, causal=True), indices, 3, 7)
    q, k, v = qkv.unbind(2)
    expected = fastattn.attention(q, k, v, attn_mask=mask[:, None, None], causal=True) * mask[..., None, None]
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(x.square().sum(), qkv, retain_graph=True)[0] for x in (out, expected)]
    torch.testing.assert_close(*grads)


def test_room_for_tokens_that_do_not_count():
    from flash_attn.bert_padding import unpad_input, unpad_input_for_concatenated_sequences

    x = torch.arange(10.0).view(2, 5)
    mask, unused = (
        torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),
        torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]),
    )
    tokens, indices, cu_seqlens, longest, used = unpad_input(x, mask, unused)
    assert tokens.tolist() == [0, 1, 2, 5]
    assert indices.tolist() == [0, 1, 2, 5]
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 4], 3, [2, 1])
    lengths = torch.tensor([[2, 1, 0, 0, 0], [4, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert tokens.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert (cu_seqlens.tolist(), longest) == ([0, 2, 3, 7], 4)


def test_gathering_is_differentiable():
    from flash_attn.bert_padding import index_first_axis, index_first_axis_residual, index_put_first_axis

    x, index = torch.randn(6, 2, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 5])
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, index), (x,))
    assert torch.autograd.gradcheck(lambda x: index_put_first_axis(x[:3], index, 7), (x,))
    rows, residual = index_first_axis_residual(x, index)
    assert torch.equal(rows, x[index])
    assert torch.equal(residual, x)
    assert not residual.requires_grad


def rotated(x, angle, interleaved):
    """By complex numbers, one token at a time: x (seqlen, nheads, headdim), angle (seqlen, rotary_dim / 2)."""
    half = angle.shape[1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)[:, None]
    parts = torch.stack([z.real, z.imag], dim=-1 if interleaved else -2).flatten(-2)
    return torch.cat([parts, rest], dim=-1)


@pytest.mark.parametrize("rotary_dim", [4, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved, rotary_dim):
    from flash_attn.layers.rotary import apply_rotary_emb

    angle = torch.rand(20, rotary_dim // 2, dtype=torch.float64) * 6
    x = torch.randn(3, 5, 2, 8, dtype=torch.float64, requires_grad=True)
    for offsets in (0, 3, torch.tensor([0, 7, 2])):
        out = apply_rotary_emb(x, angle.cos(), angle.sin(), interleaved, seqlen_offsets=offsets)
        for b in range(3):
            start = int(torch.as_tensor(offsets).expand(3)[b])
            torch.testing.assert_close(out[b], rotated(x[b], angle[start : start + 5], interleaved))
    assert torch.autograd.gradcheck(
        lambda x: apply_rotary_emb(x, angle.cos(), angle.sin(), interleaved), (x,)
    )
    cu = torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    packed = torch.randn(9, 2, 8, dtype=torch.float64)
    out = apply_rotary_emb(
        packed,
        angle.cos(),
        angle.sin(),
        interleaved,
        seqlen_offsets=torch.tensor([1, 0, 4]),
        cu_seqlens=cu,
        max_seqlen=7,
    )
    torch.testing.assert_close(out[:2], rotated(packed[:2], angle[1:3], interleaved))
    torch.testing.assert_close(out[2:], rotated(packed[2:], angle[4:11], interleaved))
    again = packed.clone()
    assert (
        apply_rotary_emb(
            again,
            angle.cos(),
            angle.sin(),
            interleaved,
            inplace=True,
            cu_seqlens=pad(torch.tensor([9]), (1, 0)),
        )
        is again
    )
    torch.testing.assert_close(again, rotated(packed, angle[:9], interleaved))


def test_rotary_errors():
    from flash_attn.layers.rotary import apply_rotary_emb

    x, cos = torch.randn(1, 5, 2, 8), torch.rand(4, 4)
    with pytest.raises(ValueError, match="expected positions up to 4, got seqlen_rotary=4"):
        apply_rotary_emb(x, cos, cos)
    with pytest.raises(ValueError, match=r"cos, sin: expected \(seqlen_rotary, at most 4\)"):
        apply_rotary_emb(x, torch.rand(9, 5), torch.rand(9, 5))
    with pytest.raises(ValueError, match="x: expected"):
        apply_rotary_emb(x[0], cos, cos)

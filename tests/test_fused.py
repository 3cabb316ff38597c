"""rms_norm and silu_mul against float64; and a row's bits depend on neither other rows nor threads."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.fused import rms_norm, silu_mul

WIDTHS = [1, 2, 7, 15, 16, 17, 64, 576, 1537]
TOKENS = [0, 1, 3, 40]
EPS = 1e-5


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Fast on a busy machine; the tests about threads set their own numbers."""
    torch.set_num_threads(1)


def rms64(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(dim=1, keepdim=True) + EPS).sqrt() * weight.double()


def silu64(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("hidden", WIDTHS)
def test_rms_norm_against_float64(isa: str, hidden: int) -> None:
    weight = torch.randn(hidden)
    for tokens in TOKENS:
        x = 3 * torch.randn(tokens, hidden)
        torch.testing.assert_close(rms_norm(x, weight, EPS).double(), rms64(x, weight), rtol=1e-6, atol=1e-7)
    assert torch.equal(rms_norm(torch.zeros(2, hidden), weight, EPS), torch.zeros(2, hidden))


@pytest.mark.parametrize("ffn", WIDTHS)
def test_silu_mul_against_float64(isa: str, ffn: int) -> None:
    for tokens in TOKENS:
        gate_up = 4 * torch.randn(tokens, 2 * ffn)
        torch.testing.assert_close(silu_mul(gate_up).double(), silu64(gate_up), rtol=3e-6, atol=1e-7)


def test_silu_mul_far_out(isa: str) -> None:
    gate = torch.tensor([-1e30, -500.0, -88.0, -50.0, -0.0, 0.0, 50.0, 500.0, 1e30, torch.inf])
    out = silu_mul(torch.cat([gate, torch.ones(10)])[None])[0]
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 50.0, 500.0, 1e30, torch.inf])
    assert torch.allclose(out, expected, rtol=0, atol=1e-6)
    assert silu_mul(torch.tensor([[torch.nan, 1.0]])).isnan().all()


def test_bits_do_not_depend_on_other_rows_or_threads(isa: str) -> None:
    weight = torch.randn(1538)
    x = torch.randn(513, 1538)
    for operation in (lambda rows: rms_norm(rows, weight, EPS), silu_mul):
        torch.set_num_threads(1)
        whole = operation(x)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(operation(x), whole)
            for tokens in (1, 7, 64):
                assert torch.equal(operation(x[200 : 200 + tokens]), whole[200 : 200 + tokens])


def test_strides(isa: str) -> None:
    x, weight = torch.randn(9, 34), torch.randn(34)
    wide, deep, spread = torch.randn(9, 50), x.T.contiguous().T, torch.stack([weight, weight], dim=1)[:, 1]
    wide[:, 5:39] = x
    for same in (wide[:, 5:39], deep):
        assert torch.equal(rms_norm(same, spread, EPS), rms_norm(x, weight, EPS))
        assert torch.equal(silu_mul(same), silu_mul(x))


def test_no_columns(isa: str) -> None:
    assert silu_mul(torch.randn(3, 0)).shape == (3, 0)
    assert rms_norm(torch.randn(3, 0), torch.randn(0), EPS).shape == (3, 0)


def test_reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    x, weight = torch.randn(5, 34), torch.randn(34)
    assert torch.equal(rms_norm(x, weight, EPS), F.rms_norm(x, (34,), weight, EPS))
    torch.testing.assert_close(silu_mul(x).double(), silu64(x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_errors(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", backend)
    x, weight = torch.randn(5, 34), torch.randn(34)

    def refused(error: type[Exception], message: str, call: Callable[..., object], *args: object) -> None:
        with pytest.raises(error, match="^" + re.escape(message)):
            call(*args)

    refused(TypeError, "x: expected a torch.Tensor, got list", rms_norm, [1.0], weight, EPS)
    refused(ValueError, "x: expected (tokens, hidden), got (34,)", rms_norm, weight, weight, EPS)
    refused(ValueError, "weight: expected (hidden=34), got (33,)", rms_norm, x, weight[1:], EPS)
    refused(TypeError, "x: expected dtype float32, got float16", rms_norm, x.half(), weight, EPS)
    refused(TypeError, "weight: expected dtype float32, got float64", rms_norm, x, weight.double(), EPS)
    refused(
        ValueError, "weight: expected the device of x, cpu, got meta", rms_norm, x, weight.to("meta"), EPS
    )
    refused(ValueError, "gate_up: expected (tokens, 2*ffn), got (34,)", silu_mul, weight)
    refused(ValueError, "gate_up: expected (tokens, 2*ffn), got (5, 33)", silu_mul, x[:, 1:])
    refused(TypeError, "gate_up: expected dtype float32, got bfloat16", silu_mul, x.bfloat16())
    refused(NotImplementedError, "gate_up: gradients do not flow", silu_mul, x.requires_grad_())

"""rms_norm and activations against float64; and a row's bits depend on neither other rows nor threads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.fused import ACTIVATIONS, activate, activate_mul, rms_norm

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


def exact(x: Tensor, activation: str) -> Tensor:
    """Of float64 values, written out so that far negative ones keep their digits."""
    x = x.double()
    cubic = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return {
        "silu": x / (1 + torch.exp(-x)),
        "gelu": x * torch.special.erfc(-x / math.sqrt(2)) / 2,
        "gelu_tanh": x / (1 + torch.exp(-2 * cubic)),
        "relu": x.clamp(min=0),
    }[activation]


def exact_mul(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=1)
    return exact(gate, activation) * up


@pytest.mark.parametrize("hidden", WIDTHS)
def test_rms_norm_against_float64(isa: str, hidden: int) -> None:
    weight = torch.randn(hidden)
    for tokens in TOKENS:
        x = 3 * torch.randn(tokens, hidden)
        torch.testing.assert_close(rms_norm(x, weight, EPS).double(), rms64(x, weight), rtol=1e-6, atol=1e-7)
    assert torch.equal(rms_norm(torch.zeros(2, hidden), weight, EPS), torch.zeros(2, hidden))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("ffn", WIDTHS)
def test_activations_against_float64(isa: str, ffn: int, activation: str) -> None:
    for tokens in TOKENS:
        x = 4 * torch.randn(tokens, 2 * ffn)
        alone = activate(x, activation).double()
        torch.testing.assert_close(alone, exact(x, activation), rtol=3e-6, atol=1e-7)
        together = activate_mul(x, activation).double()
        torch.testing.assert_close(together, exact_mul(x, activation), rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_no_less_accurate_than_torch(isa: str, activation: str) -> None:
    x = torch.linspace(-12, 12, 40_001)[None]
    wanted = exact(x, activation)
    ours, torchs = (
        (y.double() - wanted).abs().max() for y in (activate(x, activation), ACTIVATIONS[activation](x))
    )
    assert ours <= torchs + 1e-7
    near = wanted.abs() > 1e-30  # the tail, digit by digit
    assert (activate(x, activation).double() / wanted - 1)[near].abs().max() < 2e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out(isa: str, activation: str) -> None:
    x = torch.tensor([[-1e30, -500.0, -88.0, -50.0, -0.0, 0.0, 50.0, 500.0, 1e30, torch.inf]])
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 50.0, 500.0, 1e30, torch.inf]])
    assert torch.allclose(activate(x, activation), expected, rtol=0, atol=1e-6)
    assert activate(torch.tensor([[torch.nan, 1.0]]), activation)[0].isnan().tolist() == [True, False]


def test_bits_do_not_depend_on_other_rows_or_threads(isa: str) -> None:
    weight = torch.randn(1538)
    x = torch.randn(513, 1538)
    operations: list[Callable[[Tensor], Tensor]] = [lambda rows: rms_norm(rows, weight, EPS)]
    for activation in ACTIVATIONS:
        operations += [partial(activate, activation=activation), partial(activate_mul, activation=activation)]
    for operation in operations:
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
        assert torch.equal(activate_mul(same, "gelu"), activate_mul(x, "gelu"))
        assert torch.equal(activate(same, "gelu"), activate(x, "gelu"))


def test_no_columns(isa: str) -> None:
    assert activate_mul(torch.randn(3, 0), "silu").shape == (3, 0)
    assert activate(torch.randn(3, 0), "silu").shape == (3, 0)
    assert rms_norm(torch.randn(3, 0), torch.randn(0), EPS).shape == (3, 0)


def test_reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    x, weight = torch.randn(5, 34), torch.randn(34)
    assert torch.equal(rms_norm(x, weight, EPS), F.rms_norm(x, (34,), weight, EPS))
    for activation, function in ACTIVATIONS.items():
        assert torch.equal(activate(x, activation), function(x))
        wanted = exact_mul(x, activation)
        torch.testing.assert_close(activate_mul(x, activation).double(), wanted, rtol=1e-5, atol=1e-6)


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
    refused(ValueError, "gate_up: expected (tokens, 2*ffn), got (34,)", activate_mul, weight, "silu")
    refused(ValueError, "gate_up: expected (tokens, 2*ffn), got (5, 33)", activate_mul, x[:, 1:], "silu")
    refused(TypeError, "gate_up: expected dtype float32, got bfloat16", activate_mul, x.bfloat16(), "silu")
    refused(ValueError, "x: expected (tokens, ffn), got (34,)", activate, weight, "silu")
    names = "activation: expected one of silu, gelu, gelu_tanh, relu, got 'tanh'"
    refused(ValueError, names, activate, x, "tanh")
    refused(ValueError, names, activate_mul, x, "tanh")
    refused(NotImplementedError, "gate_up: gradients do not flow", activate_mul, x.requires_grad_(), "silu")

"""PackedLinear against float64, and a token's bits: independent of its batchmates and of the threads."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import _C
from fastattn.linear import PackedLinear

DTYPES = [torch.float32, torch.bfloat16]
# (in_features, out_features): every tail of lanes, panels and bf16 pairs; one chain and several.
SHAPES = [(1, 1), (2, 3), (7, 5), (63, 17), (64, 48), (65, 49), (319, 96), (321, 97), (576, 960), (1537, 50)]
TOKENS = [1, 2, 3, 7, 8, 9, 33]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Fast on a busy machine; the tests about threads set their own numbers."""
    torch.set_num_threads(1)


def make(in_features: int, out_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = (torch.randn(out_features, in_features) / in_features**0.5).to(dtype)
    return weight, torch.randn(out_features)


def truth64(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x rounded to the weight's dtype, as the layer promises; everything after it exact."""
    out = x.to(weight.dtype).double() @ weight.double().T
    return out if bias is None else out + bias.double()


@by_dtype
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES, ids=lambda n: str(n))
def test_against_float64(isa: str, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    weight, bias = make(in_features, out_features, dtype)
    for given in (None, bias):
        layer = PackedLinear(weight, given)
        for tokens in TOKENS:
            x = torch.randn(tokens, in_features)
            out = layer(x)
            assert out.shape == (tokens, out_features)
            assert out.dtype == torch.float32
            truth = truth64(x, weight, given)
            # fp32 sums in chains of hundreds: far inside one rounding of a bf16 result.
            bound = 2e-6 + 4e-7 * in_features**0.5
            assert (out - truth).abs().max() <= bound * (1 + truth.abs().max())


def test_float32_is_as_accurate_as_torch(isa: str) -> None:
    for in_features in (64, 576, 1536, 3072):
        weight, _ = make(in_features, 96, torch.float32)
        x = torch.randn(256, in_features)
        truth = truth64(x, weight)
        error, torchs = (
            (out - truth).square().mean().sqrt() for out in (PackedLinear(weight)(x), F.linear(x, weight))
        )
        assert error <= 2 * torchs + 1e-8


@by_dtype
def test_exact_on_small_integers(isa: str, dtype: torch.dtype) -> None:
    """Every product and sum is representable: a misplaced weight cannot hide in a tolerance."""
    for in_features, out_features in SHAPES:
        weight = torch.randint(-4, 5, (out_features, in_features)).to(dtype)
        bias = torch.randint(-4, 5, (out_features,)).float()
        x = torch.randint(-4, 5, (11, in_features)).float()
        assert torch.equal(PackedLinear(weight, bias)(x).double(), truth64(x, weight, bias))


def test_bfloat16_weights_round_x_to_nearest_even(isa: str) -> None:
    eye = torch.eye(64, dtype=torch.bfloat16)
    x = torch.randn(9, 64)
    x[0, :6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3e38, 1e-30])
    assert torch.equal(PackedLinear(eye)(x), x.bfloat16().float())


@by_dtype
def test_strides(isa: str, dtype: torch.dtype) -> None:
    weight, bias = make(70, 53, dtype)
    x = torch.randn(10, 70)
    expected = PackedLinear(weight, bias)(x)
    wide, deep = torch.randn(10, 200), torch.randn(70, 10)
    wide[:, 3:73] = x
    deep[:] = x.T
    layer = PackedLinear(weight, bias)
    assert torch.equal(layer(wide[:, 3:73]), expected)
    assert torch.equal(layer(deep.T), expected)
    assert torch.equal(layer(x[4:5].expand(6, 70)), expected[4:5].expand(6, 53))
    padded = torch.zeros(53, 99, dtype=dtype)
    padded[:, 5:75] = weight
    biases = torch.zeros(53, 2)
    biases[:, 1] = bias
    for same in (padded[:, 5:75], weight.T.contiguous().T):
        assert torch.equal(PackedLinear(same, biases[:, 1])(x), expected)


def test_no_tokens(isa: str) -> None:
    assert PackedLinear(torch.randn(5, 3))(torch.randn(0, 3)).shape == (0, 5)


def test_infinity_and_nan_stay_in_their_rows_and_columns(isa: str) -> None:
    weight = torch.ones(50, 33)
    weight[49, 32] = torch.nan
    x = torch.ones(9, 33)
    x[4, 32] = torch.inf
    out = PackedLinear(weight)(x)
    assert out[:, 49].isnan().all()
    assert (out[4, :49] == torch.inf).all()
    assert (out[torch.arange(9) != 4, :49] == 33).all()


@by_dtype
@pytest.mark.parametrize(("in_features", "out_features"), [(576, 960), (1537, 50), (33, 1), (768, 129)])
def test_bits_do_not_depend_on_batchmates_or_threads(
    isa: str, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    layer = PackedLinear(*make(in_features, out_features, dtype))
    x = torch.randn(513, in_features)
    torch.set_num_threads(1)
    whole = layer(x)
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(layer(x), whole)
        for tokens in (1, 7, 64):
            for first in (0, 1, 449):
                assert torch.equal(layer(x[first : first + tokens]), whole[first : first + tokens])


@by_dtype
def test_bits_across_groups_of_tokens(isa: str, dtype: torch.dtype) -> None:
    """2100 tokens take several parallel loops; the last is short."""
    layer = PackedLinear(*make(33, 20, dtype))
    x = torch.randn(2100, 33)
    whole = layer(x)
    for first in (0, 1000, 1023, 1024, 2048, 2099):
        assert torch.equal(layer(x[first : first + 1]), whole[first : first + 1])


def test_packing_does_not_depend_on_threads(isa: str) -> None:
    weight, bias = make(130, 201, torch.bfloat16)
    x = torch.randn(5, 130)
    torch.set_num_threads(1)
    expected = PackedLinear(weight, bias)(x)
    torch.set_num_threads(3)
    assert torch.equal(PackedLinear(weight, bias)(x), expected)


def test_weights_of_another_isa_are_refused() -> None:
    isas, before = _C.isas(), _C.isa()
    if len(isas) < 2:
        pytest.skip("this machine has one ISA")
    try:
        _C.select_isa(isas[0])
        layer = PackedLinear(torch.randn(5, 3))
        _C.select_isa(isas[1])
        with pytest.raises(RuntimeError, match=f"packed for ISA '{isas[0]}', but '{isas[1]}' is in use"):
            layer(torch.randn(2, 3))
    finally:
        _C.select_isa(before)


def test_attributes() -> None:
    layer = PackedLinear(torch.randn(96, 576, dtype=torch.bfloat16))
    assert (layer.in_features, layer.out_features, layer.dtype) == (576, 96, torch.bfloat16)
    assert 96 * 576 * 2 <= layer.nbytes <= 1.05 * 96 * 576 * 2
    assert repr(layer) == (
        f"PackedLinear(in_features=576, out_features=96, dtype=torch.bfloat16, kernel={_C.isa()!r})"
    )


@by_dtype
def test_reference_backend(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    weight, bias = make(64, 33, dtype)
    x = torch.randn(7, 64)
    layer = PackedLinear(weight, bias)
    assert torch.equal(layer(x), F.linear(x.to(dtype), weight).float() + bias)
    assert layer.nbytes == weight.nbytes + bias.nbytes
    assert "kernel='torch'" in repr(layer)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = sys.modules["fastattn.backends.cpu"]
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_IMPORT_ERROR", "not built", raising=False)
    weight, x = torch.randn(4, 3), torch.randn(2, 3)
    monkeypatch.delenv("FASTATTN_BACKEND", raising=False)
    assert torch.equal(PackedLinear(weight)(x), F.linear(x, weight))
    monkeypatch.setenv("FASTATTN_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run here: .*not built"):
        PackedLinear(weight)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_errors(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", backend)
    weight, bias, x = torch.randn(5, 3), torch.randn(5), torch.randn(2, 3)
    layer = PackedLinear(weight, bias)

    def refused(error: type[Exception], message: str, call: Callable[..., object], *args: object) -> None:
        with pytest.raises(error, match="^" + re.escape(message)):
            call(*args)

    refused(TypeError, "weight: expected a torch.Tensor, got list", PackedLinear, [1.0])
    refused(ValueError, "weight: expected (out_features, in_features), got (5,)", PackedLinear, bias)
    refused(TypeError, "weight: expected dtype float32, bfloat16, got float64", PackedLinear, weight.double())
    refused(ValueError, "weight: expected sizes of at least 1, got (5, 0)", PackedLinear, weight[:, :0])
    refused(ValueError, "bias: expected (out_features=5), got (4,)", PackedLinear, weight, bias[1:])
    half = bias.half()
    refused(TypeError, "bias: expected dtype float32, bfloat16, got float16", PackedLinear, weight, half)
    refused(ValueError, "bias: expected the device of weight, cpu", PackedLinear, weight, bias.to("meta"))
    refused(TypeError, "x: expected a torch.Tensor, got NoneType", layer, None)
    refused(ValueError, "x: expected (tokens, in_features=3), got (3,)", layer, x[0])
    refused(ValueError, "x: expected (tokens, in_features=3), got (2, 2)", layer, x[:, 1:])
    refused(TypeError, "x: expected dtype float32, got bfloat16", layer, x.bfloat16())
    refused(ValueError, "x: expected the device of weight, cpu, got meta", layer, x.to("meta"))
    refused(NotImplementedError, "x: gradients do not flow", layer, x.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(layer(x.clone().requires_grad_()), layer(x))

"""The layout of wgmma's operands against a third party's: what Triton's compiler stores where, and how it describes that.

Its descriptors, read as the emulator reads ours, must lead to the elements that the product is of; and our tiles and
descriptors must be the same as its, for the same product. No GPU is needed: it compiles ahead of time.
"""

from __future__ import annotations

import ctypes
import subprocess
import warnings
from importlib.util import find_spec

import pytest
from ptx_stores import Product, Word, products
from simt.emulator import CSRC, HERE

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

Q, K, V = range(3)
ROWS, KEYS = 64, 128
LEADING = (
    0x3FFF << 16
)  # of a swizzled operand whose rows are the product's, wgmma ignores it (PTX ISA, "Strides")


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """tests/simt/descriptors.cpp."""
    module = tmp_path_factory.mktemp("descriptors") / "descriptors.so"
    include = [f"-I{CSRC}", f"-I{HERE}"]
    command = [
        "g++",
        "-std=c++17",
        "-O0",
        "-fPIC",
        "-shared",
        *include,
        str(HERE / "descriptors.cpp"),
        "-o",
        str(module),
    ]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(module))
    for name in ("rows_operand_64", "rows_operand_128", "columns_operand_128"):
        getattr(library, name).restype = ctypes.c_uint64
    return library


@pytest.fixture(scope="module", params=[64, 128])
def compiled(request):
    """headdim, and the products of q k^T and then of p v, as Triton makes them for sm_90a."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ptx = compile_products(request.param)
    found = list(products(ptx))
    assert len(found) == request.param // 16 + KEYS // 16
    return request.param, found[: request.param // 16], found[request.param // 16 :]


def compile_products(headdim: int) -> str:
    """Of q (64, headdim), k and v (128, headdim): (q k^T) v."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton_products import attend

    pointers = dict.fromkeys(("q", "k", "v"), "*fp16") | {"out": "*fp32"}
    source = ASTSource(
        attend,
        signature=pointers | dict.fromkeys(("headdim", "n_rows", "n_keys"), "constexpr"),
        constexprs={"headdim": headdim, "n_rows": ROWS, "n_keys": KEYS},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]


def holds(product: Product, address: int, argument: int, element: int) -> bool:
    """Whether 8 elements of an argument from one on lie at a shared address."""
    words = [product.shared.get(address + 4 * i) for i in range(4)]
    return words == [Word(argument, 2 * element + 4 * i) for i in range(4)]


def argument(descriptor: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(descriptor)


def test_its_descriptors_lead_to_its_operands(layout, compiled):
    headdim, scores, outputs = compiled
    for k, product in enumerate(scores):
        assert product.shape == (KEYS, 16)
        assert not product.transposed
        for descriptor, tensor, rows in ((product.a, Q, ROWS), (product.b, K, KEYS)):
            for row in range(rows):
                for chunk in range(2):
                    at = layout.address_of_row(argument(descriptor), row, chunk)
                    assert holds(product, at, tensor, row * headdim + 16 * k + 8 * chunk), (
                        k,
                        tensor,
                        row,
                        chunk,
                    )
    for k, product in enumerate(outputs):
        assert product.shape == (headdim, 16)
        assert product.transposed
        assert product.a is None
        for line in range(16):
            for chunk in range(headdim // 8):
                at = layout.address_of_line(argument(product.b), line, chunk)
                assert holds(product, at, V, (16 * k + line) * headdim + 8 * chunk), (k, line, chunk)


@pytest.mark.parametrize("change", [2, 32 << 32, 3 << 62], ids=["start", "stride", "swizzle of 64 bytes"])
def test_another_descriptor_leads_elsewhere(layout, compiled, change):
    headdim, (product, *_), _ = compiled
    at = [layout.address_of_row(argument(product.a ^ change), row, 0) for row in range(ROWS)]
    assert not all(holds(product, at[row], Q, row * headdim) for row in range(ROWS))


def test_its_tiles_and_descriptors_are_ours(layout, compiled):
    headdim, scores, outputs = compiled
    tiles = (
        (Q, layout.chunk_offset_64, layout.rows_operand_64, [x.a for x in scores], scores[0], ~LEADING),
        (K, layout.chunk_offset_128, layout.rows_operand_128, [x.b for x in scores], scores[0], ~LEADING),
        # With one panel there is nothing for `leading` to lead to.
        (V, layout.chunk_offset_128, layout.columns_operand_128, [x.b for x in outputs], outputs[0],
         ~LEADING if headdim == 64 else ~0),
    )  # fmt: skip
    for tensor, chunk_offset, operand, descriptors, product, mask in tiles:
        tile = (descriptors[0] & 0x3FFF) << 4
        for row in range(ROWS if tensor == Q else KEYS):
            for chunk in range(headdim // 8):
                assert holds(product, tile + chunk_offset(row, chunk), tensor, row * headdim + 8 * chunk)
        ours = [operand(tile, k) for k in range(len(descriptors))]
        assert [x & mask for x in ours] == [x & mask for x in descriptors]
        assert {x >> 62 for x in descriptors} == {1}  # 128 bytes

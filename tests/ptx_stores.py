"""What the threads of a block store to shared memory, by running the PTX of a kernel without branches: integers only.

A register that was loaded from global memory holds where it came from; one that anything else made holds nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

THREADS = 128
SHARED_BASE = 4096  # of global_smem


class Word(NamedTuple):
    """Four bytes of a kernel's argument."""

    argument: int
    offset: int


Value = int | Word | None
Registers = dict[str, Value]
ARGUMENT = 1 << 40  # of the addresses that argument i has: i + 1 times as much


class Product(NamedTuple):
    """A wgmma: its shape, descriptors (a: None if in registers), whether b's rows are summed over, and shared memory then."""

    shape: tuple[int, int]
    a: int | None
    b: int
    transposed: bool
    shared: dict[int, Word]


def products(ptx: str) -> Iterator[Product]:
    """Every wgmma of the kernel, in order."""
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
    threads: list[Registers] = [{"%tid.x": tid, "global_smem": SHARED_BASE} for tid in range(THREADS)]
    shared: dict[int, Word] = {}
    for statement in re.sub(r"//[^\n]*|^\s*[.$@][^\n]*", "", body, flags=re.MULTILINE).split(";"):
        name, _, rest = statement.strip().partition("\t")
        name, _, more = name.partition(" ")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", f"{more} {rest}")
        if name.startswith("wgmma.mma_async"):
            yield _product(name, operands, threads, shared)
        for registers in threads:
            _run(name, operands, registers, shared)


def _product(name: str, operands: list[str], threads: list[Registers], shared: dict[int, Word]) -> Product:
    n, k = map(int, re.search(r"m64n(\d+)k(\d+)", name).groups())  # type: ignore[union-attr]
    descriptors = [
        None if x.startswith("{") else {_value(x, regs) for regs in threads} for x in operands[1:3]
    ]
    a, b = (None if x is None else x.pop() if len(x) == 1 else "differs among threads" for x in descriptors)
    assert isinstance(b, int), b
    assert a is None or isinstance(a, int), a
    return Product((n, k), a, b, operands[-1] == "1", dict(shared))


def _value(operand: str, registers: Registers) -> Value:
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
        return int(operand, 0)
    return registers.get(operand)


def _address(operand: str, registers: Registers) -> int | None:
    base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
    start = _value(base, registers)
    return start + int(offset or 0) if isinstance(start, int) else None


def _run(name: str, operands: list[str], registers: Registers, shared: dict[int, Word]) -> None:
    if name.startswith("st.shared"):
        address = _address(operands[0], registers)
        words = [registers.get(x.strip()) for x in operands[1].strip("{}").split(",")]
        for i, word in enumerate(words):
            assert address is not None
            if isinstance(word, Word):
                shared[address + 4 * i] = word
            else:
                shared.pop(address + 4 * i, None)
        return
    if name.startswith("ld.global"):
        address = _address(operands[1], registers)
        for i, register in enumerate(operands[0].strip("{}").split(",")):
            place = None if address is None else divmod(address + 4 * i, ARGUMENT)
            registers[register.strip()] = place and Word(place[0] - 1, place[1])
        return
    if name.startswith("ld.param"):
        registers[operands[0]] = ARGUMENT * (1 + int(re.search(r"param_(\d+)", operands[1])[1]))  # type: ignore[index]
        return
    values = [_value(x, registers) for x in operands[1:]]
    for register in operands[0].strip("{}").split(",") if operands else ():
        registers[register.strip()] = None
    if name.partition(".")[0] == "mov" and len(values) == 1:
        registers[operands[0]] = values[0]
    elif values and all(isinstance(x, int) for x in values):
        registers[operands[0]] = _arithmetic(name, *values)  # type: ignore[arg-type]


def _arithmetic(name: str, *x: int) -> int | None:
    """None: nothing that an address is made of."""
    operation, *kinds = name.split(".")
    bits = 64 if "wide" in kinds or kinds[-1].endswith("64") or kinds[0] == "u64" else 32
    results = {
        "add": lambda: x[0] + x[1],
        "sub": lambda: x[0] - x[1],
        "neg": lambda: -x[0],
        "and": lambda: x[0] & x[1],
        "or": lambda: x[0] | x[1],
        "xor": lambda: x[0] ^ x[1],
        "shl": lambda: x[0] << x[1],
        "shr": lambda: x[0] >> x[1],
        "mul": lambda: x[0] * x[1],
        "mad": lambda: x[0] * x[1] + x[2],
        "cvt": lambda: x[0],
        "bfe": lambda: _field(kinds[0], *x),
    }
    return results[operation]() & (1 << bits) - 1 if operation in results else None


def _field(kind: str, x: int, first: int, length: int) -> int:
    field = x >> first & (1 << length) - 1
    return field - (1 << length) if kind.startswith("s") and field >> (length - 1) else field

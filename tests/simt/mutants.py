"""Planted bugs: what the tests of the CUDA kernels must see, and which of their checks does.

``python tests/simt/mutants.py --save`` builds every mutant, runs the probes and writes
``benchmarks/results/cuda_mutants.json``; ``tests/test_cuda_mutants.py`` holds the table to what it finds.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "cuda_mutants.json"


@dataclass(frozen=True)
class Mutant:
    """One bug: edits of csrc/cuda files, each of text that occurs there exactly once."""

    name: str
    edits: tuple[tuple[str, str, str], ...]  # (file, old, new)
    family: str = "forward"  # of the kernels that are built with it and looked at

    def plant(self, folder: Path) -> Path:
        """A copy of csrc with the bug."""
        csrc = folder / "csrc"
        shutil.copytree(ROOT / "csrc", csrc)
        for file, old, new in self.edits:
            path = csrc / "cuda" / file
            text = path.read_text()
            assert text.count(old) == 1, f"{self.name}: {file} holds {text.count(old)} times {old!r}"
            path.write_text(text.replace(old, new))
        return csrc


def mutant(name: str, *edits: str) -> Mutant:
    """Edits as file, old, new, file, old, new, ..."""
    return Mutant(name, tuple(zip(edits[::3], edits[1::3], edits[2::3])))


UNITS_OF = {"forward": ("forward", "launch"), "append": ("launch",), "backward": ("backward",)}


def backward(name: str, *edits: str) -> Mutant:
    """Edits of attention_bwd.cuh as old, new, old, new, ..."""
    return Mutant(name, tuple((BACKWARD, old, new) for old, new in zip(edits[::2], edits[1::2])), "backward")


FLAGS = ("-O1", "-w", "-DFASTATTN_CUDA_TYPES=f16_t")  # quick to build
FORWARD, BACKWARD, PRODUCTS, COPY, SEQUENCE, MODIFIERS = (
    "attention_fwd.cuh", "attention_bwd.cuh", "products.cuh", "tile_copy.cuh", "sequence.cuh", "score_modifiers.cuh",
)  # fmt: skip
ARRIVE = """    cp_async_wait<Traits::kStages - 2>();
    block_barrier();
    const int next = tile - (Traits::kStages - 1);
    if (next >= first_tile_) copy_tile<false>(stage == 0 ? Traits::kStages - 1 : stage - 1, next);
    cp_async_commit();
"""
SEND = ARRIVE[ARRIVE.index("    const int next") :]

MUTANTS = [
    mutant("no barrier after the wait", FORWARD, ARRIVE, ARRIVE.replace("    block_barrier();\n", "")),
    mutant(
        "the next tile is sent for before the barrier",
        FORWARD, ARRIVE, SEND + "    cp_async_wait<Traits::kStages - 1>();\n    block_barrier();\n",
    ),
    mutant("waits for a group too few", FORWARD, ARRIVE, ARRIVE.replace("kStages - 2", "kStages - 1")),
    mutant(
        "barrier under a thread condition",
        FORWARD, ARRIVE, ARRIVE.replace("block_barrier()", "if (thread_index() < 96) block_barrier()"),
    ),
    mutant(
        "barrier under a tile condition of one warp",
        FORWARD, ARRIVE, ARRIVE.replace("block_barrier()", "if (thread_index() >= 32 || tile > first_tile_) block_barrier()"),
    ),
    mutant("swapped fragments of V", PRODUCTS, "mma_16816<T>(out[m][2 * n + 1], a[m], b[2], b[3])",
           "mma_16816<T>(out[m][2 * n + 1], a[m], b[3], b[2])"),
    mutant("V read as K is", PRODUCTS, "ldmatrix_x4_trans(b,", "ldmatrix_x4(b,"),
    mutant("accumulator not scaled down", FORWARD, "          out_[m][n][2 * half] *= shrink;\n", ""),
    mutant("stale maximum", FORWARD, "fused_multiply_add(top_[m][half], scale_, -base)",
           "fused_multiply_add(top, scale_, -base)"),
    mutant("maximum of half a row", FORWARD, "        top = maximum(top, shuffle_xor(top, 2));\n", ""),
    mutant("sum of half a row", FORWARD, "        sum += shuffle_xor(sum, 2);\n", ""),
    mutant("rows without keys not guarded", FORWARD, "may_be_empty && top == -kInfinity ? 0.0f : top * scale_",
           "top * scale_"),
    mutant("a boundary tile counts as open", FORWARD, "open_last = open_end / kKeys",
           "open_last = (open_end + kKeys - 1) / kKeys"),
    mutant("a tile at the window's left counts as open", FORWARD, "(open_begin + kKeys - 1) / kKeys", "open_begin / kKeys"),
    mutant("last tile skipped", FORWARD, "first_tile_ = range_.begin / kKeys", "first_tile_ = (range_.begin + 1) / kKeys"),
    mutant("no warp barrier before out is read back", PRODUCTS, "  warp_barrier();\n  constexpr int kLinesAtOnce",
           "  constexpr int kLinesAtOnce"),
    mutant("rows beyond the sequence are written", FORWARD, "return row < sequence_.rows() ?", "return row < 1 << 30 ?"),
    mutant("sink in every split", FORWARD, "if (!is_split() && p_.sinks && exists)", "if (p_.sinks && exists)"),
    mutant("off by one at the end of a split", FORWARD, "split_begin_ + keys);\n", "split_begin_ + keys - 1);\n"),
    mutant("last split not combined", "combine.cuh", "splits = split_count(sequence.seqlen_k)",
           "splits = at_least(1, split_count(sequence.seqlen_k) - 1)"),
    mutant("keys beyond the sequence are copied", COPY, "const bool exists = !edge || key + row_ + r < seqlen_k",
           "const bool exists = true"),
    mutant("queries beyond the sequence are copied", COPY, "exists = first + line < sequence.rows()", "exists = true"),
    mutant("columns past headdim not zeroed", COPY, "        cp_async16(tile + column_target(c)",
           "        if (chunk_ + c * Traits::kRowLanes < chunks_) cp_async16(tile + column_target(c)"),
    mutant("the page of the token before", COPY, "page = token / page_size;", "page = (token ? token - 1 : 0) / page_size;"),
    mutant("left padding forgotten in pages", COPY, "first_ = sequence.kv_first", "first_ = 0"),
    mutant("lost swizzle", "traits.cuh", "((chunk % 4) ^ (row / 2 % 4)) * 16", "(chunk % 4) * 16",
           "traits.cuh", "(chunk ^ (row / 2 % 4)) * 16", "chunk * 16"),
    mutant("rows of odd panels not swapped", "traits.cuh", "(row ^ (panel & 1)) * kPanelBytes", "row * kPanelBytes",
           "traits.cuh", "return static_cast<uint32_t>(n % 4) * 32", "return static_cast<uint32_t>(n % 2) * 32"),
    mutant("causal edge off by one", SEQUENCE, "place(i) + right + 1", "place(i) + right"),
    mutant("window edge off by one", SEQUENCE, "place(i) - left));", "place(i) - left + 1));"),
    mutant("causal mask aligned top left", SEQUENCE, "return query + seqlen_k - seqlen_q", "return query"),
    mutant("every head of a group reads as the first", SEQUENCE, "(group == 1 ? 0 : row % group)", "0"),
    mutant("bias in natural units", MODIFIERS, "maximum(kLowestFloat, bias * kLog2eFloat)", "bias"),
    mutant("ALiBi without its sign", MODIFIERS, "s -= slope_ * absolute(", "s -= slope_ * ("),
    mutant("softcap after the bias", MODIFIERS, "1 + exp2_approx(s * to_exponent_)", "1 + exp2_approx(s * to_exponent_ / 2)"),
    mutant("mask inverted", MODIFIERS, "!load_global(score_line<uint8_t>", "load_global(score_line<uint8_t>"),
    mutant("dropout words of the other row", MODIFIERS, "odd ? mine.word[e] : mine.word[2 + e]",
           "odd ? mine.word[2 + e] : mine.word[e]"),
    mutant("dropout in the denominator", FORWARD, "    soften<may_mask>(scores);\n",
           "    if constexpr (Policy::kDropout) drop(scores, at);\n    soften<may_mask>(scores);\n"),
    Mutant("rotary turns the wrong way", (("kv_append.cuh", "second ? partner * sin", "second ? -partner * sin"),), "append"),
    Mutant("rotary position counts the left padding", (("kv_append.cuh", "position = end - first +", "position = end +"),), "append"),
    Mutant("appended one place late", (("kv_append.cuh", "end + row, head)", "end + row + 1, head)"),), "append"),
    backward("no barrier after a tile's wait", "    block_barrier();\n", ""),
    backward("gradients: waits for a group too few", "cp_async_wait<Traits::kStages - 2>()", "cp_async_wait<Traits::kStages - 1>()"),
    backward("gradients: the next tile overwrites this one", "send(stage == 0 ? Traits::kStages - 1 : stage - 1, next)",
             "send(stage, next)"),
    backward("statistics land after the barrier", "    land(stage);\n", "",
             "    step(stage, i);\n", "    land(stage);\n    step(stage, i);\n"),
    backward("statistics of the tile before", "this->statistics(stage) + static_cast<uint32_t>(at.row(r)",
             "this->statistics(1 - stage) + static_cast<uint32_t>(at.row(r)"),
    backward("gradients: swapped fragments of a key", "mma_16816<T>(scores[0][2 * n + 1], a, b[2], b[3])",
             "mma_16816<T>(scores[0][2 * n + 1], a, b[3], b[2])"),
    backward("delta forgotten", "d) - statistics.y)", "d))"),
    backward("dlse forgotten", "if (call.dlse) sum -=", "if (false) sum -="),
    backward("dK unscaled", "p_.headdim, static_cast<float>(p_.softmax_scale));", "p_.headdim, 1.0f);"),
    backward("dQ unscaled", "*= static_cast<float>(p_.softmax_scale)", "*= 1.0f"),
    backward("dV not scaled for dropout", "Policy::kDropout ? dropout_scale(p_.dropout_p) : 1.0f);\n  }", "1.0f);\n  }"),
    backward("dropped probabilities reach dV", "s = kept_share == 0 ? 0.0f : s;", "(void)kept_share;"),
    backward("the softcap's slope forgotten", "d = ds * slope;", "d = ds;"),
    backward("a boundary tile of keys counts as open", "open_last = range.open_end / kKeys",
             "open_last = (range.open_end + kKeys - 1) / kKeys"),
    backward("a boundary tile of rows counts as open", "first_row < range.open_begin ||", "first_row + 8 < range.open_begin ||"),
    backward("the last tile of rows skipped", "(range.end - range.begin + kRows - 1) / kRows,", "(range.end - range.begin) / kRows,"),
    backward("gradients of keys beyond the sequence are written", "return key < sequence_.seqlen_k\n", "return key < 1 << 30\n"),
    backward("statistics of rows beyond the sequence are read", "if (row >= sequence_.rows()) return {kInfinity, 0.0f};\n", ""),
    backward("a row that sees nothing has weights", "{lse == -kInfinity ? kInfinity : lse", "{lse == -kInfinity ? 0.0f : lse"),
    Mutant("rows of a window's keys off by one", ((SEQUENCE, "row(sees(last) + left + 1)", "row(sees(last) + left)"),), "backward"),
    Mutant("dropout words of the other key", ((MODIFIERS, "const int wanted = mine ^ other;", "const int wanted = other;"),), "backward"),
]  # fmt: skip

# One of each kind, which every run plants; the others are marked slow.
CORE = {
    "no barrier after the wait", "the next tile is sent for before the barrier", "waits for a group too few",
    "barrier under a thread condition", "swapped fragments of V", "accumulator not scaled down", "stale maximum",
    "a boundary tile counts as open", "off by one at the end of a split", "keys beyond the sequence are copied",
    "columns past headdim not zeroed", "the page of the token before", "lost swizzle", "causal edge off by one",
    "appended one place late",
    "no barrier after a tile's wait", "gradients: the next tile overwrites this one", "statistics land after the barrier",
    "gradients: swapped fragments of a key", "delta forgotten", "dK unscaled", "dropped probabilities reach dV",
    "a boundary tile of keys counts as open", "a boundary tile of rows counts as open", "the last tile of rows skipped",
    "gradients of keys beyond the sequence are written", "dropout words of the other key",
}  # fmt: skip


def witnesses(mutant: Mutant | None, bindings: Path, folder: Path) -> list[str]:
    """The checks that see something wrong, in the order of their names."""
    from simt.emulator import Emulator, compile_units, link
    from simt.probes import PROBES

    objects = dict(healthy_units(bindings))
    families = list(PROBES)
    if mutant is not None:
        families = [mutant.family]
        objects |= compile_units(folder, mutant.plant(folder), (64,), FLAGS, UNITS_OF[mutant.family])
    emulator = Emulator(link(folder, bindings, objects))
    return sorted(set().union(*(PROBES[family](emulator) for family in families)))


@functools.cache
def healthy_units(bindings: Path) -> dict[str, Path]:
    """The object files without a bug, which stand beside those with one."""
    from simt.emulator import compile_units

    folder = bindings.parent / "healthy"
    folder.mkdir()
    return compile_units(folder, headdims=(64,), flags=FLAGS)


def main() -> None:
    """The table: printed, and saved if asked."""
    from simt.emulator import compile_bindings

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    save = parser.parse_args().save
    table = {}
    with tempfile.TemporaryDirectory() as name:
        bindings = compile_bindings(Path(name))
        assert witnesses(None, bindings, Path(name)) == []
        for number, bug in enumerate(MUTANTS):
            folder = Path(name) / str(number)
            folder.mkdir()
            table[bug.name] = witnesses(bug, bindings, folder)
            print(f"{bug.name}: {', '.join(table[bug.name]) or 'SURVIVED'}", flush=True)
    if save:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    main()

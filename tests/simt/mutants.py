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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a script that lies here
from simt import float_mutants

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "cuda_mutants.json"


@dataclass(frozen=True)
class Mutant:
    """One bug: edits of csrc/cuda files, each of text that occurs there exactly once."""

    name: str
    edits: tuple[tuple[str, str, str], ...]  # (file, old, new)
    family: str  # of the kernels that are built with it and looked at: a key of UNITS_OF

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
    return of_family(FAMILY_OF.get(edits[0], "forward"), name, *edits)


def of_family(family: str, name: str, *edits: str) -> Mutant:
    """The same, where the file does not tell the family."""
    return Mutant(name, tuple(zip(edits[::3], edits[1::3], edits[2::3])), family)


def backward(name: str, *edits: str) -> Mutant:
    """Edits of attention_bwd.cuh as old, new, old, new, ..."""
    return Mutant(name, tuple((BACKWARD, old, new) for old, new in zip(edits[::2], edits[1::2])), "backward")


# The units of the emulator's build that hold a family's kernels.
UNITS_OF = {
    "forward": ("forward", "launch"),
    "products_f32": ("forward",),
    "hopper": ("hopper",),
    "append": ("launch",),
    "sampling": ("sampling",),
    "backward": ("backward",),
    "backward_f32": ("forward", "backward", "launch"),
}
FLOAT_FAMILIES = ("products_f32", "backward_f32")
HEADDIM_OF = dict.fromkeys(UNITS_OF, 64) | {"backward_f32": 256}  # where warps share lines
(
    FORWARD, BACKWARD, PRODUCTS, COPY, SEQUENCE, MODIFIERS, APPEND, SAMPLING, ROW, REDUCE, EDITS, LOGPROBS, SOFTMAX,
    PLACES, HOPPER, HOPPER_TILES, BLOCK,
) = (
    "attention_fwd.cuh", "attention_bwd.cuh", "products.cuh", "tile_copy.cuh", "sequence.cuh", "score_modifiers.cuh",
    "kv_append.cuh", "sampling.cuh", "sampling_row.cuh", "sampling_reduce.cuh", "sampling_edits.cuh",
    "sampling_logprobs.cuh", "online_softmax.cuh", "forward_params.cuh",
    "attention_fwd_sm90.cuh", "hopper_tiles.cuh", "backward_block.cuh",
)  # fmt: skip
FAMILY_OF = {APPEND: "append", HOPPER: "hopper", HOPPER_TILES: "hopper"} | dict.fromkeys(
    (SAMPLING, ROW, REDUCE, EDITS, LOGPROBS), "sampling"
)
ARRIVE = """    cp_async_wait<Traits::kStages - 2>();
    block_barrier();
    const int next = tile - (Traits::kStages - 1);
    if (next >= first_tile_) copy_tile<false>(stage == 0 ? Traits::kStages - 1 : stage - 1, next);
    cp_async_commit();
"""
SEND = ARRIVE[ARRIVE.index("    const int next") :]
LAND, STEP = "      land(i % Traits::kStages);\n", "      step(masked, i % Traits::kStages, i);\n"

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
    mutant("accumulator not scaled down", SOFTMAX, "out[m][n][e] *= factors[m][e / 2]", "out[m][n][e] *= e == 0 ? 1.0f : factors[m][e / 2]"),
    mutant("stale maximum", SOFTMAX, "fused_multiply_add(top_[m][half], scale_, -base)",
           "fused_multiply_add(top, scale_, -base)"),
    mutant("maximum of half a row", SOFTMAX, "        top = maximum(top, shuffle_xor(top, 2));\n", ""),
    mutant("sum of half a row", SOFTMAX, "    sum += shuffle_xor(sum, 2);\n", ""),
    mutant("rows without keys not guarded", SOFTMAX, "may_be_empty && top == -kInfinity ? 0.0f : top * scale_",
           "top * scale_"),
    mutant("a boundary tile counts as open", PLACES, "open_last = open_end / keys",
           "open_last = (open_end + keys - 1) / keys"),
    mutant("a tile at the window's left counts as open", PLACES, "(open_begin + keys - 1) / keys", "open_begin / keys"),
    mutant("last tile skipped", PLACES, "first = range.begin / keys", "first = (range.begin + 1) / keys"),
    mutant("no warp barrier before out is read back", PRODUCTS, "  warp_barrier();\n  constexpr int kLinesAtOnce",
           "  constexpr int kLinesAtOnce"),
    mutant("rows beyond the sequence are written", FORWARD, "return row < sequence_.rows() ? row", "return row < 1 << 30 ? row"),
    mutant("sink in every split", FORWARD, "is_split() ? nullptr : static_cast<const float*>(p_.sinks)", "static_cast<const float*>(p_.sinks)"),
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
    mutant("dropout in the denominator", FORWARD, "    RowFactors<Traits> shrink;\n",
           "    if constexpr (Policy::kDropout) drop(scores, at);\n    RowFactors<Traits> shrink;\n"),
    mutant("keys of a stage that is not empty", HOPPER, "    mbarrier_wait(shared_.keys_empty(stage), place_.parity ^ 1);\n", ""),
    mutant("values of a stage that is not empty", HOPPER,
           "    mbarrier_wait(shared_.values_empty(stage), place_.parity ^ 1);\n", ""),
    mutant("the other parity of an empty stage", HOPPER, "values_empty(stage), place_.parity ^ 1", "values_empty(stage), place_.parity"),
    mutant("parity that never turns", HOPPER_TILES, "      parity ^= 1;\n", ""),
    mutant("multiplies keys before they landed", HOPPER,
           "    await(shared_.keys_full(k_place_.stage), k_place_.parity);\n    pin_operands();", "    pin_operands();"),
    mutant("multiplies the last values before they landed", HOPPER,
           "    await(shared_.values_full(v_place_.stage), v_place_.parity);\n    pin_operands();", "    pin_operands();"),
    mutant("no fence between copies and wgmma", HOPPER, "    mbarrier_wait(full, parity);\n    fence_proxy_async();",
           "    mbarrier_wait(full, parity);"),
    mutant("no fence between registers and wgmma", HOPPER, "    wgmma_fence();\n    multiply_keys(scores);\n    add_values();",
           "    multiply_keys(scores);\n    add_values();"),
    mutant("S read while it is multiplied", HOPPER, "    wgmma_wait<1>();", "    wgmma_wait<2>();"),
    mutant("out scaled while V is multiplied", HOPPER,
           "    wgmma_wait<0>();\n    pin_operands();\n    release(shared_.values_empty", "    pin_operands();\n    release(shared_.values_empty"),
    mutant("values given back while they are multiplied", HOPPER,
           "    wgmma_wait<0>();\n    pin_operands();\n    release(shared_.values_empty(v_place_.stage));\n",
           "    release(shared_.values_empty(v_place_.stage));\n    wgmma_wait<0>();\n    pin_operands();\n"),
    mutant("two lanes of a warp give a stage back", HOPPER, "if (thread_index() % 32 == 0) mbarrier_arrive(empty)",
           "if (thread_index() % 32 < 2) mbarrier_arrive(empty)"),
    mutant("stride of half the rows in a descriptor", HOPPER_TILES, "matrix_descriptor(tile, 16, kEightRows)", "matrix_descriptor(tile, 16, kEightRows / 2)"),
    mutant("descriptor of the next columns", HOPPER_TILES, "k % 4 * 32)", "k % 4 * 64)"),
    mutant("lost swizzle of 128 bytes", HOPPER_TILES, "((chunk % 8) ^ (row % 8)) * 16", "(chunk % 8) * 16"),
    mutant("swapped fragments of P", HOPPER,
           "scores[0][2 * k + i / 2][i % 2 * 2], scores[0][2 * k + i / 2][i % 2 * 2 + 1]",
           "scores[0][2 * k + i % 2][i / 2 * 2], scores[0][2 * k + i % 2][i / 2 * 2 + 1]"),
    mutant("S added to the tile before", HOPPER, "                    k > 0);", "                    true);"),
    mutant("wgmma: accumulator not scaled down", HOPPER, "    scale_rows<Traits>(out_, shrink);\n", ""),
    mutant("wgmma: masks where none are needed", HOPPER, "if (may_mask && masked) hide", "if (may_mask && !masked) hide"),
    mutant("V of the last tile forgotten", HOPPER, "    end();\n", ""),
    mutant("out takes the place of q that is read", HOPPER,
           "    named_barrier(1 + group_, kThreads);  // q has been read: out takes its place\n", ""),
    mutant("no fence before out is stored in bulk", HOPPER, "    fence_proxy_async();\n    warp_barrier();", "    warp_barrier();"),
    mutant("wgmma: rows beyond the sequence are written", HOPPER, "lane < 16 && row < sequence_.rows()", "lane < 16"),
    mutant("rotary turns the wrong way", APPEND, "second ? partner * sin", "second ? -partner * sin"),
    mutant("rotary position counts the left padding", APPEND, "position = end - first +", "position = end +"),
    mutant("appended one place late", APPEND, "end + row, head)", "end + row + 1, head)"),
    mutant("rotary partner on the wrong side", APPEND, "second ? d - step : d + step", "second ? d - step : d + step + 1"),
    mutant("interleaved pairs read as halves", APPEND, "const int step = p.interleaved ? 1 : half;", "const int step = half;"),
    mutant("rotary reaches past its dimensions", APPEND, "d >= 2 * half) return own", "d > 2 * half) return own"),
    mutant("angles of the first position for every row", APPEND, "p.rotary_sin + position * half + pair",
           "p.rotary_sin + (position ? 1 : 0) * half + pair"),
    mutant("a query at the length turns by its own row", APPEND, "is_query && !p.q_per_row ? 0 : row", "row"),
    mutant("keys take the query's position", APPEND, "is_query && !p.q_per_row ? 0 : row", "p.q_per_row ? row : 0"),
    mutant("the cache row of the batch, not of its index", APPEND, "kv.batch_idx ? load_global(kv.batch_idx + batch) : batch",
           "batch"),
    mutant("append to the page of the token before", APPEND, "page = token / page_size;",
           "page = (token ? token - 1 : 0) / page_size;"),
    mutant("place within a page forgotten", APPEND, "token - page * page_size, head", "token % 8, head"),
    mutant("the first sequence's block table", APPEND, "kv.block_table + batch * kv.stride_block_table + page",
           "kv.block_table + page"),
    mutant("values turned like keys", APPEND, "is_value ? load_global(from + d) : turned", "is_value && d > 30 ? load_global(from + d) : turned"),
    mutant("values as long as keys", APPEND, "static_cast<int>(is_value ? p.headdim_v : p.headdim)",
           "static_cast<int>(p.headdim)"),
    mutant("warps without a row go on", APPEND, "if (is_value && place >= append_key_rows(p)) return;", ""),
    mutant("query heads counted as key heads", APPEND, "is_query ? p.nheads : p.nheads_k", "p.nheads_k"),
    mutant("q written where it came from", APPEND, "row_pointer<T>(p.q_out, batch, row, head)",
           "row_pointer<T>(p.q, batch, row, head)"),
    *(of_family("products_f32", *bug) for bug in float_mutants.FORWARD_BUGS),

    mutant("digits counted before the buckets are clear", ROW, "    Histogram::clear();\n    block_barrier();\n",
           "    Histogram::clear();\n"),
    mutant("buckets read before they are full", ROW,
           "    block_barrier();\n    store_global(findings() + thread_index()", "    store_global(findings() + thread_index()"),
    mutant("no barrier between steps", ROW, "return;\n    block_barrier();", "return;"),
    mutant("crossing read before it is written", REDUCE, "  }\n  block_barrier();\n  return {", "  }\n  return {"),
    mutant("totals read before they are written", REDUCE, "word_at(kTotalsAt + warp), total);\n  block_barrier();",
           "word_at(kTotalsAt + warp), total);"),
    mutant("warps' parts read before they are written", REDUCE, "mine[i]);\n  block_barrier();", "mine[i]);"),
    mutant("barrier of the first warp's threads", REDUCE, "mine[i]);\n  block_barrier();",
           "mine[i]);\n  if (warp == 0) block_barrier();"),
    mutant("low words that wrap carry nothing", REDUCE, " + (before + added < before)", ""),
    mutant("the high words left out", REDUCE, "(static_cast<uint64_t>(load_shared4(low + kWords * 4)) << 32)",
           "(static_cast<uint64_t>(load_shared4(low + kWords * 4)) << 31)"),
    mutant("a bucket's copies in one bank", REDUCE, "(i + bucket / 4) % kCopies", "i"),
    mutant("one copy too few", REDUCE, "for (int i = 0; i < kCopies; ++i) {", "for (int i = 1; i < kCopies; ++i) {"),
    mutant("the target itself is above", REDUCE, "above < target && target <= above + own",
           "above <= target && target < above + own"),
    mutant("weights above of the lower half", REDUCE, "if (!(lane & mask)) above", "if (lane & mask) above"),
    mutant("later warps' totals forgotten", REDUCE, "int w = warp + 1; w < kSampleWarps", "int w = warp + 1; w < warp"),
    mutant("the larger id among equals", ROW, "<< kIdBits | (kIdMask - static_cast<uint32_t>(id))",
           "<< kIdBits | static_cast<uint32_t>(id)", ROW,
           "static_cast<int>(kIdMask - (static_cast<uint32_t>(rank) & kIdMask))",
           "static_cast<int>(static_cast<uint32_t>(rank) & kIdMask)"),
    mutant("negative zero below zero", ROW, "to_float(load_global(logits_ + id)) + 0.0f", "to_float(load_global(logits_ + id))"),
    mutant("reads past the row", ROW, "x[i] = id < end ? to", "x[i] = id < end + 1 ? to"),
    mutant("the last tokens of a slice left out", ROW, "x[i] = id < end ? to", "x[i] = id < end - 1 ? to"),
    mutant("blocks take the same slice", ROW, "first = block_ * p_.slice", "first = 0 * p_.slice"),
    mutant("only the first block is heard", ROW, "for (int block = 0; block < p_.blocks; ++block) {\n      uint64_t one",
           "for (int block = 0; block < 1; ++block) {\n      uint64_t one"),
    mutant("the board's sides are not taken by turns", ROW, "number % 2", "0 * number"),
    mutant("rows share a board", ROW, "(int64_t{row_} * 2 + number % 2)", "(number % 2)"),
    mutant("top_k counts what it has ruled out", ROW, "s->target -= crossing.above", "s->target -= 0"),
    mutant("mass of what top_k dropped", SAMPLING, "if (rank_of(x[i], id + 32 * i) >= s.cut) total[0]",
           "if (x[i] > kMinusInfinity) total[0]"),
    mutant("ties kept by halves", ROW, "s->target = (s->target + weight - 1)", "s->target = s->target"),
    mutant("tokens without mass kept beside the last that has some", ROW,
           "!s->by_mass && s->target == crossing.weight", "s->target == crossing.weight"),
    mutant("the cut of top_p replaces that of top_k", ROW, "rank > s->cut ? rank : s->cut", "rank"),
    mutant("top_p left out after top_k", SAMPLING, "    else\n      filter_nucleus(s);\n  }\n\n  FASTATTN_DEVICE void filter",
           "    else\n      s->stage = draw();\n  }\n\n  FASTATTN_DEVICE void filter"),
    mutant("min_p forgotten in the draw", SAMPLING, " || log_odds(logit, s.max) < log_min_p) continue", ") continue"),
    mutant("min_p on the wrong side", SAMPLING, "!(log_odds(x[i], s.max) < log_min_p)", "!(log_odds(x[i], s.max) <= log_min_p)"),
    mutant("every token pays its own clock", SAMPLING, "if (!has_least_clock(token, group.word[2])) {", "{"),
    mutant("noise of the place, not of the token", SAMPLING, "noise.block(token, kTokenDomain)", "noise.block(token % 256, kTokenDomain)"),
    mutant("a bound of the noise that is too low", SAMPLING, "fused_multiply_add(v * v, 0.5f, v) / kNoiseGroup",
           "fused_multiply_add(v * v, 0.5f, v + 0.1f) / kNoiseGroup"),
    mutant("a group bounded by its first token", SAMPLING, "top = maximum(top, x[i]);", "top = x[0];"),
    mutant("seed of the first row", SAMPLING, "p_.seeds.of(row_)", "p_.seeds.of(0)"),
    mutant("position without its upper half", SAMPLING, "static_cast<uint64_t>(p_.positions.of(row_))",
           "static_cast<uint64_t>(p_.positions.of(row_)) & 0xffffffff"),
    mutant("infinity taken for a logit", ROW, "found[3] |= x[i] != x[i] ? 1u : 2u;", "found[3] |= x[i] != x[i] ? 1u : 0u;"),
    mutant("greedy rows are drawn", SAMPLING, "temperature_ == 0.0 || top_k == 1", "top_k == 1"),
    mutant("kept bytes past the row", SAMPLING, "if (id + 32 * i < p_.vocab) {", "{"),

    mutant("listed tokens edited before all tokens are", EDITS, "    block_barrier();  // what follows writes some of them anew\n", ""),
    mutant("biased tokens edited before the seen ones are", EDITS, "    edit_seen();\n    block_barrier();\n", "    edit_seen();\n"),
    mutant("the last token of a slice not edited", EDITS, "id < end_; id += kEditThreads) write", "id < end_ - 1; id += kEditThreads) write"),
    mutant("the last seen token of a slice left out", EDITS, "count_below(seen_ids_, seen_n_, end_)", "count_below(seen_ids_, seen_n_, end_ - 1)"),
    mutant("as many seen tokens as the first row has", EDITS, "p.edits.seen_n + block_index_x()", "p.edits.seen_n"),
    mutant("counts of the first row", EDITS, "row_of(p.edits.counts, block_index_x())", "row_of(p.edits.counts, 0)"),
    mutant("every bias of a token taken for its first", EDITS, "      if (i > 0 && load_global(bias_ids_ + i - 1) == id) continue;\n", ""),
    mutant("only the first bias of a token", EDITS, "for (int j = i; j < last &&", "for (int j = i; j < i + 1 &&"),
    mutant("biased tokens pay no penalties", EDITS, "if (at == seen_n_ ||", "if (at >= 0 ||"),
    mutant("tokens of the prompt count as unseen", EDITS, "count > 0 || (prompt_ && load_global(prompt_ + id))", "count > 0"),
    mutant("NaN hidden by the mask", EDITS, " || logit != logit;", ";"),
    mutant("ids that are none not noticed", EDITS, "return bias_n_ > 0 && (", "return bias_n_ < 0 && ("),
    mutant("packed bits from the other end", EDITS, ">> id % 8 & 1", ">> (7 - id % 8) & 1"),
    mutant("the edited row has the stride of logits", EDITS, "p.edited + int64_t{block_index_x()} * p.vocab", "p.edited + int64_t{block_index_x()} * p.stride_batch"),
    mutant("slots given before the counter is zero", LOGPROBS, "store_shared4(word_at(kCounterAt), 0);\n    block_barrier();", "store_shared4(word_at(kCounterAt), 0);"),
    mutant("blocks collect into the same slots", LOGPROBS, "block < block_; ++block) ranks +=", "block < 0; ++block) ranks +="),
    mutant("a token is ahead of itself", LOGPROBS, "load_global(ranks + j) > rank", "load_global(ranks + j) >= rank"),
    mutant("the best include nothing that is not finite", LOGPROBS, "rank_of(kMinusInfinity, p_.vocab - 1)", "rank_of(kLowest, p_.vocab - 1)"),
    mutant("the softmax of the best alone", LOGPROBS, "found[0] += mass(x[i], s.max);", "if (rank_of(x[i], id + 32 * i) >= s.cut) found[0] += mass(x[i], s.max);"),
    mutant("log-probabilities at another temperature", LOGPROBS, "Steps(p, 1.0)", "Steps(p, 1.01)"),
    mutant("a row without a softmax keeps its token", LOGPROBS, "store_global(p_.tokens + row_, error);", "(void)error;"),
    mutant("the drawn token's logit in the first row", LOGPROBS, "load_global(this->logits_ + token)", "load_global(static_cast<const T*>(p_.logits) + token)"),
    mutant("the best of the first row", LOGPROBS, "p_.best_ids + int64_t{row_} * p_.n", "p_.best_ids"),

    of_family("backward", "no barrier after a tile's wait", BLOCK, "    block_barrier();\n", ""),
    of_family("backward", "gradients: waits for a group too few", BLOCK, "cp_async_wait<Traits::kStages - 2>()", "cp_async_wait<Traits::kStages - 1>()"),
    of_family("backward", "gradients: the next tile overwrites this one", BLOCK, "send(next % Traits::kStages, next)",
              "send(i % Traits::kStages, next)"),
    of_family("backward", "statistics land after the barrier", BLOCK, LAND, "", BLOCK, STEP, LAND + STEP),
    of_family("backward", "masks in the loop of open tiles alone", BLOCK, "if constexpr (kMasked) hide", "if constexpr (!kMasked) hide"),
    backward("statistics of the tile before", "this->statistics(stage) + static_cast<uint32_t>(at.row(r)",
             "this->statistics(1 - stage) + static_cast<uint32_t>(at.row(r)"),
    of_family("backward", "gradients: swapped fragments of a key", BLOCK, "mma_16816<T>(scores[0][2 * n + 1], a, b[2], b[3])",
             "mma_16816<T>(scores[0][2 * n + 1], a, b[3], b[2])"),
    of_family("backward", "delta forgotten", BLOCK, "d) - statistics.y)", "d))"),
    backward("dlse forgotten", "if (call.dlse) sum -=", "if (false) sum -="),
    backward("dK unscaled", "dk_, static_cast<float>(p_.softmax_scale)", "dk_, 1.0f"),
    backward("dQ unscaled", "dq_, static_cast<float>(p_.softmax_scale)", "dq_, 1.0f"),
    backward("dV not scaled for dropout", "dv_, Policy::kDropout ? dropout_scale(p_.dropout_p) : 1.0f", "dv_, 1.0f"),
    of_family("backward", "dropped probabilities reach dV", BLOCK, "s = kept_share == 0 ? 0.0f : s;", "(void)kept_share;"),
    of_family("backward", "the softcap's slope forgotten", BLOCK, "d = ds * slope;", "d = ds;"),
    backward("a boundary tile of keys counts as open", "open_last = range.open_end / kKeys",
             "open_last = (range.open_end + kKeys - 1) / kKeys"),
    backward("a boundary tile of rows counts as open", "(range.open_begin - range.begin + kRows - 1) / kRows",
             "(range.open_begin - range.begin) / kRows"),
    backward("a boundary tile of rows at a window's end counts as open", "at_least(0, range.open_end - range.begin) / kRows",
             "(range.open_end - range.begin + kRows - 1) / kRows"),
    backward("the last tile of rows skipped", "(range.end - range.begin + kRows - 1) / kRows;", "(range.end - range.begin) / kRows;"),
    backward("gradients of keys beyond the sequence are written", "return key < sequence_.seqlen_k\n", "return key < 1 << 30\n"),
    of_family("backward", "statistics of rows beyond the sequence are read", BLOCK, "if (row >= sequence_.rows()) return {kInfinity, 0.0f};\n", ""),
    of_family("backward", "a row that sees nothing is not guarded", BLOCK, "{lse == -kInfinity ? kInfinity : lse", "{false ? kInfinity : lse"),
    of_family("backward", "rows of a window's keys off by one", SEQUENCE, "row(sees(last) + left + 1)", "row(sees(last) + left)"),
    of_family("backward", "dropout words of the other key", MODIFIERS, "const int wanted = mine ^ other;", "const int wanted = other;"),
    *(of_family("backward_f32", *bug) for bug in float_mutants.BACKWARD_BUGS),
]  # fmt: skip

# One of each kind, which every run plants; the others are marked slow.
CORE = {
    "no barrier after the wait", "the next tile is sent for before the barrier", "waits for a group too few",
    "barrier under a thread condition", "swapped fragments of V", "accumulator not scaled down", "stale maximum",
    "a boundary tile counts as open", "off by one at the end of a split", "keys beyond the sequence are copied",
    "values of a stage that is not empty", "no fence between copies and wgmma", "S read while it is multiplied",
    "lost swizzle of 128 bytes", "keys of a stage that is not empty", "parity that never turns",
    "multiplies keys before they landed", "no fence between registers and wgmma",
    "values given back while they are multiplied", "wgmma: accumulator not scaled down",
    "out takes the place of q that is read", "no fence before out is stored in bulk",
    "columns past headdim not zeroed", "the page of the token before", "lost swizzle", "causal edge off by one",
    "appended one place late", "rotary turns the wrong way", "append to the page of the token before",
    "rotary partner on the wrong side", "rotary reaches past its dimensions",
    "angles of the first position for every row", "the cache row of the batch, not of its index",
    "place within a page forgotten", "the first sequence's block table", "values as long as keys",
    "q written where it came from", "warps without a row go on", "digits counted before the buckets are clear", "no barrier between steps",
    "barrier of the first warp's threads", "low words that wrap carry nothing", "the target itself is above",
    "the larger id among equals", "reads past the row", "mass of what top_k dropped",
    "listed tokens edited before all tokens are", "only the first bias of a token", "NaN hidden by the mask",
    "slots given before the counter is zero", "a token is ahead of itself",
    "values of keys in the lanes' order",
    "no barrier after a tile's wait", "gradients: the next tile overwrites this one", "statistics land after the barrier",
    "gradients: swapped fragments of a key", "delta forgotten", "dK unscaled", "dropped probabilities reach dV",
    "a boundary tile of keys counts as open", "a boundary tile of rows counts as open", "the last tile of rows skipped",
    "gradients of keys beyond the sequence are written", "dropout words of the other key",
    "gradients of floats: tiles as large as of 16 bits",
    "q rows of the other half", "probabilities shuffled by some lanes", "even keys taken twice",
    "floats: keys lie as high as queries", "floats: a key's next chunk", "floats: probabilities of the warp's first row",
    "floats: values read past the swizzle", "floats: keys of a tile without swizzle",
    "floats: lines that go nowhere are written", "floats: columns past headdim are written",
    "floats: the second half of a combined chunk over the first",
    "gradients of floats: weights shuffled by some lanes", "gradients of floats: own tiles overlap",
    "gradients of floats: room for half the statistics", "gradients of floats: columns past headdim are written",
    "gradients of floats: tiles without swizzle", "shared lines: sums read before they are written",
    "shared lines: sums overwritten before they are read", "shared lines: all warps meet where two do",
    "shared lines: both warps add up the first part", "shared lines: parts stored over each other",
    "shared lines: the second part reaches past headdim",
}  # fmt: skip


def witnesses(family: str, bindings: Path, folder: Path, bug: Mutant | None = None) -> list[str]:
    """The checks of a family that see something wrong, in the order of their names."""
    from simt.emulator import CSRC, Emulator, compile_units, link
    from simt.probes import PROBES

    objects = dict(healthy_units(bindings))
    if bug is not None or family in FLOAT_FAMILIES:
        csrc = CSRC if bug is None else bug.plant(folder)
        objects |= compile_units(folder, csrc, (HEADDIM_OF[family],), _flags(family), UNITS_OF[family])
    return sorted(PROBES[family](Emulator(link(folder, bindings, objects))))


@functools.cache
def healthy_units(bindings: Path) -> dict[str, Path]:
    """The object files without a bug, which stand beside those with one."""
    from simt.emulator import compile_units

    folder = bindings.parent / "healthy"
    folder.mkdir()
    return compile_units(folder, headdims=(64,), flags=_flags("forward"))


def _flags(family: str) -> tuple[str, ...]:
    """Quick to build: one dtype."""
    level, dtype = ("-O0", "float") if family in FLOAT_FAMILIES else ("-Og", "f16_t")
    return (level, "-w", f"-DFASTATTN_CUDA_TYPES={dtype}")


def main() -> None:
    """The table: printed, and saved if asked."""
    from simt.emulator import compile_bindings

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--family", choices=[*UNITS_OF], help="of the others only those that are new")
    options = parser.parse_args()
    known = json.loads(TABLE.read_text()) if options.family else {}
    table = {}
    with tempfile.TemporaryDirectory() as name:
        bindings = compile_bindings(Path(name))
        for family in [options.family] if options.family else UNITS_OF:
            folder = Path(name) / family
            folder.mkdir()
            assert witnesses(family, bindings, folder) == [], family
        for number, bug in enumerate(MUTANTS):
            if bug.name in known and bug.family != options.family:
                table[bug.name] = known[bug.name]
                continue
            folder = Path(name) / str(number)
            folder.mkdir()
            table[bug.name] = witnesses(bug.family, bindings, folder, bug)
            print(f"{bug.name}: {', '.join(table[bug.name]) or 'SURVIVED'}", flush=True)
    if options.save:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()

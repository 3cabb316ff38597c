"""Bugs in what only float32 runs: (name, file, old, new, file, old, new, ...), as ``mutants.mutant`` takes them."""

from __future__ import annotations

BACKWARD, BLOCK, PRODUCTS, STORES, COPY, TRAITS, COMBINE, MODIFIERS = (
    "attention_bwd.cuh", "backward_block.cuh", "products_f32.cuh", "products.cuh", "tile_copy.cuh", "traits.cuh", "combine.cuh",
    "score_modifiers.cuh",
)  # fmt: skip

# In what both directions run.
OTHER_HALF = (PRODUCTS, "(16 * m + 8 * half) * kPanelBytes", "(16 * m + 8 * (1 - half)) * kPanelBytes")
FEWER_DIMENSIONS = (
    PRODUCTS,
    "panel < Traits::kWarpChunks / kPanelChunks",
    "panel < Traits::kWarpChunks / kPanelChunks - 1",
)
SOME_LANES = (PRODUCTS, "p[m][half] = shuffle_from(", "if (lane < 31) p[m][half] = shuffle_from(")
ORDER_OF_LANES = (PRODUCTS, "lane_offset(2 * owner,", "lane_offset(owner,")
EVEN_TWICE = (PRODUCTS, "probs[m][n][2 * half + e]", "probs[m][n][2 * half]")
NOWHERE = (STORES, "      if (!line) continue;\n", "")
PAST_HEADDIM = (STORES, "        if (8 * n < dims)\n", "")
NO_SWIZZLE = (TRAITS, "((chunk % 4) ^ (row / 2 % 4)) * 16", "(chunk % 4) * 16")

FORWARD_BUGS = [
    ("q rows of the other half", *OTHER_HALF),
    ("the last dimensions not multiplied", *FEWER_DIMENSIONS),
    ("probabilities shuffled by some lanes", *SOME_LANES),
    ("values of keys in the lanes' order", *ORDER_OF_LANES),
    ("even keys taken twice", *EVEN_TWICE),
    ("rows of a lane confused", PRODUCTS, "fused_multiply_add(p[m][i / 2]", "fused_multiply_add(p[m][i % 2]"),
    ("floats: keys of a lane in the lanes' order", PRODUCTS, "lane_offset(lane % 4 * 2, 0)", "lane_offset(lane % 4, 0)"),
    ("floats: keys lie as high as queries", PRODUCTS, "(k_lane ^ kPanelBytes) + static_cast<uint32_t>(Traits::kKeys",
     "(k_lane ^ kPanelBytes) + static_cast<uint32_t>(Traits::kRows"),
    ("floats: a key's next chunk", PRODUCTS, "(k_lane ^ (turn +", "(k_lane ^ 16 ^ (turn +"),
    ("floats: queries of odd panels not swapped", PRODUCTS, "(q_lane ^ kPanelBytes) +", "q_lane +"),
    ("floats: dimensions of a chunk backwards", PRODUCTS, "float_of_bits(k[d])", "float_of_bits(k[3 - d])"),
    ("floats: probabilities of the warp's first row", PRODUCTS, "lane / 4 * 4 + owner)", "owner)"),
    ("floats: values of the other two dimensions", PRODUCTS, "lane % 2 * 8)", "(1 - lane % 2) * 8)"),
    ("floats: a pair's halves swapped", PRODUCTS, "static_cast<uint32_t>(pair)),", "static_cast<uint32_t>(pair >> 32)),",
     PRODUCTS, "static_cast<uint32_t>(pair >> 32))};", "static_cast<uint32_t>(pair))};"),
    ("floats: values read past the swizzle", PRODUCTS, "lane_offset(2 * owner, lane % 4 / 2)",
     "static_cast<uint32_t>(2 * owner * kPanelBytes + lane % 4 / 2 * 16)"),
    ("floats: keys of a tile without swizzle", *NO_SWIZZLE),
    ("floats: chunks counted as of 16 bits", COPY, "chunk + c < dims / Traits::kChunkElements", "chunk + c < dims / 8"),
    ("floats: keys' chunks counted as of 16 bits", COPY, "chunks_(static_cast<int>(headdim) / Traits::kChunkElements)",
     "chunks_(static_cast<int>(headdim) / 8)"),
    ("floats: steps between keys of 16 bits", COPY, "view.stride_seqlen * Traits::kElementBytes;", "view.stride_seqlen * 2;"),
    ("floats: a pair's columns of the next lane", STORES, "line + 4 * n + lane % 4,", "line + 4 * n + (lane + 1) % 4,"),
    ("floats: lines that go nowhere are written", *NOWHERE),
    ("floats: columns past headdim are written", *PAST_HEADDIM),
    ("floats: the second half of a combined chunk over the first", COMBINE, "store_global16(line + i, bytes);",
     "store_global16(line, bytes);"),
]  # fmt: skip

BACKWARD_BUGS = [
    ("gradients of floats: lines of the other half", *OTHER_HALF),
    ("gradients of floats: the last dimensions not multiplied", *FEWER_DIMENSIONS),
    ("gradients of floats: weights shuffled by some lanes", *SOME_LANES),
    ("gradients of floats: columns in the lanes' order", *ORDER_OF_LANES),
    ("gradients of floats: even columns taken twice", *EVEN_TWICE),
    ("gradients of floats: a warp multiplies the first one's lines", BLOCK, "own + part_offset<Traits::kRows>(), warp_line_,",
     "own + part_offset<Traits::kRows>(), 0,"),
    ("gradients of floats: those of the last tile alone", BLOCK, "      multiply_values_f32<Traits>(gradient,",
     "      clear(gradient), multiply_values_f32<Traits>(gradient,"),
    ("gradients of floats: tiles as large as of 16 bits", TRAITS, "kTileBytes = kKeys * Base::kRowBytes;",
     "kTileBytes = kKeys * Base::kRowBytes / 2;"),
    ("gradients of floats: own tiles overlap", TRAITS, "kOwnBytes = kRows * Base::kRowBytes", "kOwnBytes = kRows * Base::kRowBytes / 2"),
    ("gradients of floats: room for half the statistics", TRAITS, "kKeys < 16 ? 128 : kKeys * 8", "kKeys < 16 ? 0 : kKeys * 4"),
    ("gradients of floats: a tile begins in the middle of the banks", TRAITS, "kKeys < 16 ? 128", "kKeys < 16 ? 64"),
    ("gradients of floats: lines that go nowhere are written", *NOWHERE),
    ("gradients of floats: columns past headdim are written", *PAST_HEADDIM),
    ("gradients of floats: delta of half a chunk", BACKWARD, "for (int i = 0; i < 8; ++i) sum = fused", "for (int i = 0; i < 4; ++i) sum = fused"),
    ("gradients of floats: a block's keys where 16-bit ones lie", COPY,
     "(exists ? first + line : first), sequence.head_k) *\n               Traits::kElementBytes",
     "(exists ? first + line : first), sequence.head_k) *\n               2"),
    ("gradients of floats: tiles without swizzle", *NO_SWIZZLE),
    ("shared lines: the sums of one part", BLOCK, "sums[0][n][2 * half] += other.x;", ""),
    ("shared lines: sums read before they are written", BLOCK, "1]});\n      named_barrier(1 + warp / 2, 64);\n", "1]});\n"),
    ("shared lines: sums overwritten before they are read", BLOCK,
     "      named_barrier(1 + warp / 2, 64);  // both have read: the next sums take their place\n", ""),
    ("shared lines: all warps meet where two do", BLOCK, "1]});\n      named_barrier(1 + warp / 2, 64);", "1]});\n      named_barrier(1, 128);"),
    ("shared lines: both warps multiply the first part", BLOCK, "own + part_offset<Traits::kRows>()", "own"),
    ("shared lines: both warps add up the first part", BLOCK, "weights, tile + part_offset<Traits::kKeys>())", "weights, tile)"),
    ("shared lines: parts stored over each other", BLOCK, "whole ? whole + first", "whole ? whole"),
    ("shared lines: the second part reaches past headdim", BLOCK, "dims - first,", "dims,"),
    ("shared lines: dropout of the first key for both", MODIFIERS, "kRowStep == 4 ? 0 : i / 2", "kRowStep == 4 ? 0 : 0"),
]  # fmt: skip

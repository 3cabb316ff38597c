"""Bugs in what only float32 runs: (name, file, old, new, file, old, new, ...), as ``mutants.mutant`` takes them."""

from __future__ import annotations

BACKWARD, PRODUCTS, STORES, COPY, TRAITS, COMBINE = (
    "attention_bwd.cuh", "products_f32.cuh", "products.cuh", "tile_copy.cuh", "traits.cuh", "combine.cuh",
)  # fmt: skip

# In what both directions run.
OTHER_HALF = (PRODUCTS, "16 * m + 8 * half + lane / 4, chunk", "16 * m + 8 * (1 - half) + lane / 4, chunk")
FEWER_DIMENSIONS = (PRODUCTS, "chunk < Traits::kChunks", "chunk < Traits::kChunks - 1")
SOME_LANES = (PRODUCTS, "p[m][half] = shuffle_from(", "if (lane < 31) p[m][half] = shuffle_from(")
ORDER_OF_LANES = (PRODUCTS, "8 * n + 2 * owner + e;", "8 * n + owner + 4 * e;")
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
    ("floats: keys of a lane in the lanes' order", PRODUCTS, "8 * n + lane % 4 * 2 + e, chunk", "8 * n + lane % 4 + 4 * e, chunk"),
    ("floats: keys lie as high as queries", PRODUCTS, "keys + chunk_offset<Traits::kKeys>", "keys + chunk_offset<2 * Traits::kKeys>"),
    ("floats: a key's next chunk", PRODUCTS, "lane % 4 * 2 + e, chunk)", "lane % 4 * 2 + e, chunk ^ 1)"),
    ("floats: dimensions of a chunk backwards", PRODUCTS, "float_of_bits(k[d])", "float_of_bits(k[3 - d])"),
    ("floats: probabilities of the warp's first row", PRODUCTS, "lane / 4 * 4 + owner)", "owner)"),
    ("floats: values of the other two dimensions", PRODUCTS, "lane % 2 * 8)", "(1 - lane % 2) * 8)"),
    ("floats: a pair's halves swapped", PRODUCTS, "static_cast<uint32_t>(pair)),", "static_cast<uint32_t>(pair >> 32)),",
     PRODUCTS, "static_cast<uint32_t>(pair >> 32))};", "static_cast<uint32_t>(pair))};"),
    ("floats: values read past the swizzle", PRODUCTS, "const uint64_t pair = load_shared8(values + chunk_offset<Traits::kKeys>(key,",
     "const uint64_t pair = load_shared8(values + chunk_offset<Traits::kKeys>(key ^ 2,"),
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
    ("gradients of floats: a warp multiplies the first one's lines", BACKWARD, "multiply_keys_f32<Traits>(scores, own, warp_line_, tile)",
     "multiply_keys_f32<Traits>(scores, own, 0, tile)"),
    ("gradients of floats: those of the last tile alone", BACKWARD, "      multiply_values_f32<Traits>(gradient, weights, tile);",
     "      clear(gradient), multiply_values_f32<Traits>(gradient, weights, tile);"),
    ("gradients of floats: tiles as large as of 16 bits", TRAITS, "kTileBytes = kKeys * kDim * kElementBytes;\n  static constexpr uint32_t kStatisticsBytes",
     "kTileBytes = kKeys * kDim * 2;\n  static constexpr uint32_t kStatisticsBytes"),
    ("gradients of floats: own tiles overlap", TRAITS, "kOwnBytes = Base::kQueryBytes", "kOwnBytes = Base::kQueryBytes / 2"),
    ("gradients of floats: room for half the statistics", TRAITS, "kStatisticsBytes = kKeys * 8", "kStatisticsBytes = kKeys * 4"),
    ("gradients of floats: lines that go nowhere are written", *NOWHERE),
    ("gradients of floats: columns past headdim are written", *PAST_HEADDIM),
    ("gradients of floats: delta of half a chunk", BACKWARD, "for (int i = 0; i < 8; ++i) sum = fused", "for (int i = 0; i < 4; ++i) sum = fused"),
    ("gradients of floats: a block's keys where 16-bit ones lie", COPY,
     "(exists ? first + line : first), sequence.head_k) *\n               Traits::kElementBytes",
     "(exists ? first + line : first), sequence.head_k) *\n               2"),
    ("gradients of floats: tiles without swizzle", *NO_SWIZZLE),
]  # fmt: skip

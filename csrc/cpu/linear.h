// The linear layer, out (tokens, out_features) = x (tokens, in_features) W^T + bias, for any number of tokens.
//
// Outputs fill the lanes and x is broadcast, so a decode step reads one contiguous stream of weights, and a prompt runs
// the same register tile with more columns. An output is the same arithmetic in both: chains of multiply-adds along
// in_features, of a length that depends on in_features only, added up in order. So a token's bits depend on its own row
// of x and on W: not on the other tokens, nor on the threads.
//
// bf16 weights multiply x rounded to bf16 (to nearest, ties to even), as bf16 models do. Products are exact and sums
// are fp32 on every ISA; an ISA with a bf16 dot product adds them in another order, so its bits differ, not its
// accuracy.
#pragma once

#include "cpu/linear_pack.h"
#include "cpu/scratch.h"
#include "cpu/tile_gemm.h"

namespace fastattn {
namespace {

constexpr int64_t kGroupTokens = 1024;  // tokens per parallel loop: keeps x near, yet few barriers on a busy machine
constexpr int64_t kSerialMultiplies = int64_t{1} << 17;  // below, waking threads costs more than it saves

// The products of linear layers add to tile_gemm.h's: whether x is rounded first, and put(x, row, feature), which then
// writes kLanes features as Scalars; and kMaxChainWords. A long chain saves loads and stores of partial sums; a short
// one rounds less, and lets kTileCols rows of x stay in L1 while the panels stream past.
template <class Vec>
struct Fp32Product : FmaProduct<Vec> {
  using Registers = NoRegisters;
  static constexpr bool kTiles = false;
  static constexpr bool kRoundsX = false;
  static constexpr int64_t kMaxChainWords = 320;
};

// bf16 weights without a bf16 dot product: both factors widened to fp32, the even feature of a word before the odd.
template <class Vec>
struct WidenBf16Product {
  using Scalar = float;
  using Factor = Vec;
  using Registers = NoRegisters;
  static constexpr int kPhases = 2;
  static constexpr bool kTiles = false;
  static Factor row(const float* words, int phase) {
    const Vec pairs = Vec::load(words);
    return phase == 0 ? Vec::even_bf16(pairs) : Vec::odd_bf16(pairs);
  }
  static Factor col(const Scalar* x, int phase) { return Vec::set1(x[phase]); }
  static Vec multiply_add(Factor row, Factor col, Vec c) { return fma(row, col, c); }

  static constexpr bool kRoundsX = true;
  static constexpr int64_t kMaxChainWords = 320;
  static void put(Vec x, Scalar* row, int64_t feature) {
    bf16_t rounded[Vec::kLanes];
    x.store(rounded);
    Vec::load(rounded).store(row + feature);
  }
};

template <class Vec, class Product>
class LinearLayer {
 public:
  explicit LinearLayer(const LinearParams& p)
      : p_(p),
        layout_(p.in_features, p.out_features, p.dtype),
        chain_(round_up(ceil_div(layout_.words, ceil_div(layout_.words, Product::kMaxChainWords)), 16)) {}

  void run() const {
    const bool small = p_.tokens * p_.in_features * p_.out_features < kSerialMultiplies;
    const int nthreads = small ? 1 : p_.nthreads;
    for (int64_t token = 0; token < p_.tokens; token += kGroupTokens)
      multiply(prepare(token, p_.tokens - token < kGroupTokens ? p_.tokens - token : kGroupTokens, nthreads), nthreads);
  }

 private:
  using Scalar = typename Product::Scalar;
  using Layout = PanelLayout<Vec, Product>;
  static constexpr int kVecs = Vec::kTileVecs, kLanes = Vec::kLanes;
  static constexpr int kCols = Product::kTiles ? 2 * kLanes : Vec::kTileCols;  // tokens at a time
  static constexpr int64_t kPanel = Layout::kPanel;

  // Some tokens: their x as the product reads it, and where their results go.
  struct Rows {
    const Scalar* x;
    int64_t ldx;
    float* out;
    int64_t tokens;
  };

  // x itself, or x rounded into scratch.
  Rows prepare(int64_t token, int64_t tokens, int nthreads) const {
    const float* x = p_.x + token * p_.stride_x;
    float* out = p_.out + token * p_.stride_out;
    if constexpr (Product::kRoundsX) {
      const int64_t in = p_.in_features, features = round_up(in, Product::kTiles ? 2 * kLanes : kLanes);
      const int64_t ldx = features * Product::kPhases / 2;
      const size_t bytes = static_cast<size_t>(round_up(tokens, kCols) * ldx) * sizeof(Scalar);
      Scalar* rounded = static_cast<Scalar*>(thread_scratch(ScratchSlot::kShared, bytes));
      constexpr int64_t kStep = 32;  // tokens per item
      parallel_for(ceil_div(tokens, kStep), nthreads, [&](int64_t item) {
        const int64_t end = (item + 1) * kStep < tokens ? (item + 1) * kStep : tokens;
        for (int64_t i = item * kStep; i < end; ++i) {
          const float* row = x + i * p_.stride_x;
          Scalar* to = rounded + i * ldx;
          int64_t f = 0;
          for (; f + kLanes <= in; f += kLanes) Product::put(Vec::load(row + f), to, f);
          for (; f < features; f += kLanes)
            Product::put(Vec::load_n(row + f, static_cast<int>(at_least(0, in - f))), to, f);
        }
      });
      return {rounded, ldx, out, tokens};
    } else {
      return {x, p_.stride_x, out, tokens};
    }
  }

  // An item is a run of panels (long streams, yet enough items to even out unequal threads) by, where panels are too
  // few for the threads, a part of the tokens.
  void multiply(const Rows& rows, int nthreads) const {
    const int64_t run = ceil_div(layout_.panels, 8 * nthreads), runs = ceil_div(layout_.panels, run);
    const int64_t wanted_parts = nthreads == 1 ? 1 : ceil_div(4 * nthreads, runs);
    const int64_t step = round_up(ceil_div(rows.tokens, wanted_parts), 4 * kCols);
    const int64_t parts = ceil_div(rows.tokens, step);
    parallel_for(runs * parts, nthreads, [&](int64_t item) {
      const int64_t first = item / parts * run, token = item % parts * step;
      const int64_t end = first + run < layout_.panels ? first + run : layout_.panels;
      const Rows part{rows.x + token * rows.ldx, rows.ldx, rows.out + token * p_.stride_out,
                      rows.tokens - token < step ? rows.tokens - token : step};
      // Of a few tokens no more than they are is loaded and multiplied: sums and x are in the first four registers.
      [[maybe_unused]] const typename Product::Registers registers(at_most(kLanes, part.tokens));
      for (int64_t panel = first; panel < end; ++panel)
        for (int64_t word = 0; word < layout_.words; word += chain_)
          for (int64_t tile = 0; tile * kCols < part.tokens; ++tile) {
            if constexpr (Product::kTiles)
              multiply_in_registers({panel, word, tile}, part);
            else
              multiply_tile<kCols>({panel, word, tile}, part);
          }
    });
  }

  struct Place {
    int64_t panel;
    int64_t word;  // where the chain begins
    int64_t tile;  // of kCols tokens
  };

  // Some words of a panel, and where the sums over them belong.
  struct Chain {
    Chain(const LinearLayer& layer, const Place& at, const Rows& rows)
        : bias(layer.p_.weights + at.panel * layer.layout_.panel_floats()),
          words(bias + (1 + at.word) * kPanel),
          depth(at_most(layer.chain_, layer.layout_.words - at.word)),
          out(rows.out + at.panel * kPanel),
          stride_out(layer.p_.stride_out),
          outputs(layer.p_.out_features - at.panel * kPanel),
          tile(at.tile),
          tiles(ceil_div(rows.tokens, kCols)),
          first(at.word == 0) {}

    // To the bias, or to what the chains before left in out.
    void add(int64_t token, int vec, Vec sum) const {
      float* to = out + token * stride_out + vec * kLanes;
      const int64_t left = outputs - vec * kLanes;
      if (left >= kLanes) {
        (sum + Vec::load(first ? bias + vec * kLanes : to)).store(to);
      } else if (left > 0) {
        const int n = static_cast<int>(left);
        (sum + Vec::load_n(first ? bias + vec * kLanes : to, n)).store_n(to, n);
      }
    }

    // While a chain's weights serve one tile after the other, each tile fetches its share of the next chain's, which
    // follow in memory: every so many steps, the words of one step. Past the last chain nothing is read, only
    // prefetched.
    auto prefetch() const {
      return [next = reinterpret_cast<const char*>(words) + depth * kPanel * 4, tiles = tiles,
              steps_to_fetch = tile + 1](int64_t i) mutable {
        if (--steps_to_fetch > 0) return;
        steps_to_fetch = tiles;
        for (int64_t byte = 0; byte < kPanel * 4; byte += 64) __builtin_prefetch(next + i * kPanel * 4 + byte, 0, 2);
      };
    }

    const float* bias;
    const float* words;
    int64_t depth;
    float* out;
    int64_t stride_out, outputs;
    int64_t tile, tiles;
    bool first;
  };

  // One chain of up to kTokens tokens.
  template <int kTokens>
  void multiply_tile(const Place& at, const Rows& rows) const {
    const int64_t token = at.tile * kCols;
    if constexpr (kTokens > 1)
      if (rows.tokens - token < kTokens) return multiply_tile<kTokens - 1>(at, rows);
    const Chain chain(*this, at, rows);
    tile_gemm<Vec, kVecs, kTokens, Product>(
        chain.words, kPanel, rows.x + token * rows.ldx + at.word * Product::kPhases, rows.ldx, Product::kPhases,
        chain.depth, [](int, int) { return Vec::zero(); },
        [&](int col, int vec, Vec sum) { chain.add(token + col, vec, sum); }, chain.prefetch());
  }

  // The same on tile registers.
  void multiply_in_registers(const Place& at, const Rows& rows) const {
    const int64_t token = at.tile * kCols, tokens = at_most(kCols, rows.tokens - token);
    const Chain chain(*this, at, rows);
    auto prefetch = chain.prefetch();
    const auto before = [&](int64_t step) {
      for (int64_t i = 0; i < kLanes; ++i) prefetch(step * kLanes + i);
    };
    alignas(64) float sums[kCols * kPanel];  // (tokens, kPanel)
    const auto multiply = [&](auto tiles) {
      Product::template multiply_block<decltype(tiles)::value, kVecs>(rows.x + token * rows.ldx + at.word, rows.ldx,
                                                                      chain.words, kPanel, chain.depth / kLanes, sums,
                                                                      kPanel, before);
    };
    tokens > kLanes ? multiply(Number<2>{}) : multiply(Number<1>{});
    for (int64_t i = 0; i < tokens; ++i)
      for (int vec = 0; vec < kVecs; ++vec) chain.add(token + i, vec, Vec::load(sums + i * kPanel + vec * kLanes));
  }

  const LinearParams& p_;
  const Layout layout_;
  const int64_t chain_;  // words
};

template <class Vec, class Bf16Product>
void linear(const LinearParams& p) {
  if (p.dtype == DType::f32)
    LinearLayer<Vec, Fp32Product<Vec>>(p).run();
  else
    LinearLayer<Vec, Bf16Product>(p).run();
}

}  // namespace
}  // namespace fastattn

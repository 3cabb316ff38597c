// The forward pass: which rows and keys make a work item, who runs it, and how partial results meet.
#pragma once

#include "cpu/attention_decode.h"
#include "cpu/attention_fwd.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace fastattn {
namespace {

constexpr int64_t kSerialWork = int64_t{1} << 18;   // multiply-adds below which waking threads costs more than it saves
constexpr int64_t kSharedReals = int64_t{1} << 20;  // partial results that may wait in memory to be merged
constexpr int64_t kItemsPerThread = 4;              // fewer leave threads idle at the end
constexpr int64_t kEvenShares = 32;                 // grains per thread, at least

// Kernel is ForwardTile or DecodeRows: attend(begin, end, state) over one WorkItem.
template <class Vec, class Kernel>
class Forward {
 public:
  using Real = typename Vec::Real;
  using State = SoftmaxState<Real>;

  Forward(const AttentionParams& p, int64_t rows_per_item, int64_t heads_per_item, int nthreads)
      : p_(p),
        nthreads_(nthreads),
        group_(p.nheads / p.nheads_k),
        rows_per_item_(rows_per_item),
        heads_per_item_(heads_per_item),
        head_groups_(p.nheads_k / heads_per_item),
        columns_(p.batch * head_groups_),
        blocks_(ceil_div(p.seqlen_q * group_, rows_per_item)),
        items_(columns_ * blocks_),
        ldo_(round_up(p.headdim_v, Vec::kLanes)),
        state_reals_(State::reals(rows_per_item * heads_per_item, ldo_)),
        kernel_reals_(Kernel::reals(p, rows_per_item, heads_per_item)) {}

  void run() const {
    const int64_t chunks = at_most(kMaxChunks, ceil_div(p_.kv.seqlen, kMinChunk));
    const bool few_items = nthreads_ > 1 && items_ < kItemsPerThread * nthreads_;
    if (chunks > 1 && (few_items || items_ * chunks * state_reals_ <= kSharedReals))
      run_chunks(chunks);
    else
      run_items();
  }

 private:
  // One sequence's part of the work: the rows of an item, and the chunks of keys that they see.
  struct Place {
    Sequence sequence;
    WorkItem item;
    int64_t step, first, last;  // chunks [first, last) of `step` keys

    Place(const AttentionParams& p, int64_t batch, const WorkItem& i) : sequence(p, batch), item(i) {
      const Visibility visibility(p, sequence);
      const int64_t rows = sequence.seqlen_q * visibility.group - item.first_row;
      item.rows = at_most(item.rows, rows);
      step = chunk_keys(sequence.seqlen_k);
      first = last = 0;
      if (item.rows <= 0) return;
      const int64_t begin = visibility.begin(item.first_row), end = visibility.end(item.first_row + item.rows - 1);
      if (begin >= end) return;
      first = begin / step;
      last = ceil_div(end, step);
    }
    int64_t begin(int64_t chunk) const { return chunk * step; }
    int64_t end(int64_t chunk) const { return at_most(sequence.seqlen_k, begin(chunk + 1)); }
  };

  // Heads fastest, and the last (under a causal mask the longest) rows first.
  Place place_of(int64_t index) const {
    const int64_t column = index % columns_, block = blocks_ - 1 - index / columns_;
    return Place(p_, column / head_groups_,
                 {column % head_groups_ * heads_per_item_, heads_per_item_, block * rows_per_item_, rows_per_item_});
  }

  Real* memory(int64_t states) const {
    const size_t reals = static_cast<size_t>(kernel_reals_ + states * state_reals_);
    return static_cast<Real*>(thread_scratch(ScratchSlot::kTile, reals * sizeof(Real)));
  }

  // Many rows: an item walks through all its keys.
  void run_items() const {
    const auto run = [&](int64_t index) {
      const Place place = place_of(index);
      if (place.item.rows <= 0) return;
      const int64_t rows = place.item.rows * place.item.heads;
      Real* own = memory(2);
      const State total = State::at(own + kernel_reals_, rows, ldo_);
      const State part = State::at(own + kernel_reals_ + state_reals_, rows, ldo_);
      if (place.first == place.last) {
        total.clear(rows);
      } else {
        Kernel kernel(p_, place.sequence, place.item, own);
        for (int64_t chunk = place.first; chunk < place.last; ++chunk) {
          const State& state = chunk == place.first ? total : part;
          if (Kernel::kLooksAhead && chunk + 1 == place.last && index + 1 < items_)
            attend_before(place_of(index + 1), &kernel, place.begin(chunk), place.end(chunk), state);
          else
            kernel.attend(place.begin(chunk), place.end(chunk), state);
          if (chunk > place.first) merge<Vec>(total, part, rows);
        }
      }
      finalize<Vec>(p_, place.sequence, place.item, total);
    };
    // Neighbours in one hand, so that the next item can be foreseen, but not so many that threads end unevenly.
    parallel_for(items_, nthreads_, run, at_least(1, items_ / (kEvenShares * nthreads_)));
  }

  // The last keys of an item, with an eye on the next one.
  static void attend_before(const Place& next, Kernel* kernel, int64_t begin, int64_t end, const State& state) {
    if constexpr (Kernel::kLooksAhead) {
      const typename Kernel::Next ahead = {next.sequence, next.item, next.begin(next.first)};
      kernel->attend(begin, end, state, next.item.rows > 0 ? &ahead : nullptr);
    }
  }

  // Few rows and many keys: every chunk of keys is an item of its own, merged in order afterwards. All heads of a chunk
  // come before the next chunk: in a (seqlen, heads, dim) cache they share pages, and so address translations.
  void run_chunks(int64_t most) const {
    const size_t reals = static_cast<size_t>(items_ * most * state_reals_);
    Real* shared = static_cast<Real*>(thread_scratch(ScratchSlot::kShared, reals * sizeof(Real)));
    const auto state_of = [&](int64_t index, int64_t chunk, const WorkItem& item) {
      return State::at(shared + (index * most + chunk) * state_reals_, item.rows * item.heads, ldo_);
    };
    parallel_for(most * items_, nthreads_, [&](int64_t at) {
      const int64_t chunk = at / items_, index = at % items_;
      const Place place = place_of(index);
      if (chunk >= place.first && chunk < place.last)
        Kernel(p_, place.sequence, place.item, memory(0))
            .attend(place.begin(chunk), place.end(chunk), state_of(index, chunk, place.item));
    });
    for (int64_t index = 0; index < items_; ++index) {
      const Place place = place_of(index);
      const int64_t rows = place.item.rows * place.item.heads;
      if (rows <= 0) continue;
      const State total = state_of(index, place.first, place.item);
      if (place.first == place.last) total.clear(rows);
      for (int64_t chunk = place.first + 1; chunk < place.last; ++chunk)
        merge<Vec>(total, state_of(index, chunk, place.item), rows);
      finalize<Vec>(p_, place.sequence, place.item, total);
    }
  }

  const AttentionParams& p_;
  const int nthreads_;
  const int64_t group_, rows_per_item_, heads_per_item_, head_groups_, columns_, blocks_, items_;
  const int64_t ldo_, state_reals_, kernel_reals_;
};

template <class Vec, class T, class Dot>
void decode(const AttentionParams& p, int64_t rows, int nthreads) {
  using Kernel = DecodeRows<Vec, T, Dot>;
  // All heads of a token together where they are neighbours in memory, unless that leaves too few items.
  const bool neighbours = p.kv.k.stride_head < p.kv.k.stride_seqlen && p.kv.v.stride_head < p.kv.v.stride_seqlen;
  const int64_t chunks = at_least(1, ceil_div(p.kv.seqlen, kMinChunk));
  int64_t heads = neighbours ? p.nheads_k : 1;
  while (heads > 1 && (p.nheads_k % heads || heads * rows > Kernel::kMaxAllRows ||
                       p.batch * (p.nheads_k / heads) * chunks < kItemsPerThread * nthreads))
    --heads;
  Forward<Vec, Kernel>(p, rows, heads, nthreads).run();
}

template <class Products>
void tile(const AttentionParams& p, int64_t rows, int nthreads) {
  using Vec = typename Products::Vec;
  using Kernel = ForwardTile<Products>;
  // Smaller items where there would be too few of them to keep the threads evenly busy.
  int64_t per_item = Kernel::max_rows(p);
  while (per_item > Kernel::kStrip && p.batch * p.nheads_k * ceil_div(rows, per_item) < kItemsPerThread * nthreads)
    per_item -= Kernel::kStrip;
  per_item = round_up(ceil_div(rows, ceil_div(rows, per_item)), Vec::kLanes);
  Forward<Vec, Kernel>(p, at_most(rows, per_item), 1, nthreads).run();
}

template <class Vec, class Dot>
void attention_in(const AttentionParams& p) {
  const int64_t rows = p.seqlen_q * (p.nheads / p.nheads_k);
  const int64_t work = rows * p.batch * p.nheads_k * p.kv.seqlen * (p.headdim + p.headdim_v);
  const int nthreads = work < kSerialWork ? 1 : p.nthreads;
  constexpr int64_t kFewRows = DecodeRows<Vec, typename Vec::Real, NoDot>::kMaxRows;
  const bool many = rows > kFewRows || p.dropout_p > 0;
  if constexpr (sizeof(typename Vec::Real) == 4 && Dot::kPhases == 1)
    if (scores_by_dot<Vec, Dot>(p)) {
      if (!many) return decode<Vec, bf16_t, Dot>(p, rows, nthreads);
      if constexpr (Dot::kTiles)
        return tile<TileProducts<Vec, Dot>>(p, rows, nthreads);
      else
        return tile<WordProducts<Vec, Dot>>(p, rows, nthreads);
    }
  if (many) return tile<RealProducts<Vec>>(p, rows, nthreads);
  visit_kv_storage<typename Vec::Real>(
      p.kv.dtype, [&](auto tag) { decode<Vec, typename decltype(tag)::type, NoDot>(p, rows, nthreads); });
}

// Dot multiplies bf16 by bf16, if the ISA can: tile_gemm.h.
template <class Vec, class VecDouble, class Dot>
void attention_forward(const AttentionParams& p) {
  if (p.batch == 0 || p.seqlen_q == 0) return;
  p.dtype == DType::f64 ? attention_in<VecDouble, Dot>(p) : attention_in<Vec, Dot>(p);
}

}  // namespace
}  // namespace fastattn

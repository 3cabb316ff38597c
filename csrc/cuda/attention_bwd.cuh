// Gradients on tensor cores, of floats by FMAs: S and P are computed again from q, k and lse (FlashAttention-2, Dao,
// arXiv 2307.08691).
//
// Two kernels of one build, each other's mirror image. One owns rows of dQ and walks tiles of keys, the other owns keys
// of dK and dV and walks tiles of rows with everything transposed; either way a warp's products and its gradients stay
// in registers, and the result layout of dS is its operand layout. So nothing is added up in memory: no atomics, the
// same bits every time. It costs S and dP twice, 7 products where 5 would do. Above headdim 128, where both gradients
// of a key exceed the registers, one block makes dK and another dV; of floats two warps have half of both.
#pragma once

#include "cuda/backward_block.cuh"

namespace fastattn {
namespace {

template <class T, class Traits, class Policy>
class QueryGradients : BackwardBlock<T, Traits> {
  using Base = BackwardBlock<T, Traits>;
  using Base::own_tile, Base::p_, Base::params_, Base::sequence_, Base::stage_tile, Base::warp_line_;
  using Layout = ScoreLayout<Traits, false>;

 public:
  FASTATTN_DEVICE QueryGradients(const BackwardParams& params, const Sequence& sequence, int first_row)
      : Base(params, sequence),
        first_row_(first_row),
        k_(p_.kv.k, params.k_steps, p_.kv, sequence, p_.headdim),
        v_(p_.kv.v, params.v_steps, p_.kv, sequence, p_.headdim_v) {
    clear(dq_);
  }

  FASTATTN_DEVICE void run() {
    const KeyRange range(sequence_, first_row_, Traits::kRows);
    if (range.begin < range.end) walk(range);
    this->store(own_tile(0), dq_, static_cast<float>(p_.softmax_scale), p_.headdim, [&](int line) {
      const int row = first_row_ + line;
      return row < sequence_.rows() ? row_pointer<T>(params_.call.dq, sequence_.q_row,
                                                     sequence_.q_first + sequence_.query(row), sequence_.head(row))
                                    : nullptr;
    });
  }

 private:
  FASTATTN_DEVICE void walk(const KeyRange& range) {
    constexpr int kKeys = Traits::kKeys;
    const int first = range.begin / kKeys, last = (range.end - 1) / kKeys;
    const int open_first = (range.open_begin + kKeys - 1) / kKeys, open_last = range.open_end / kKeys;
    copy_rows<Traits, Traits::kRows>(own_tile(0), p_.q, p_.headdim, sequence_, first_row_);
    copy_rows<Traits, Traits::kRows>(own_tile(1), params_.call.dout, p_.headdim_v, sequence_, first_row_);
    k_.seek(last * kKeys);
    v_.seek(last * kKeys);
    Float2 statistics[Layout::kRows];
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r)
      statistics[r] = this->statistics_of_row(Layout(first_row_ + warp_line_, 0).row(r));
    stream_tiles<Traits, !Policy::kModify>(
        last - first + 1, {last + 1 - open_last, last + 1 - open_first},
        [&](int stage, int i) {
          k_.template copy<true>(stage_tile(stage, 0), (last - i) * kKeys, sequence_.seqlen_k);
          v_.template copy<true>(stage_tile(stage, 1), (last - i) * kKeys, sequence_.seqlen_k);
        },
        [](int) {},
        [&](auto masked, int stage, int i) {
          const int tile = last - i;
          float scores[1][Traits::kKeys / 8][4], dprobs[1][Traits::kKeys / 8][4];  // (rows, keys)
          this->multiply(scores, own_tile(0), stage_tile(stage, 0));
          this->multiply(dprobs, own_tile(1), stage_tile(stage, 1));
          const Layout at(first_row_ + warp_line_, tile * kKeys);
          this->template differentiate<Policy, decltype(masked)::value>(
              scores, dprobs, at, [&](int r) { return statistics[r]; },
              [&](const RowModifiers& row, int key, float ds) {
                const ScoreView& dbias = params_.call.dbias;
                if (dbias.data && row.has(key) && this->part() == 0)
                  store_global(static_cast<float*>(dbias.data) + sequence_.batch * dbias.stride_batch +
                                   row.head() * dbias.stride_head + row.query() * dbias.stride_q + key * dbias.stride_k,
                               ds);
              });
          this->accumulate(dq_, dprobs, stage_tile(stage, 0));
        });
  }

  const int first_row_;
  KeyCopy<Traits, false> k_, v_;
  typename Base::Gradient dq_;  // of rows
};

template <class T, class Traits, class Policy>
class KeyGradients : BackwardBlock<T, Traits> {
  using Base = BackwardBlock<T, Traits>;
  using Base::own_tile, Base::p_, Base::params_, Base::sequence_, Base::stage_tile, Base::warp_line_;
  using Layout = ScoreLayout<Traits, true>;

 public:
  FASTATTN_DEVICE KeyGradients(const BackwardParams& params, const Sequence& sequence, int first_key)
      : Base(params, sequence), first_key_(first_key) {
    if constexpr (Policy::kKeys) clear(dk_);
    if constexpr (Policy::kValues) clear(dv_);
  }

  FASTATTN_DEVICE void run() {
    const RowRange range(sequence_, first_key_, Traits::kRows);
    if (range.begin < range.end) walk(range);
    const auto line_of = [&](const TensorView& view) {
      return [&](int line) {
        const int key = first_key_ + line;
        return key < sequence_.seqlen_k
                   ? row_pointer<T>(view, sequence_.kv_row, sequence_.kv_first + key, sequence_.head_k)
                   : nullptr;
      };
    };
    if constexpr (Policy::kKeys)
      this->store(own_tile(0), dk_, static_cast<float>(p_.softmax_scale), p_.headdim, line_of(params_.call.dk));
    if constexpr (Policy::kValues)
      this->store(own_tile(1), dv_, Policy::kDropout ? dropout_scale(p_.dropout_p) : 1.0f, p_.headdim_v,
                  line_of(params_.call.dv));
  }

 private:
  FASTATTN_DEVICE void walk(const RowRange& range) {
    constexpr int kRows = Traits::kKeys;  // of a walked tile
    copy_keys<Traits>(own_tile(0), p_.kv.k, p_.headdim, sequence_, first_key_);
    copy_keys<Traits>(own_tile(1), p_.kv.v, p_.headdim_v, sequence_, first_key_);
    Float2 coming{};  // statistics of one row of the next tile
    const auto row_of = [&](int i) { return range.begin + i * kRows; };
    const int count = (range.end - range.begin + kRows - 1) / kRows;
    const int open_first = (range.open_begin - range.begin + kRows - 1) / kRows;
    // Rows beyond the sequence have no weights, seen or not.
    const int open_last = range.open_end < sequence_.rows() ? at_least(0, range.open_end - range.begin) / kRows : count;
    stream_tiles<Traits, !Policy::kModify>(
        count, {open_first, open_last},
        [&](int stage, int i) {
          copy_rows<Traits, kRows>(stage_tile(stage, 0), p_.q, p_.headdim, sequence_, row_of(i));
          copy_rows<Traits, kRows>(stage_tile(stage, 1), params_.call.dout, p_.headdim_v, sequence_, row_of(i));
          if (thread_index() < kRows) coming = this->statistics_of_row(row_of(i) + thread_index());
        },
        [&](int stage) {
          if (thread_index() < kRows)
            store_shared_pair(this->statistics(stage) + static_cast<uint32_t>(thread_index()) * 8, coming);
        },
        [&](auto masked, int stage, int i) {
          const int first_row = row_of(i);
          float scores[1][Traits::kKeys / 8][4], dprobs[1][Traits::kKeys / 8][4];  // (keys, rows)
          this->multiply(scores, own_tile(0), stage_tile(stage, 0));
          this->multiply(dprobs, own_tile(1), stage_tile(stage, 1));
          const Layout at(first_key_ + warp_line_, first_row);
          this->template differentiate<Policy, decltype(masked)::value>(
              scores, dprobs, at,
              [&](int r) {
                return load_shared_pair(this->statistics(stage) + static_cast<uint32_t>(at.row(r) - first_row) * 8);
              },
              [](const RowModifiers&, int, float) {});
          if constexpr (Policy::kValues) this->accumulate(dv_, scores, stage_tile(stage, 1));
          if constexpr (Policy::kKeys) this->accumulate(dk_, dprobs, stage_tile(stage, 0));
        });
  }

  const int first_key_;
  typename Base::Gradient dk_, dv_;  // of keys; one that the policy does not make takes no registers
};

template <class T, class Traits, class Policy>
FASTATTN_KERNEL(kThreads, Traits::kDim <= 128 ? 2 : 1)
query_gradients(FASTATTN_GRID_CONSTANT BackwardParams params) {
  const AttentionParams& p = params.call.fwd;
  const int block = params.row_blocks - 1 - block_index_x() % params.row_blocks;  // causal: the long rows first
  const int place = block_index_x() / params.row_blocks, nheads_k = static_cast<int>(p.nheads_k);
  const Sequence sequence(p, place / nheads_k, place % nheads_k);
  if (block * Traits::kRows >= sequence.rows()) return;
  QueryGradients<T, Traits, Policy>(params, sequence, block * Traits::kRows).run();
}

template <class T, class Traits, class Policy>
FASTATTN_KERNEL(kThreads, Traits::kDim <= 128 ? 2 : 1)
key_gradients(FASTATTN_GRID_CONSTANT BackwardParams params) {
  const AttentionParams& p = params.call.fwd;
  const int block = block_index_x() % params.key_blocks, place = block_index_x() / params.key_blocks;
  const int nheads_k = static_cast<int>(p.nheads_k);
  const Sequence sequence(p, place / nheads_k, place % nheads_k);
  if (block * Traits::kRows >= sequence.seqlen_k) return;
  KeyGradients<T, Traits, Policy>(params, sequence, block * Traits::kRows).run();
}

// delta = rowsum(dout * out) - dlse: what a row's probabilities have in common in their gradients. 8 lanes for one row.
template <class T>
FASTATTN_KERNEL(kThreads, 8)
row_deltas(FASTATTN_GRID_CONSTANT AttentionBackwardParams call) {
  const AttentionParams& p = call.fwd;
  constexpr int kLanes = 8;
  const int nheads = static_cast<int>(p.nheads), seqlen_q = static_cast<int>(p.seqlen_q);
  const int64_t row = static_cast<int64_t>(block_index_x()) * (kThreads / kLanes) + thread_index() / kLanes;
  const int head = static_cast<int>(row % nheads), query = static_cast<int>(row / nheads % seqlen_q);
  const int batch = static_cast<int>(row / nheads / seqlen_q);
  const int safe_batch = at_most(static_cast<int>(p.batch) - 1, batch);
  const Sequence sequence(p, safe_batch, head / (nheads / static_cast<int>(p.nheads_k)));
  const bool exists = batch == safe_batch && query < sequence.seqlen_q;
  float sum = 0;
  if (exists) {
    const T* out = row_pointer<const T>(p.out, sequence.q_row, sequence.q_first + query, head);
    const T* dout = row_pointer<const T>(call.dout, sequence.q_row, sequence.q_first + query, head);
    for (int d = thread_index() % kLanes * 8; d < static_cast<int>(p.headdim_v); d += kLanes * 8) {
      const auto a = load_global(reinterpret_cast<const Eight<T>*>(out + d));
      const auto b = load_global(reinterpret_cast<const Eight<T>*>(dout + d));
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fused_multiply_add(to_float(a.value[i]), to_float(b.value[i]), sum);
    }
  }
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) sum += shuffle_xor(sum, step);
  if (!exists || thread_index() % kLanes != 0) return;
  const int64_t place = lse_place(p, sequence, query, head);
  if (call.dlse) sum -= load_global(static_cast<const float*>(call.dlse) + place);
  store_global(static_cast<float*>(call.delta) + place, sum);
}

}  // namespace
}  // namespace fastattn

// The only contract between Python and the kernels: plain structs of pointers, shapes and strides.
// Strides count elements. Nothing here owns memory; kernels never allocate tensors.
#pragma once

#include <cstdint>

namespace fastattn {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, i8 = 4 };

constexpr int64_t kMaxHeaddim = 512;   // of headdim and headdim_v; Python's MAX_HEADDIM is this one
constexpr int64_t kBiasSlotKeys = 64;  // keys that share sums of a bias by diagonals; gradient_sums.py, SLOT_KEYS

// Storage of the 16-bit floats: all arithmetic is fp32.
struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

// A (batch, seqlen, heads, dim) tensor with unit stride along dim.
struct TensorView {
  void* data;
  int64_t stride_batch;
  int64_t stride_seqlen;
  int64_t stride_head;
};

// A score modifier: element (b, h, i, j) of a tensor that broadcasts to (batch, nheads, seqlen_q, seqlen_k).
struct ScoreView {
  void* data;  // null = none
  int64_t stride_batch, stride_head, stride_q, stride_k;
  DType dtype;
};

// The keys and values of a call; k and v share heads, lengths and layout.
struct KVParams {
  TensorView k;                 // (batch, seqlen, nheads_k, headdim)
  TensorView v;                 // (batch, seqlen, nheads_k, headdim_v)
  TensorView k_scale, v_scale;  // of int8: float (batch, seqlen, nheads_k), what an element counts; else null
  const int32_t* cu_seqlens;    // (batch + 1,): sequences are packed one after the other; null = one per batch row
  const int32_t* seqlens;       // (batch,): where each sequence ends; null = at `seqlen`
  const int32_t* leftpad;       // (batch,): where it begins; null = at 0
  const int32_t* batch_idx;     // (batch,): in which row it is; null = its own
  const int32_t* block_table;   // (batch, max_blocks): its pages, rows of page_size tokens; null = not paged
  int64_t stride_block_table, page_size;
  int64_t seqlen;  // of the longest sequence
  DType dtype;
};

struct AttentionParams {
  TensorView q;    // (batch, seqlen_q, nheads, headdim); packed: (1, total_q, nheads, headdim)
  TensorView out;  // the same, headdim_v
  KVParams kv;
  void* lse;  // (batch, nheads, seqlen_q), packed (nheads, total_q); natural log, float or double; may be null
  int64_t lse_stride_batch, lse_stride_head;
  const int32_t* cu_seqlens_q;  // (batch + 1,): as in kv
  int64_t batch, seqlen_q;      // seqlen_q of the longest sequence
  int64_t nheads, nheads_k;     // nheads % nheads_k == 0
  int64_t headdim, headdim_v;
  double softmax_scale;
  double softcap;  // 0 = off
  int64_t window_left,
      window_right;          // keys around i + seqlen_k - seqlen_q, inclusive; -1 = unlimited; causal: right = 0
  const void* alibi_slopes;  // float or double (batch, nheads); may be null
  int64_t alibi_stride_batch;
  ScoreView bias;     // float
  ScoreView mask;     // bytes, 1 = may attend
  const void* sinks;  // (nheads,) float or double; may be null
  double dropout_p;   // 0 = off
  uint64_t dropout_seed, dropout_offset;
  DType dtype;  // of q and out; double computes in double, everything else in float
  int nthreads;
};

// The gradients of a forward call, from those of out and lse.
struct AttentionBackwardParams {
  AttentionParams fwd;  // as the forward saw it; out and lse hold its results
  TensorView dout;      // (batch, seqlen_q, nheads, headdim_v), packed as out, in q's dtype
  const void* dlse;     // strided as fwd.lse; null = zero
  void* delta;          // strided as fwd.lse: receives rowsum(dout * out) - dlse
  TensorView dq;        // as q, but float or double whatever q is
  TensorView dk, dv;    // as k and v
  ScoreView dbias;      // float or double, zeros before the call: dS is added up where strides are 0; null = not wanted
  int64_t dbias_stride_slot;  // further for each kBiasSlotKeys keys: a bias of diagonals has sums for each of them
  bool fast_bf16_dot;         // whether this machine multiplies pairs of bf16 as fast as single floats
};

// Rotate q into q_out, and write the rotated new k, and v, into the cache, where kv.seqlens says that it ends.
struct KVAppendParams {
  TensorView q, q_out;      // (batch, seqlen_q, nheads, headdim); only read when rotary_cos is set
  TensorView k, v;          // (batch, seqlen_new, nheads_k, headdim or headdim_v)
  KVParams kv;              // the cache; its scales are written where it is int8
  const float* rotary_cos;  // (positions, half_rotary) contiguous; null = no rotary
  const float* rotary_sin;
  int64_t batch, seqlen_q, seqlen_new;
  int64_t nheads, nheads_k;
  int64_t headdim, headdim_v, half_rotary;
  bool interleaved;  // pairs (0, 1), (2, 3), ...; else (0, half_rotary), (1, half_rotary + 1), ...
  bool q_per_row;    // query i turns by the cache's length + i, else by the length
  DType dtype;       // of q, k, v
  int nthreads;
};

// out = x W^T + bias, with W as pack_linear left it.
struct LinearParams {
  const float* x;        // (tokens, in_features), unit stride along in_features
  const float* weights;  // packed; the bias is inside
  float* out;            // (tokens, out_features), unit stride along out_features
  int64_t stride_x, stride_out;
  int64_t tokens, in_features, out_features;
  DType dtype;  // of W: f32 or bf16
  int nthreads;
};

struct PackLinearParams {
  const void* weight;  // (out_features, in_features), unit stride along in_features
  const float* bias;   // (out_features,) or null
  float* packed;       // packed_linear_floats(...) of them
  int64_t stride_weight;
  int64_t in_features, out_features;
  DType dtype;
  int nthreads;
};

struct RmsNormParams {
  const float* x;       // (tokens, hidden), unit stride along hidden
  const float* weight;  // (hidden,) contiguous
  float* out;           // (tokens, hidden) contiguous
  int64_t stride_x;
  int64_t tokens, hidden;
  float eps;
  int nthreads;
};

enum class Activation : int32_t { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3 };

struct ActivateParams {
  const float* x;  // (tokens, ffn), or if gated (tokens, 2 * ffn), gate first; unit stride along the columns
  float* out;      // (tokens, ffn) contiguous
  int64_t stride_x;
  int64_t tokens, ffn;
  Activation kind;
  bool gated;
  int nthreads;
};

// One value per row, or one for all rows (stride 0).
template <class T>
struct PerRow {
  const T* data;
  int64_t stride;

  T operator[](int64_t row) const { return data[row * stride]; }
};

// Values per row of the batch, with unit stride inside a row; null = none.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;

  explicit operator bool() const { return data != nullptr; }
  const T* operator[](int64_t row) const { return data + row * stride; }
};

// What happens to the logits first: x * (x > 0 ? 1 / repetition : repetition) of tokens read or written, then
// x - frequency * count - presence of tokens written, x + bias, and -inf where not allowed. In double, rounded once.
struct LogitEdits {
  PerRow<double> repetition, presence, frequency;
  Rows<int32_t> counts;       // (batch, vocab): how often a row has written each token
  Rows<uint8_t> prompt;       // (batch, vocab): 1 = it has read it
  Rows<int32_t> seen_ids;     // (batch, .): instead, the tokens seen, ascending,
  Rows<int32_t> seen_counts;  // how often each was written, perhaps never,
  const int32_t* seen_n;      // (batch,) how many they are,
  Rows<uint8_t> unseen;       // (batch, .) and a bit for each token of the vocabulary, 0 = seen: unseen_bytes(vocab)
  Rows<float> bias;           // (batch, vocab)
  Rows<int64_t> bias_ids;     // (batch, bias_n): instead, tokens, -1 = none, and the values of each
  Rows<float> bias_values;
  int64_t bias_n;
  Rows<uint8_t> allowed;       // (batch, vocab): 1 = may be drawn
  Rows<uint8_t> allowed_bits;  // (batch, ceil(vocab / 8)): instead, a bit each
};

struct SamplingParams {
  const void* logits;  // (batch, vocab), unit stride along vocab; vocab <= kMaxVocab
  int64_t stride_batch;
  PerRow<double> temperature;  // >= 0, 0 = greedy, inf = uniform
  PerRow<int64_t> top_k;       // <= 0 = off
  PerRow<double> top_p;        // in [0, 1], 1 = off
  PerRow<double> min_p;        // in [0, 1], 0 = off
  PerRow<int64_t> seeds;       // the 64 bits of the key
  PerRow<int64_t> positions;
  const LogitEdits* edits;  // may be null
  int64_t* tokens;          // (batch,) out: a token, or -SamplingError of a row that has none
  bool* kept;         // (batch, vocab) contiguous out, what the filters keep of each row that has a token; may be null
  int64_t best;       // how many of the most likely tokens to name; 0 = no log-probabilities at all
  float* logprobs;    // (batch,) out: of the drawn tokens under softmax(logits), before edits, temperature and filters
  int64_t* best_ids;  // (batch, best) out, the most likely first
  float* best_logprobs;  // (batch, best) out
  int64_t batch, vocab;
  DType dtype;
  int nthreads;
};

// Exact speculative sampling of a chain: which drafted tokens the target would have drawn, and the one that follows.
struct SpeculativeParams {
  const void* draft;   // (batch, n, vocab), unit stride along vocab; rows need not sum to 1
  const void* target;  // (batch, n + 1, vocab), the same
  int64_t draft_stride_batch, draft_stride_token, target_stride_batch, target_stride_token;
  const int64_t* drafted;            // (batch, n) contiguous
  PerRow<int64_t> seeds, positions;  // positions: of the first drafted token
  double* totals;                    // (batch, 2 n + 1) working memory
  int64_t* tokens;                   // (batch, n + 1) out: the accepted tokens, one more, then -1
  int64_t* accepted;                 // (batch,) out: how many; -1 where something of the row is wrong
  int64_t batch, n, vocab;
  DType dtype;  // of draft and target
  int nthreads;
};

// Of a row as it is; the second kind, as it is after edits; an id of bias_ids that is none.
enum SamplingError : int64_t {
  kHasNaN = 1,
  kHasInf,
  kNothingFinite,
  kEditedHasNaN,
  kEditedHasInf,
  kEditedNothingFinite,
  kBadBiasId
};

// Of the bits of LogitEdits::unseen of a row: they are read a word at a time.
constexpr int64_t unseen_bytes(int64_t vocab) { return (vocab + 63) / 64 * 8; }

constexpr int64_t kMaxVocab = int64_t{1} << 22;  // so that the mass of a row fits 64 bits: sampling_filters.h

}  // namespace fastattn

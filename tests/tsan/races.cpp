// The attention kernels on four threads under ThreadSanitizer; results must be those of one thread, to the bit.
// Arguments: forward | decode | backward | overlap (a planted bug: all heads write their output to one place).
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/attention.h"
#include "cpu/attention_bwd.h"
#include "cpu/linear.h"
#include "cpu/simd/vec_f64.h"
#include "cpu/simd/vec_scalar.h"

namespace fastattn {
namespace {

using Wide = VecF64<16>;
using Product = WidenBf16Product<VecScalar>;

struct Shape {
  int64_t batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim;
};

// Which score modifiers a case has.
struct Features {
  bool causal, dropout, sinks, packed;
  int bias;  // 0 = none, 1 = (seqlen_q, seqlen_k), 2 = (nheads, seqlen_q, seqlen_k), 3 = (batch, nheads, seqlen_q, 1)
};

// (batch, seqlen, heads, dim), contiguous; packed sequences are the same rows under one batch stride.
template <class Real>
TensorView view(std::vector<Real>& x, int64_t seqlen, int64_t heads, int64_t dim) {
  return {x.data(), seqlen * heads * dim, heads * dim, dim};
}

// Every buffer of one call, and the calls themselves.
template <class Real>
class Call {
 public:
  Call(const Shape& s, const Features& f) : s_(s), f_(f) {
    std::mt19937 engine(1);
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<Real>& x, int64_t size) {
      x.resize(static_cast<size_t>(size));
      for (Real& value : x) value = static_cast<Real>(normal(engine));
    };
    fill(q_, s.batch * s.seqlen_q * s.nheads * s.headdim);
    fill(k_, s.batch * s.seqlen_k * s.nheads_k * s.headdim);
    fill(v_, s.batch * s.seqlen_k * s.nheads_k * s.headdim);
    fill(bias_, s.batch * s.nheads * s.seqlen_q * s.seqlen_k);
    fill(sinks_, s.nheads);
    fill(dout_, s.batch * s.seqlen_q * s.nheads * s.headdim);
    fill(dlse_, s.batch * s.nheads * s.seqlen_q);
    out_.resize(q_.size());
    lse_.resize(dlse_.size());
    delta_.resize(dlse_.size());
    dq_.resize(q_.size());
    dk_.resize(k_.size());
    dv_.resize(v_.size());
    dbias_.resize(bias_.size());
    for (int64_t b = 0; b <= s.batch; ++b) {
      cu_q_.push_back(static_cast<int32_t>(b * s.seqlen_q));
      cu_k_.push_back(static_cast<int32_t>(b * s.seqlen_k));
    }
  }

  void forward(int nthreads, bool overlap = false) {
    AttentionParams p = params(nthreads);
    if (overlap) p.out.stride_head = 0;
    attention_forward<VecScalar, Wide, Product>(p);
  }

  void backward(int nthreads) {
    AttentionBackwardParams b{};
    b.fwd = params(nthreads);
    b.dout = view(dout_, s_.seqlen_q, s_.nheads, s_.headdim);
    b.dlse = dlse_.data();
    b.delta = delta_.data();
    b.dq = view(dq_, s_.seqlen_q, s_.nheads, s_.headdim);
    b.dk = view(dk_, s_.seqlen_k, s_.nheads_k, s_.headdim);
    b.dv = view(dv_, s_.seqlen_k, s_.nheads_k, s_.headdim);
    std::fill(dbias_.begin(), dbias_.end(), Real{0});
    if (f_.bias) b.dbias = bias_view(dbias_);
    attention_backward<VecScalar, Wide, Product>(b);
  }

  std::vector<Real> results() const {
    std::vector<Real> all;
    for (const std::vector<Real>* x : {&out_, &lse_, &dq_, &dk_, &dv_, &dbias_})
      all.insert(all.end(), x->begin(), x->end());
    return all;
  }

 private:
  ScoreView bias_view(std::vector<Real>& x) const {
    const DType dtype = sizeof(Real) == 8 ? DType::f64 : DType::f32;
    const int64_t row = s_.seqlen_k, head = s_.seqlen_q * row;
    if (f_.bias == 1) return {x.data(), 0, 0, row, 1, dtype};
    if (f_.bias == 2) return {x.data(), 0, head, row, 1, dtype};
    return {x.data(), s_.nheads * s_.seqlen_q, s_.seqlen_q, 1, 0, dtype};
  }

  AttentionParams params(int nthreads) {
    AttentionParams p{};
    p.q = view(q_, s_.seqlen_q, s_.nheads, s_.headdim);
    p.out = view(out_, s_.seqlen_q, s_.nheads, s_.headdim);
    p.kv.k = view(k_, s_.seqlen_k, s_.nheads_k, s_.headdim);
    p.kv.v = view(v_, s_.seqlen_k, s_.nheads_k, s_.headdim);
    p.kv.seqlen = s_.seqlen_k;
    p.lse = lse_.data();
    p.lse_stride_batch = s_.nheads * s_.seqlen_q;
    p.lse_stride_head = s_.seqlen_q;
    if (f_.packed) {
      p.cu_seqlens_q = cu_q_.data();
      p.kv.cu_seqlens = cu_k_.data();
      p.lse_stride_head = s_.batch * s_.seqlen_q;
    }
    p.batch = s_.batch;
    p.seqlen_q = s_.seqlen_q;
    p.nheads = s_.nheads;
    p.nheads_k = s_.nheads_k;
    p.headdim = p.headdim_v = s_.headdim;
    p.softmax_scale = 0.25;
    p.window_left = -1;
    p.window_right = f_.causal ? 0 : -1;
    if (f_.bias) p.bias = bias_view(bias_);
    if (f_.sinks) p.sinks = sinks_.data();
    if (f_.dropout) p.dropout_p = 0.2;
    p.dtype = p.kv.dtype = sizeof(Real) == 8 ? DType::f64 : DType::f32;
    p.nthreads = nthreads;
    return p;
  }

  const Shape s_;
  const Features f_;
  std::vector<Real> q_, k_, v_, bias_, sinks_, dout_, dlse_, out_, lse_, delta_, dq_, dk_, dv_, dbias_;
  std::vector<int32_t> cu_q_, cu_k_;
};

// Whether four threads leave the bits that one leaves.
template <class Real>
bool same(const Shape& shape, const Features& features, bool gradients) {
  std::vector<Real> expected;
  for (const int nthreads : {1, 4}) {
    Call<Real> call(shape, features);
    call.forward(nthreads);
    if (gradients) call.backward(nthreads);
    const std::vector<Real> found = call.results();
    if (nthreads == 1) expected = found;
    if (memcmp(expected.data(), found.data(), found.size() * sizeof(Real)) != 0) return false;
  }
  return true;
}

bool run(const std::string& what) {
  const Shape prompt{2, 150, 200, 4, 2, 16}, step{1, 1, 3000, 4, 2, 64}, training{2, 70, 600, 4, 2, 16};
  const Shape few_rows{1, 40, 3000, 4, 2, 16};  // a tile per chunk of keys
  if (what == "overlap") return Call<float>(prompt, {}).forward(4, true), true;
  if (what == "forward")
    return same<float>(prompt, {true, true, true, false, 2}, false) && same<double>(prompt, {}, false) &&
           same<float>(prompt, {true, false, false, true, 0}, false);
  if (what == "decode")
    return same<float>(step, {}, false) && same<float>(step, {true, false, true, false, 1}, false) &&
           same<float>(few_rows, {true, true, false, false, 0}, false);
  bool good = what == "backward";
  for (const int bias : {0, 1, 2, 3})
    good = good && same<float>(training, {bias == 0, bias == 2, true, false, bias}, true);
  return good && same<float>(training, {true, false, false, true, 0}, true) && same<double>(training, {}, true);
}

}  // namespace
}  // namespace fastattn

int main(int argc, char** argv) {
  if (argc != 2 || !fastattn::run(argv[1])) {
    fprintf(stderr, "races: results depend on the number of threads, or no such part\n");
    return 1;
  }
  return 0;
}

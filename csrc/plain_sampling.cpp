// sample without the tour through Python, as plain_attention.cpp does it for attention: numbers, tensors per row and
// every edit, in the dtypes that need no conversion. Whatever is not plain, not understood or wrong is answered with
// None: the caller then takes the long way, which checks, converts and explains.
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/registry.h"
#include "plain_attention.h"
#include "plain_tensor.h"

namespace fastattn {
namespace {

// The arguments, in order; see fastattn/sampling/draw.py.
enum Arg {
  kLogits,
  kTemperature,
  kTopK,
  kTopP,
  kMinP,
  kSeeds,
  kPositions,
  kRepetition,
  kPresence,
  kFrequency,
  kCounts,
  kPrompt,
  kBias,
  kAllowed,
  kLogprobs,
  kNthreads,
  kArgs
};

constexpr int64_t kBriefLogits = int64_t{1} << 16;  // below, a call takes microseconds

bool is_vector(const DLTensor& t, int64_t size) {
  return t.ndim == 1 && t.shape[0] == size && (size == 1 || t.strides[0] == 1);
}

bool has_dtype(const DLTensor& t, uint8_t code, uint8_t bits) {
  return t.dtype.code == code && t.dtype.bits == bits && t.dtype.lanes == 1;
}

bool as_number(PyObject* x, double* out) {
  if (PyFloat_CheckExact(x)) return *out = PyFloat_AS_DOUBLE(x), true;
  if (!PyLong_CheckExact(x)) return false;
  *out = PyLong_AsDouble(x);
  return !(*out == -1.0 && PyErr_Occurred());
}

bool as_number(PyObject* x, int64_t* out) {
  if (!PyLong_CheckExact(x)) return false;
  *out = PyLong_AsLongLong(x);
  return !(*out == -1 && PyErr_Occurred());
}

// A parameter: a number, or a contiguous (batch,) tensor of T or of Narrow. All in [low, high].
template <class T, class Narrow, uint8_t kCode>
class Parameter {
 public:
  PerRow<T> rows{};
  bool is_tensor = false;

  bool read(PyObject* given, int64_t batch, T low, T high) {
    rows = {&number_, 0};
    if (PyFloat_CheckExact(given) || PyLong_CheckExact(given))
      return as_number(given, &number_) && low <= number_ && number_ <= high;
    DLTensor t;
    if (!read_tensor(given, &t) || !is_vector(t, batch)) return false;
    is_tensor = true;
    if (has_dtype(t, kCode, 8 * sizeof(T)))
      rows = {static_cast<const T*>(data_of(t)), 1};
    else if (!has_dtype(t, kCode, 8 * sizeof(Narrow)) || !widen(static_cast<const Narrow*>(data_of(t)), batch))
      return false;
    for (int64_t row = 0; row < batch; ++row)
      if (!(low <= rows[row] && rows[row] <= high)) return false;  // nor NaN
    return true;
  }

  bool is(T value) const { return !is_tensor && number_ == value; }

 private:
  bool widen(const Narrow* from, int64_t batch) {
    if (batch > kFew) many_.reset(new (std::nothrow) T[static_cast<size_t>(batch)]);
    T* to = batch > kFew ? many_.get() : few_;
    if (!to) return false;
    for (int64_t row = 0; row < batch; ++row) to[row] = static_cast<T>(from[row]);
    rows = {to, 1};
    return true;
  }

  static constexpr int64_t kFew = 16;
  T number_{}, few_[kFew];
  std::unique_ptr<T[]> many_;
};

using Real = Parameter<double, float, kDLFloat>;
using Integer = Parameter<int64_t, int32_t, kDLInt>;

// One value per token: (size,) for all rows, or (batch, size).
template <class T>
bool read_per_token(const DLTensor& t, int64_t batch, int64_t size, Rows<T>* out) {
  const bool shared = t.ndim == 1;
  if (!shared && (t.ndim != 2 || t.shape[0] != batch)) return false;
  if (t.shape[t.ndim - 1] != size || (size > 1 && t.strides[t.ndim - 1] != 1)) return false;
  *out = {static_cast<const T*>(data_of(t)), shared ? 0 : t.strides[0]};
  return true;
}

template <class T>
bool read_per_token(PyObject* x, uint8_t code, int64_t batch, int64_t size, Rows<T>* out) {
  DLTensor t;
  return read_tensor(x, &t) && has_dtype(t, code, 8 * sizeof(T)) && read_per_token(t, batch, size, out);
}

// TokenCounts as (vocab, ids, counts, lengths, unseen), or a dense tensor of counts.
bool read_counts(PyObject* x, int64_t batch, int64_t vocab, LogitEdits* edits) {
  if (!PyTuple_CheckExact(x)) return read_per_token(x, kDLInt, batch, vocab, &edits->counts);
  DLTensor ids, counts, lengths;
  if (PyTuple_GET_SIZE(x) != 5 || PyLong_AsLongLong(PyTuple_GET_ITEM(x, 0)) != vocab ||
      !read_tensor(PyTuple_GET_ITEM(x, 1), &ids) || !read_tensor(PyTuple_GET_ITEM(x, 2), &counts) ||
      !read_tensor(PyTuple_GET_ITEM(x, 3), &lengths) || ids.ndim != 2 || counts.ndim != 2 || !is_vector(lengths, batch))
    return false;
  edits->seen_n = static_cast<const int32_t*>(data_of(lengths));
  return read_per_token(ids, batch, ids.shape[1], &edits->seen_ids) &&
         read_per_token(counts, batch, ids.shape[1], &edits->seen_counts) &&
         read_per_token(PyTuple_GET_ITEM(x, 4), kDLUInt, batch, unseen_bytes(vocab), &edits->unseen);
}

bool read_bias(PyObject* x, int64_t batch, int64_t vocab, LogitEdits* edits) {
  if (!PyTuple_CheckExact(x)) return read_per_token(x, kDLFloat, batch, vocab, &edits->bias);
  if (PyTuple_GET_SIZE(x) != 2) return false;
  DLTensor ids, values;
  if (!read_tensor(PyTuple_GET_ITEM(x, 0), &ids) || !read_tensor(PyTuple_GET_ITEM(x, 1), &values) ||
      !has_dtype(ids, kDLInt, 64) || !has_dtype(values, kDLFloat, 32) || ids.ndim < 1 || ids.ndim != values.ndim)
    return false;
  edits->bias_n = ids.shape[ids.ndim - 1];
  return read_per_token(ids, batch, edits->bias_n, &edits->bias_ids) &&
         read_per_token(values, batch, edits->bias_n, &edits->bias_values);
}

bool read_allowed(PyObject* x, int64_t batch, int64_t vocab, LogitEdits* edits) {
  if (read_per_token(x, kDLBool, batch, vocab, &edits->allowed)) return true;
  Rows<int32_t> words{};
  if (!read_per_token(x, kDLInt, batch, (vocab + 31) / 32, &words)) return false;
  edits->allowed_bits = {reinterpret_cast<const uint8_t*>(words.data), 4 * words.stride};
  return true;
}

struct Edits {
  LogitEdits all{};
  Real repetition, presence, frequency;
  bool some = false;

  bool read(PyObject* const* args, int64_t batch, int64_t vocab) {
    constexpr double kMost = FLT_MAX;
    if (!repetition.read(args[kRepetition], batch, FLT_MIN, kMost) ||
        !presence.read(args[kPresence], batch, -kMost, kMost) ||
        !frequency.read(args[kFrequency], batch, -kMost, kMost))
      return false;
    all.repetition = repetition.rows;
    all.presence = presence.rows;
    all.frequency = frequency.rows;
    PyObject *counts = args[kCounts], *prompt = args[kPrompt];
    const bool counted = !presence.is(0.0) || !frequency.is(0.0);
    if (counted || !repetition.is(1.0)) {
      if (counts == Py_None && (counted || prompt == Py_None)) return false;
      if (counts != Py_None && !read_counts(counts, batch, vocab, &all)) return false;
      if (prompt != Py_None && (all.seen_ids || !read_per_token(prompt, kDLBool, batch, vocab, &all.prompt)))
        return false;
      some = true;
    } else if (counts != Py_None || prompt != Py_None) {
      return false;  // they do nothing, but may be wrong
    }
    if (args[kBias] != Py_None && !read_bias(args[kBias], batch, vocab, &all)) return false;
    if (args[kAllowed] != Py_None && !read_allowed(args[kAllowed], batch, vocab, &all)) return false;
    some = some || args[kBias] != Py_None || args[kAllowed] != Py_None;
    return true;
  }
};

// Fresh seeds from torch's global generator, in place.
bool draw_seeds(PyObject* tensor) {
  const Binding& b = binding();
  static PyObject* const lowest = PyLong_FromLongLong(INT64_MIN);
  PyObject* done = PyObject_CallMethodObjArgs(tensor, b.random, lowest, Py_None, nullptr);
  Py_XDECREF(done);
  return done != nullptr;
}

// What comes beside the tokens where log-probabilities are wanted.
struct Logprobs {
  PyObject *drawn = nullptr, *ids = nullptr, *best = nullptr;

  Logprobs() = default;
  Logprobs(const Logprobs&) = delete;
  Logprobs& operator=(const Logprobs&) = delete;
  ~Logprobs() {
    Py_XDECREF(drawn);
    Py_XDECREF(ids);
    Py_XDECREF(best);
  }

  // Room for n of the best; false where the call is not plain, perhaps with an exception set.
  bool make(PyObject* wanted, SamplingParams* p) {
    const Binding& b = binding();
    if (!as_number(wanted, &p->best) || p->best < 0 || p->best > p->vocab) return false;
    if (p->best == 0) return true;
    PyObject *rows = PyLong_FromLongLong(p->batch), *columns = wanted;
    DLTensor views[3];
    drawn = PyObject_CallOneArg(b.empty_floats, rows);
    ids = PyObject_CallFunctionObjArgs(b.empty_tokens, rows, columns, nullptr);
    best = PyObject_CallFunctionObjArgs(b.empty_floats, rows, columns, nullptr);
    Py_DECREF(rows);
    int i = 0;
    for (PyObject* made : {drawn, ids, best})
      if (!made || !read_tensor(made, &views[i++])) return false;
    p->logprobs = static_cast<float*>(data_of(views[0]));
    p->best_ids = static_cast<int64_t*>(data_of(views[1]));
    p->best_logprobs = static_cast<float*>(data_of(views[2]));
    return true;
  }
};

// The tokens; null where the call is not plain, a row cannot be drawn from, or Python has an exception set.
PyObject* draw(PyObject* const* args) {
  SamplingParams p{};
  DLTensor logits;
  if (!read_tensor(args[kLogits], &logits) || logits.ndim != 2 || !is_float(logits.dtype, &p.dtype) ||
      p.dtype == DType::f64)
    return nullptr;
  const int64_t batch = logits.shape[0], vocab = logits.shape[1];
  if (batch < 1 || vocab < 1 || vocab > kMaxVocab || (vocab > 1 && logits.strides[1] != 1)) return nullptr;
  Real temperature, top_p, min_p;
  Integer top_k, seeds, positions;
  Edits edits;
  if (!temperature.read(args[kTemperature], batch, 0.0, HUGE_VAL) || !top_k.read(args[kTopK], batch, -1, INT64_MAX) ||
      !top_p.read(args[kTopP], batch, 0.0, 1.0) || !min_p.read(args[kMinP], batch, 0.0, 1.0) ||
      (args[kSeeds] != Py_None && !seeds.read(args[kSeeds], batch, INT64_MIN, INT64_MAX)) ||
      !positions.read(args[kPositions], batch, 0, INT64_MAX) || !edits.read(args, batch, vocab))
    return nullptr;
  p.logits = data_of(logits);
  p.stride_batch = logits.strides[0];
  p.temperature = temperature.rows;
  p.top_k = top_k.rows;
  p.top_p = top_p.rows;
  p.min_p = min_p.rows;
  p.seeds = seeds.rows;
  p.positions = positions.rows;
  p.edits = edits.some ? &edits.all : nullptr;
  p.batch = batch;
  p.vocab = vocab;
  p.nthreads = static_cast<int>(PyLong_AsLong(args[kNthreads]));
  Logprobs logprobs;
  if (!logprobs.make(args[kLogprobs], &p)) return nullptr;
  PyObject* tokens = make_integers(batch, &p.tokens);
  if (!tokens) return nullptr;
  bool drawn = true;
  if (args[kSeeds] == Py_None) {  // a row's seed is read before its token is written
    drawn = draw_seeds(tokens);
    p.seeds = {p.tokens, 1};
  }
  if (drawn) {
    // Releasing the interpreter and taking it again costs 0.1 us: as much as reading a few thousand logits.
    PyThreadState* released = batch * vocab >= kBriefLogits ? PyEval_SaveThread() : nullptr;
    kernels().sample(p);
    if (released) PyEval_RestoreThread(released);
    for (int64_t row = 0; row < batch; ++row) drawn = drawn && p.tokens[row] >= 0;
  }
  PyObject* result = nullptr;
  if (drawn) result = p.best ? PyTuple_Pack(4, tokens, logprobs.drawn, logprobs.ids, logprobs.best) : Py_NewRef(tokens);
  Py_DECREF(tokens);
  return result;
}

}  // namespace

PyObject* plain_sample(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != kArgs) return PyErr_Format(PyExc_TypeError, "plain_sample: expected %d arguments, got %zd", kArgs, n);
  const char* forced = std::getenv("FASTATTN_BACKEND");
  if (binding().exchange && !(forced && *forced))
    if (PyObject* tokens = draw(args)) return tokens;
  PyErr_Clear();
  Py_RETURN_NONE;
}

}  // namespace fastattn

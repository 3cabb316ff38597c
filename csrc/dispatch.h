// Run-time values to compile-time ones, by generic lambda: visit_dtype(dtype, [&](auto tag) { using T = ...; }).
#pragma once

#include "params.h"

namespace fastattn {
namespace {

template <class T>
struct TypeTag {
  using type = T;
};

// The dtypes that the kernels compute in float.
template <class Fn>
void visit_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::f32: return fn(TypeTag<float>{});
    case DType::bf16: return fn(TypeTag<bf16_t>{});
    case DType::f16: return fn(TypeTag<f16_t>{});
    default: return;
  }
}

// What q, out and gradients may be stored as where Real is what the kernel computes in.
template <class Real, class Fn>
void visit_storage(DType dtype, Fn&& fn) {
  if constexpr (sizeof(Real) == 8)
    fn(TypeTag<double>{});
  else
    visit_dtype(dtype, fn);
}

// The same for k and v, which may be int8 with scales.
template <class Real, class Fn>
void visit_kv_storage(DType dtype, Fn&& fn) {
  if constexpr (sizeof(Real) == 4)
    if (dtype == DType::i8) return fn(TypeTag<int8_t>{});
  visit_storage<Real>(dtype, fn);
}

}  // namespace
}  // namespace fastattn

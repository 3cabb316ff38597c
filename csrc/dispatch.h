// Run-time values to compile-time ones, by generic lambda: visit_dtype(dtype, [&](auto tag) { using T = ...; }).
#pragma once

#include "params.h"

namespace fastattn {
namespace {

template <class T>
struct TypeTag {
  using type = T;
};

template <class Fn>
void visit_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::f32: return fn(TypeTag<float>{});
    case DType::bf16: return fn(TypeTag<bf16_t>{});
    case DType::f16: return fn(TypeTag<f16_t>{});
  }
}

}  // namespace
}  // namespace fastattn

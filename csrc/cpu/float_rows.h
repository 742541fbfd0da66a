// Rows of floating-point tensors of any type, converted as they are read and written.
//
// An op computes in float or double on rows in the L1 cache; a tensor that holds that type is used
// in place, any other is converted row by row.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <cstdint>

#include "vector_math.h"

namespace kdcmae_fast {

template <class To, class From>
KDCMAE_INLINE void convert_all(const From* from, int64_t n, To* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}
template <class To, class From>
void convert_row(const From* from, int64_t n, To* to) {
  convert_all(from, n, to);
}
KDCMAE_CLONES static void convert_row(const at::BFloat16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = bits_as<float>(uint32_t(from[i].x) << 16);
}
// To the nearest, ties to even. A branch for NaN would keep the loop from being vectorised.
KDCMAE_CLONES static void convert_row(const float* from, int64_t n, at::BFloat16* to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_as<uint32_t>(from[i]);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i].x = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}
KDCMAE_CLONES static void convert_row(const at::Half* from, int64_t n, float* to) {
  convert_all(from, n, to);
}
KDCMAE_CLONES static void convert_row(const float* from, int64_t n, at::Half* to) {
  convert_all(from, n, to);
}

// The rows of a tensor (R, D), in any floating-point type and at any distance from each other.
struct Rows {
  explicit Rows(const at::Tensor& x)
      : data(static_cast<char*>(x.data_ptr())), type(x.scalar_type()),
        pitch(x.stride(0) * int64_t(x.element_size())), width(x.size(1)) {}

  char* at(int64_t row) const { return data + row * pitch; }

  template <class T>
  bool holds() const { return type == c10::CppTypeToScalarType<T>::value; }

  // The row itself where it holds T, else converted into `scratch`.
  template <class T>
  const T* read(int64_t row, T* scratch) const {
    if (holds<T>()) return reinterpret_cast<const T*>(at(row));
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "read", [&] {
      convert_row(reinterpret_cast<const scalar_t*>(at(row)), width, scratch);
    });
    return scratch;
  }

  // Where to write the row before `wrote`: in place where it holds T, else `scratch`.
  template <class T>
  T* target(int64_t row, T* scratch) const {
    return holds<T>() ? reinterpret_cast<T*>(at(row)) : scratch;
  }

  template <class T>
  void wrote(int64_t row, const T* values) const {
    if (static_cast<const void*>(values) == at(row)) return;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "write", [&] {
      convert_row(values, width, reinterpret_cast<scalar_t*>(at(row)));
    });
  }

  char* data;
  at::ScalarType type;
  int64_t pitch, width;
};

}  // namespace kdcmae_fast

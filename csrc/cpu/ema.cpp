// Moving averages of lists of tensors on the CPU; kernels/ema/README.md. All tensors are cut into
// pieces that threads share, so that many small ones cost no more than a few large ones.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "vector_math.h"

namespace kdcmae_fast {
namespace {

constexpr int64_t kPiece = 16384;  // elements: a float32 teacher and its student stay in the cache

template <class T>
KDCMAE_INLINE T widen(float x) { return T(x); }
template <class T>
KDCMAE_INLINE T widen(double x) { return T(x); }
template <class T>
KDCMAE_INLINE T widen(c10::BFloat16 x) { return T(bits_as<float>(uint32_t(x.x) << 16)); }
// Exponents are rebiased by a multiplication, which takes care of subnormal numbers.
template <class T>
KDCMAE_INLINE T widen(c10::Half x) {
  const uint32_t magnitude = uint32_t(x.x & 0x7fff) << 13;
  const float finite = bits_as<float>(magnitude) * 5.192296858534828e33f;  // 2^112
  const uint32_t bits = (x.x & 0x7fff) >= 0x7c00 ? magnitude | 0x7f800000 : bits_as<uint32_t>(finite);
  return T(bits_as<float>(bits | (uint32_t(x.x & 0x8000) << 16)));
}

// As at::lerp: exact at weight 0 and at weight 1.
template <class T, class S>
KDCMAE_INLINE void lerp(T* teacher, const S* student, int64_t n, T weight) {
  if (weight < T(0.5)) {
    for (int64_t i = 0; i < n; ++i) teacher[i] += weight * (widen<T>(student[i]) - teacher[i]);
  } else {
    const T rest = T(1) - weight;
    for (int64_t i = 0; i < n; ++i) {
      const T s = widen<T>(student[i]);
      teacher[i] = s - (s - teacher[i]) * rest;
    }
  }
}

template <class T>
KDCMAE_INLINE void round_to(const T* x, c10::BFloat16* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_as<uint32_t>(float(x[i]));
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out[i].x = (bits & 0x7fffffff) > 0x7f800000 ? uint16_t(0x7fc0) : uint16_t(rounded);
  }
}

template <class T>
KDCMAE_INLINE void round_to(const T* x, c10::Half* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = c10::Half(float(x[i]));
}

// Clones cannot be templates.
#define KDCMAE_LERP(T, S)                                                            \
  KDCMAE_CLONES void lerp_clone(T* teacher, const S* student, int64_t n, T weight) { \
    lerp(teacher, student, n, weight);                                               \
  }
#define KDCMAE_ROUND(T, S) \
  KDCMAE_CLONES void round_clone(const T* x, S* out, int64_t n) { round_to(x, out, n); }
KDCMAE_LERP(float, float)
KDCMAE_LERP(float, double)
KDCMAE_LERP(float, c10::BFloat16)
KDCMAE_LERP(float, c10::Half)
KDCMAE_LERP(double, float)
KDCMAE_LERP(double, double)
KDCMAE_LERP(double, c10::BFloat16)
KDCMAE_LERP(double, c10::Half)
KDCMAE_ROUND(float, c10::BFloat16)
KDCMAE_ROUND(float, c10::Half)
KDCMAE_ROUND(double, c10::BFloat16)
KDCMAE_ROUND(double, c10::Half)
#undef KDCMAE_LERP
#undef KDCMAE_ROUND

// Elements first ... first + n of a teacher, its student and its shadow (null if none).
struct Piece {
  void* teacher;
  const void* student;
  void* shadow;
  at::ScalarType teacher_type, student_type, shadow_type;
  int64_t first, n;
};

template <class T>
void run(const Piece& piece, double weight) {
  T* teacher = static_cast<T*>(piece.teacher) + piece.first;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, piece.student_type, "ema_update_", [&] {
        lerp_clone(teacher, static_cast<const scalar_t*>(piece.student) + piece.first, piece.n,
                   T(weight));
      });
  if (piece.shadow == nullptr) return;
  if (piece.shadow_type == at::kBFloat16) {
    round_clone(teacher, static_cast<c10::BFloat16*>(piece.shadow) + piece.first, piece.n);
  } else {
    round_clone(teacher, static_cast<c10::Half*>(piece.shadow) + piece.first, piece.n);
  }
}

// Whether element k of the memory of both is the same element of the tensor, for every k.
bool same_layout(const at::Tensor& x, const at::Tensor& y) {
  if (x.is_contiguous() && y.is_contiguous()) return true;
  return x.strides() == y.strides() && x.is_non_overlapping_and_dense();
}

void update(at::TensorList teacher, at::TensorList student, at::TensorList shadow, double momentum,
            const std::optional<at::Tensor>& momentum_tensor) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  TORCH_CHECK_VALUE(teacher.size() == student.size() &&
                        (shadow.empty() || shadow.size() == teacher.size()),
                    "as many students and shadows as teachers, got ", student.size(), ", ",
                    shadow.size(), " and ", teacher.size());
  const double weight = 1 - (momentum_tensor ? momentum_tensor->item<double>() : momentum);
  std::vector<Piece> pieces;
  for (size_t k = 0; k < teacher.size(); ++k) {
    const at::Tensor &t = teacher[k], &s = student[k];
    const at::ScalarType type = t.scalar_type();
    TORCH_CHECK_VALUE(t.sizes() == s.sizes() && (type == at::kFloat || type == at::kDouble),
                      "teacher ", k, " must be float32 or float64 and of its student's shape");
    const bool shadowed = !shadow.empty();
    if (!same_layout(t, s) || (shadowed && !same_layout(t, shadow[k]))) {
      t.lerp_(s.to(type), weight);
      if (shadowed) shadow[k].copy_(t);
      continue;
    }
    for (int64_t first = 0; first < t.numel(); first += kPiece) {
      pieces.push_back({t.data_ptr(), s.const_data_ptr(), shadowed ? shadow[k].data_ptr() : nullptr,
                        type, s.scalar_type(), shadowed ? shadow[k].scalar_type() : at::kFloat,
                        first, std::min(kPiece, t.numel() - first)});
    }
  }
  at::parallel_for(0, pieces.size(), 2, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      if (pieces[k].teacher_type == at::kFloat) {
        run<float>(pieces[k], weight);
      } else {
        run<double>(pieces[k], weight);
      }
    }
  });
}

}  // namespace

// The schema is defined in kernels/ema/op.py, beside the other implementations.
TORCH_LIBRARY_IMPL(kdcmae_fast, CPU, m) { m.impl("ema_update_cpp", update); }

}  // namespace kdcmae_fast

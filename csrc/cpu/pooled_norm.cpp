// Mean of the standardised tokens of each sample, and its gradient, on the CPU;
// kernels/distillation/README.md has the formulas. One thread takes whole samples. A token stays in
// the L1 cache between its passes, so that memory is read once, and written once backward.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "float_rows.h"
#include "vector_math.h"

namespace kdcmae_fast {
namespace {

// Adds the standardised token to `sum`.
template <class T>
KDCMAE_INLINE void add_standardised(const T* x, int64_t n, T eps, T* sum, T* mean_out,
                                    T* rstd_out) {
  const T mean = sum_terms<T>(n, [=](int64_t i, auto zero) KDCMAE_LAMBDA {
    return load<decltype(zero)>(x + i);
  }) / T(n);
  const T squares = sum_terms<T>(n, [=](int64_t i, auto zero) KDCMAE_LAMBDA {
    const auto centred = load<decltype(zero)>(x + i) - mean;
    return centred * centred;
  });
  const T rstd = T(1) / std::sqrt(squares / T(n) + eps);
  for (int64_t i = 0; i < n; ++i) sum[i] += (x[i] - mean) * rstd;
  *mean_out = mean;
  *rstd_out = rstd;
}

// Gradient by a token; `centred` is the gradient by the standardised token less its mean.
template <class T>
KDCMAE_INLINE void gradient(const T* x, const T* centred, int64_t n, T mean, T rstd, T* dx) {
  const T along = rstd * rstd / T(n) * sum_terms<T>(n, [=](int64_t i, auto zero) KDCMAE_LAMBDA {
    using V = decltype(zero);
    return load<V>(centred + i) * (load<V>(x + i) - mean);
  });
  for (int64_t i = 0; i < n; ++i) dx[i] = rstd * (centred[i] - (x[i] - mean) * along);
}

// grad / length, less its mean.
template <class T>
KDCMAE_INLINE void centre(const T* grad, int64_t n, T length, T* out) {
  const T mean = sum_terms<T>(n, [=](int64_t i, auto zero) KDCMAE_LAMBDA {
    return load<decltype(zero)>(grad + i);
  }) / T(n);
  for (int64_t i = 0; i < n; ++i) out[i] = (grad[i] - mean) / length;
}

template <class T>
KDCMAE_INLINE void scale(int64_t n, T factor, T* x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// Clones cannot be templates.
KDCMAE_CLONES void add_token(const float* x, int64_t n, float eps, float* sum, float* mean,
                             float* rstd) {
  add_standardised(x, n, eps, sum, mean, rstd);
}
KDCMAE_CLONES void add_token(const double* x, int64_t n, double eps, double* sum, double* mean,
                             double* rstd) {
  add_standardised(x, n, eps, sum, mean, rstd);
}
KDCMAE_CLONES void token_grad(const float* x, const float* centred, int64_t n, float mean,
                              float rstd, float* dx) {
  gradient(x, centred, n, mean, rstd, dx);
}
KDCMAE_CLONES void token_grad(const double* x, const double* centred, int64_t n, double mean,
                              double rstd, double* dx) {
  gradient(x, centred, n, mean, rstd, dx);
}
KDCMAE_CLONES void centre_row(const float* grad, int64_t n, float length, float* out) {
  centre(grad, n, length, out);
}
KDCMAE_CLONES void centre_row(const double* grad, int64_t n, double length, double* out) {
  centre(grad, n, length, out);
}

// The tokens of each sample of a (B, L, D) tensor whose last axis is contiguous.
struct Samples {
  explicit Samples(const at::Tensor& x)
      : first(x.select(0, 0)), pitch(x.stride(0) * int64_t(x.element_size())) {}

  Rows tokens(int64_t sample) const {
    Rows rows = first;
    rows.data += sample * pitch;
    return rows;
  }

  Rows first;
  int64_t pitch;
};

at::Tensor tokenwise(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) > 0 && x.size(2) > 0,
                    "x must be (B, L, D) with L and D > 0, got ", x.sizes());
  return x.stride(2) == 1 ? x : x.contiguous();
}

int64_t grain(const at::Tensor& x) {
  return std::max<int64_t>(1, 4096 / (x.size(1) * x.size(2)));
}

at::ScalarType compute_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::tuple<at::Tensor, at::Tensor> pooled_tokens(const at::Tensor& x_in, double eps) {
  const at::Tensor x = tokenwise(x_in);
  const int64_t batch = x.size(0), length = x.size(1), n = x.size(2);
  const auto options = x.options().dtype(compute_type(x));
  at::Tensor pooled = at::empty({batch, n}, options);
  at::Tensor statistics = at::empty({2, batch, length}, options);
  if (batch == 0) return {pooled, statistics};
  const Samples samples(x);
  AT_DISPATCH_FLOATING_TYPES(pooled.scalar_type(), "pooled_tokens", [&] {
    scalar_t* out = pooled.mutable_data_ptr<scalar_t>();
    scalar_t* mean = statistics.mutable_data_ptr<scalar_t>();
    scalar_t* rstd = mean + batch * length;
    at::parallel_for(0, batch, grain(x), [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> scratch(n);
      for (int64_t b = begin; b < end; ++b) {
        const Rows tokens = samples.tokens(b);
        scalar_t* sum = out + b * n;
        std::fill(sum, sum + n, scalar_t(0));
        for (int64_t l = 0; l < length; ++l) {
          const int64_t token = b * length + l;
          add_token(tokens.read(l, scratch.data()), n, scalar_t(eps), sum, mean + token,
                    rstd + token);
        }
        scale(n, scalar_t(1) / scalar_t(length), sum);
      }
    });
  });
  return {pooled, statistics};
}

at::Tensor pooled_tokens_grad(const at::Tensor& grad_in, const at::Tensor& x_in,
                              const at::Tensor& statistics_in) {
  const at::Tensor x = tokenwise(x_in);
  const int64_t batch = x.size(0), length = x.size(1), n = x.size(2);
  const auto type = compute_type(x);
  const at::Tensor grad = grad_in.to(type).contiguous(), statistics = statistics_in.contiguous();
  TORCH_CHECK_VALUE(grad.dim() == 2 && grad.size(0) == batch && grad.size(1) == n,
                    "grad must be (B, D), got ", grad.sizes());
  TORCH_CHECK_VALUE(statistics.scalar_type() == type && statistics.numel() == 2 * batch * length,
                    "statistics must be (2, B, L) from the forward pass");
  at::Tensor dx = at::empty(x.sizes(), x.options());
  if (batch == 0) return dx;
  const Samples from(x), to(dx);
  AT_DISPATCH_FLOATING_TYPES(type, "pooled_tokens_grad", [&] {
    const scalar_t* grads = grad.const_data_ptr<scalar_t>();
    const scalar_t* mean = statistics.const_data_ptr<scalar_t>();
    const scalar_t* rstd = mean + batch * length;
    at::parallel_for(0, batch, grain(x), [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> scratch(3 * n);
      scalar_t *centred = scratch.data(), *first = centred + n, *second = first + n;
      for (int64_t b = begin; b < end; ++b) {
        const Rows tokens = from.tokens(b), gradients = to.tokens(b);
        centre_row(grads + b * n, n, scalar_t(length), centred);
        for (int64_t l = 0; l < length; ++l) {
          const int64_t token = b * length + l;
          scalar_t* out = gradients.target(l, second);
          token_grad(tokens.read(l, first), centred, n, mean[token], rstd[token], out);
          gradients.wrote(l, out);
        }
      }
    });
  });
  return dx;
}

}  // namespace

// The schemas are defined in kernels/distillation/pooled.py, beside the other implementations.
TORCH_LIBRARY_IMPL(kdcmae_fast, CPU, m) {
  m.impl("pooled_tokens_cpp", pooled_tokens);
  m.impl("pooled_tokens_grad_cpp", pooled_tokens_grad);
}

}  // namespace kdcmae_fast

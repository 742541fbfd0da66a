// Residual addition + LayerNorm on the CPU; kernels/normalization/README.md has the formulas.
//
// One thread takes whole rows, in chunks that depend on the number of rows only. Each tensor is
// read from memory once and written once: a row stays in the L1 cache between its passes. Weight
// gradients are summed per chunk, then over the chunks in order, whatever the number of threads.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "float_rows.h"
#include "vector_math.h"

namespace kdcmae_fast {
namespace {

template <class T>
KDCMAE_INLINE void add(const T* x, const T* y, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] + y[i];
}

template <class T>
KDCMAE_INLINE void normalize(const T* x, const T* weight, const T* bias, int64_t n, T eps, T* out,
                             T* mean_out, T* rstd_out) {
  const T mean = sum_terms<T>(n, [=](int64_t i, auto zero) KDCMAE_LAMBDA {
    return load<decltype(zero)>(x + i);
  }) / T(n);
  const T squares = sum_terms<T>(n, [=](int64_t i, auto zero) KDCMAE_LAMBDA {
    const auto centred = load<decltype(zero)>(x + i) - mean;
    return centred * centred;
  });
  const T rstd = T(1) / std::sqrt(squares / T(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
  *mean_out = mean;
  *rstd_out = rstd;
}

// `onto` is added to dx; null: nothing is.
template <class T>
KDCMAE_INLINE void gradient(const T* grad, const T* x, const T* onto, const T* weight, T mean,
                            T rstd, int64_t n, T* dx, T* dweight, T* dbias) {
  const T along = sum_terms<T>(n, [=](int64_t i, auto zero) KDCMAE_LAMBDA {
    using V = decltype(zero);
    const V dy = load<V>(grad + i), normed = (load<V>(x + i) - mean) * rstd;
    const V into_weight = dy * normed;
    store(dweight + i, load<V>(dweight + i) + into_weight);
    store(dbias + i, load<V>(dbias + i) + dy);
    return into_weight * load<V>(weight + i);
  }) / T(n);
  const T mean_grad = sum_terms<T>(n, [=](int64_t i, auto zero) KDCMAE_LAMBDA {
    using V = decltype(zero);
    return load<V>(grad + i) * load<V>(weight + i);
  }) / T(n);
  for (int64_t i = 0; i < n; ++i) {
    dx[i] = (grad[i] * weight[i] - mean_grad - (x[i] - mean) * rstd * along) * rstd;
  }
  if (onto != nullptr) add(onto, dx, n, dx);
}

// Clones cannot be templates.
KDCMAE_CLONES void add_row(const float* x, const float* y, int64_t n, float* out) {
  add(x, y, n, out);
}
KDCMAE_CLONES void add_row(const double* x, const double* y, int64_t n, double* out) {
  add(x, y, n, out);
}
KDCMAE_CLONES void normalize_row(const float* x, const float* weight, const float* bias, int64_t n,
                                 float eps, float* out, float* mean, float* rstd) {
  normalize(x, weight, bias, n, eps, out, mean, rstd);
}
KDCMAE_CLONES void normalize_row(const double* x, const double* weight, const double* bias,
                                 int64_t n, double eps, double* out, double* mean, double* rstd) {
  normalize(x, weight, bias, n, eps, out, mean, rstd);
}
KDCMAE_CLONES void gradient_row(const float* grad, const float* x, const float* onto,
                                const float* weight, float mean, float rstd, int64_t n, float* dx,
                                float* dweight, float* dbias) {
  gradient(grad, x, onto, weight, mean, rstd, n, dx, dweight, dbias);
}
KDCMAE_CLONES void gradient_row(const double* grad, const double* x, const double* onto,
                                const double* weight, double mean, double rstd, int64_t n,
                                double* dx, double* dweight, double* dbias) {
  gradient(grad, x, onto, weight, mean, rstd, n, dx, dweight, dbias);
}

// Consecutive rows under one norm.
struct Chunk {
  int64_t norm, begin, end;
};

constexpr int64_t kMinRows = 32, kMaxChunks = 128;

// The runs cut into chunks, none of which crosses from one run into the next.
std::vector<Chunk> chunks_of(at::IntArrayRef norms, at::IntArrayRef rows, int64_t num_rows,
                             int64_t num_norms) {
  TORCH_CHECK_VALUE(norms.size() == rows.size(), "norms and rows differ in length");
  const int64_t size = std::max(kMinRows, (num_rows + kMaxChunks - 1) / kMaxChunks);
  std::vector<Chunk> chunks;
  int64_t begin = 0;
  for (size_t run = 0; run < rows.size(); ++run) {
    TORCH_CHECK_VALUE(norms[run] >= 0 && norms[run] < num_norms && rows[run] >= 0,
                      "no such run: ", rows[run], " rows of norm ", norms[run]);
    const int64_t end = begin + rows[run];
    for (; begin < end; begin = chunks.back().end) {
      chunks.push_back({norms[run], begin, std::min(begin + size, end)});
    }
  }
  TORCH_CHECK_VALUE(begin == num_rows, "the runs cover ", begin, " of ", num_rows, " rows");
  return chunks;
}

// x with its last axis contiguous; it must be (R, D), of the shape of `like` where given.
at::Tensor rowwise(const at::Tensor& x, const at::Tensor* like = nullptr) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) > 0 && (!like || x.sizes() == like->sizes()),
                    "expected (R, D) with D > 0, got ", x.sizes());
  return x.stride(1) == 1 ? x : x.contiguous();
}

at::Tensor parameter(const at::Tensor& weight, const at::Tensor& x) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == x.size(1), "weight and bias must be ",
                    "(S, D), got ", weight.sizes());
  const bool wide = x.scalar_type() == at::kDouble;
  return weight.to(wide ? at::kDouble : at::kFloat).contiguous();
}

struct Normed {
  at::Tensor normed, mean, rstd;
};

// normed, and the statistics, of x + residual, which `summed` receives; of x without a residual.
template <class T>
void forward_chunk(const Chunk& chunk, const Rows& x, const Rows* residual, const Rows* summed,
                   const T* weight, const T* bias, T eps, const Rows& normed, T* mean, T* rstd) {
  const int64_t n = x.width;
  std::vector<T> scratch(3 * n);
  T *first = scratch.data(), *second = first + n, *third = second + n;
  weight += chunk.norm * n;
  bias += chunk.norm * n;
  for (int64_t row = chunk.begin; row < chunk.end; ++row) {
    const T* own = x.read(row, first);
    if (residual != nullptr) {
      T* sum = summed->target(row, third);
      add_row(own, residual->read(row, second), n, sum);
      summed->wrote(row, sum);
      own = summed->read(row, first);  // as rounded
    }
    T* out = normed.target(row, third);
    normalize_row(own, weight, bias, n, eps, out, mean + row, rstd + row);
    normed.wrote(row, out);
  }
}

Normed forward(const at::Tensor& x, const at::Tensor* residual, const at::Tensor* summed,
               const at::Tensor& weight, const at::Tensor& bias, at::IntArrayRef norms,
               at::IntArrayRef rows, double eps, at::ScalarType out_dtype) {
  const at::Tensor& sum = summed ? *summed : x;
  const at::Tensor w = parameter(weight, sum), b = parameter(bias, sum);
  TORCH_CHECK_VALUE(w.sizes() == b.sizes(), "weight and bias differ in shape");
  const auto chunks = chunks_of(norms, rows, x.size(0), w.size(0));
  Normed out{at::empty(x.sizes(), x.options().dtype(out_dtype)),
             at::empty({x.size(0)}, w.options()), at::empty({x.size(0)}, w.options())};
  const Rows from(x), to(out.normed);
  const std::optional<Rows> onto = residual ? std::optional<Rows>(*residual) : std::nullopt;
  const std::optional<Rows> into = summed ? std::optional<Rows>(*summed) : std::nullopt;
  AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "add_layer_norm", [&] {
    const scalar_t *weights = w.const_data_ptr<scalar_t>(), *biases = b.const_data_ptr<scalar_t>();
    scalar_t* mean = out.mean.mutable_data_ptr<scalar_t>();
    scalar_t* rstd = out.rstd.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        forward_chunk(chunks[i], from, onto ? &*onto : nullptr, into ? &*into : nullptr, weights,
                      biases, scalar_t(eps), to, mean, rstd);
      }
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_layer_norm(
    const at::Tensor& x_in, const at::Tensor& residual_in, const at::Tensor& weight,
    const at::Tensor& bias, at::IntArrayRef norms, at::IntArrayRef rows, double eps,
    at::ScalarType out_dtype) {
  const at::Tensor x = rowwise(x_in), residual = rowwise(residual_in, &x);
  const auto type = at::promote_types(x.scalar_type(), residual.scalar_type());
  const at::Tensor summed = at::empty(x.sizes(), x.options().dtype(type));
  auto out = forward(x, &residual, &summed, weight, bias, norms, rows, eps, out_dtype);
  return {out.normed, summed, out.mean, out.rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::IntArrayRef norms,
    at::IntArrayRef rows, double eps, at::ScalarType out_dtype) {
  auto out = forward(rowwise(x), nullptr, nullptr, weight, bias, norms, rows, eps, out_dtype);
  return {out.normed, out.mean, out.rstd};
}

// What the backward pass reads and writes, row by row.
template <class T>
struct Backward {
  Rows grad, summed, dsummed;
  std::optional<Rows> grad_summed, dbranch;
  const T *weight, *mean, *rstd;
};

// partial: (2, D) sums of this chunk, into the weight and into the bias, 0 at first.
template <class T>
void backward_chunk(const Backward<T>& task, const Chunk& chunk, T* partial) {
  const int64_t n = task.grad.width;
  std::vector<T> scratch(4 * n);
  T *first = scratch.data(), *second = first + n, *third = second + n, *fourth = third + n;
  const T* weight = task.weight + chunk.norm * n;
  for (int64_t row = chunk.begin; row < chunk.end; ++row) {
    const T* onto = task.grad_summed ? task.grad_summed->read(row, third) : nullptr;
    T* dx = task.dsummed.target(row, fourth);
    gradient_row(task.grad.read(row, first), task.summed.read(row, second), onto, weight,
                 task.mean[row], task.rstd[row], n, dx, partial, partial + n);
    task.dsummed.wrote(row, dx);
    if (task.dbranch) task.dbranch->wrote(row, dx);
  }
}

// Sums of the chunks' partials, (S, D) each, by norm and in order.
template <class T>
void reduce(const std::vector<Chunk>& chunks, const T* partials, int64_t n, T* dweight, T* dbias) {
  for (size_t i = 0; i < chunks.size(); ++i) {
    const T* partial = partials + int64_t(i) * 2 * n;
    T *into_weight = dweight + chunks[i].norm * n, *into_bias = dbias + chunks[i].norm * n;
    add_row(into_weight, partial, n, into_weight);
    add_row(into_bias, partial + n, n, into_bias);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_in, const std::optional<at::Tensor>& grad_summed_in,
    const at::Tensor& summed_in, const at::Tensor& mean, const at::Tensor& rstd,
    const at::Tensor& weight, at::IntArrayRef norms, at::IntArrayRef rows,
    const at::Tensor* dbranch) {
  const at::Tensor summed = rowwise(summed_in), grad = rowwise(grad_in, &summed);
  at::Tensor grad_summed;
  if (grad_summed_in) grad_summed = rowwise(*grad_summed_in, &summed);
  const at::Tensor w = parameter(weight, summed);
  const auto chunks = chunks_of(norms, rows, summed.size(0), w.size(0));
  const at::Tensor means = mean.contiguous(), rstds = rstd.contiguous();
  TORCH_CHECK_VALUE(means.numel() == summed.size(0) && rstds.numel() == summed.size(0) &&
                        means.scalar_type() == w.scalar_type() &&
                        rstds.scalar_type() == w.scalar_type(),
                    "mean and rstd must be (R,) and ", w.scalar_type());
  const at::Tensor dsummed = at::empty(summed.sizes(), summed.options());
  at::Tensor dweight = at::zeros_like(w), dbias = at::zeros_like(w);
  const int64_t n = summed.size(1);
  const at::Tensor partials = at::zeros({int64_t(chunks.size()), 2, n}, w.options());
  AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "layer_norm_backward", [&] {
    Backward<scalar_t> task{Rows(grad), Rows(summed), Rows(dsummed), {}, {},
                            w.const_data_ptr<scalar_t>(), means.const_data_ptr<scalar_t>(),
                            rstds.const_data_ptr<scalar_t>()};
    if (grad_summed.defined()) task.grad_summed.emplace(grad_summed);
    if (dbranch) task.dbranch.emplace(*dbranch);
    scalar_t* partial = partials.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) backward_chunk(task, chunks[i], partial + i * 2 * n);
    });
    reduce(chunks, partial, n, dweight.mutable_data_ptr<scalar_t>(),
           dbias.mutable_data_ptr<scalar_t>());
  });
  return {dsummed, dweight, dbias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_backward(
    const at::Tensor& grad, const std::optional<at::Tensor>& grad_summed, const at::Tensor& summed,
    const at::Tensor& mean, const at::Tensor& rstd, const at::Tensor& weight,
    at::IntArrayRef norms, at::IntArrayRef rows) {
  return backward(grad, grad_summed, summed, mean, rstd, weight, norms, rows, nullptr);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> layer_norm_backward_cast(
    const at::Tensor& grad, const std::optional<at::Tensor>& grad_summed, const at::Tensor& summed,
    const at::Tensor& mean, const at::Tensor& rstd, const at::Tensor& weight,
    at::IntArrayRef norms, at::IntArrayRef rows, at::ScalarType dtype) {
  const at::Tensor dbranch = at::empty(summed.sizes(), summed.options().dtype(dtype));
  const auto [dsummed, dweight, dbias] =
      backward(grad, grad_summed, summed, mean, rstd, weight, norms, rows, &dbranch);
  return {dsummed, dbranch, dweight, dbias};
}

}  // namespace

// The schemas are defined in kernels/normalization/fused.py, beside the other implementations.
TORCH_LIBRARY_IMPL(kdcmae_fast, CPU, m) {
  m.impl("add_layer_norm_cpp", add_layer_norm);
  m.impl("layer_norm_cpp", layer_norm);
  m.impl("layer_norm_backward_cpp", layer_norm_backward);
  m.impl("layer_norm_backward_cast_cpp", layer_norm_backward_cast);
}

}  // namespace kdcmae_fast

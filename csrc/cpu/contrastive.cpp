// InfoNCE on the CPU; kernels/contrastive/README.md has the maths, reference.py the same in Python.
//
// Logits are z_ji = scale * b_inverse_j * a_inverse_i * <b_j, a_i>: the rows come as they are and
// their norms are applied to the products, so no normalised copy exists. A task is a tile of
// logits: at::mm on one thread, then the passes below while the tile is in the cache. The tiling
// depends on the shape alone, so results do not depend on the number of threads; and threads wait
// for each other once per call (forward) or twice per kGradRows rows (backward), not in every
// product, which matters on a machine that has other work.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "vector_math.h"

namespace kdcmae_fast {
namespace {

constexpr int64_t kColumnBlock = 512;       // of a tile
constexpr int64_t kTileRows = 512;          // forward
constexpr int64_t kGradRows = 128;          // backward: rows of logits that exist at once
constexpr int64_t kWidthBlock = 128;        // of the product with a
constexpr int64_t kKeptElements = 1 << 20;  // that many logits are kept for the gradient

template <class T>
constexpr T kNone = -std::numeric_limits<T>::infinity();

template <class T>
struct Tile {
  T* logits;  // (rows, n) at this stride
  int64_t rows, n, stride;
  int64_t own;  // column of row 0's pair, counted from the tile's first column
  const T *row_scale, *column_scale;
  T scale;
};

// Products to logits, and each row's maximum and sum of exponentials over the tile's columns, the
// pair's own logit left out of both. top and sum are (rows, blocks), written at their stride.
template <class T>
KDCMAE_INLINE void row_pass(const Tile<T>& tile, T* positive, T* top, T* sum, int64_t blocks) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* x = tile.logits + r * tile.stride;
    const T row_scale = tile.scale * tile.row_scale[r];
    const T* column_scale = tile.column_scale;
    for (int64_t i = 0; i < tile.n; ++i) x[i] = x[i] * row_scale * column_scale[i];
    const int64_t own = tile.own + r;
    if (own >= 0 && own < tile.n) {
      positive[r] = x[own];
      x[own] = kNone<T>;
    }
    const T high = max_over(tile.n, kNone<T>, [=](int64_t i) KDCMAE_LAMBDA { return x[i]; });
    const T shift = std::max(high, std::numeric_limits<T>::lowest());
    top[r * blocks] = high;
    sum[r * blocks] = sum_over<T>(tile.n, [=](int64_t i) KDCMAE_LAMBDA {
      return vexp(x[i] - shift);
    });
  }
}

// Takes a tile of logits into the running maximum and sum of each of its columns.
template <class T>
KDCMAE_INLINE void column_pass(const Tile<T>& tile, T* top, T* sum) {
  T shift[kColumnBlock];
  const int64_t n = tile.n;
  for (int64_t i = 0; i < n; ++i) shift[i] = top[i];
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* row = tile.logits + r * tile.stride;
    for (int64_t i = 0; i < n; ++i) shift[i] = row[i] > shift[i] ? row[i] : shift[i];
  }
  for (int64_t i = 0; i < n; ++i) {
    const T before = top[i];
    top[i] = shift[i];
    shift[i] = std::max(shift[i], std::numeric_limits<T>::lowest());
    sum[i] *= vexp(before - shift[i]);
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* row = tile.logits + r * tile.stride;
    for (int64_t i = 0; i < n; ++i) sum[i] += vexp(row[i] - shift[i]);
  }
}

// The targets at a tile's first row and column; the column ones are null if one-sided.
template <class T>
struct TileTargets {
  const T *row_lse, *row_weight, *positive_grad, *column_lse, *column_weight;
};

// From a tile of products (or logits) to the gradient by the products, into `out` at out_stride.
// dots (rows, blocks): sum of gradient * logit.
template <class T>
KDCMAE_INLINE void grad_pass(const Tile<T>& tile, bool are_logits, const TileTargets<T>& targets,
                             T* out, int64_t out_stride, T* dots, int64_t blocks) {
  const int64_t n = tile.n;
  T logit[kColumnBlock], grad[kColumnBlock];
  const T* column_scale = tile.column_scale;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* x = tile.logits + r * tile.stride;
    const T row_scale = tile.scale * tile.row_scale[r];
    if (are_logits) {
      for (int64_t i = 0; i < n; ++i) logit[i] = x[i];
    } else {
      for (int64_t i = 0; i < n; ++i) logit[i] = x[i] * row_scale * column_scale[i];
    }
    const T weight = targets.row_weight[r], lse = targets.row_lse[r];
    for (int64_t i = 0; i < n; ++i) grad[i] = weight * vexp(logit[i] - lse);
    if (targets.column_lse != nullptr) {
      const T *lses = targets.column_lse, *weights = targets.column_weight;
      for (int64_t i = 0; i < n; ++i) grad[i] += weights[i] * vexp(logit[i] - lses[i]);
    }
    const int64_t own = tile.own + r;
    if (own >= 0 && own < n) grad[own] = targets.positive_grad[r];
    const T *g = grad, *z = logit;
    dots[r * blocks] = sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA { return g[i] * z[i]; });
    T* to = out + r * out_stride;
    for (int64_t i = 0; i < n; ++i) to[i] = grad[i] * row_scale * column_scale[i];
  }
}

// Clones cannot be templates.
#define KDCMAE_PASSES(T)                                                                        \
  KDCMAE_CLONES void row_clone(const Tile<T>& tile, T* positive, T* top, T* sum, int64_t b) {   \
    row_pass(tile, positive, top, sum, b);                                                      \
  }                                                                                             \
  KDCMAE_CLONES void column_clone(const Tile<T>& tile, T* top, T* sum) {                        \
    column_pass(tile, top, sum);                                                                \
  }                                                                                             \
  KDCMAE_CLONES void grad_clone(const Tile<T>& tile, bool are_logits, const TileTargets<T>& to, \
                                T* out, int64_t stride, T* dots, int64_t b) {                   \
    grad_pass(tile, are_logits, to, out, stride, dots, b);                                      \
  }
KDCMAE_PASSES(float)
KDCMAE_PASSES(double)
#undef KDCMAE_PASSES

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// The operands of one call in the type of the computation.
struct Problem {
  at::Tensor b, a, b_inverse, a_inverse;
  int64_t rows, columns;

  Problem(const at::Tensor& b_, const at::Tensor& a_, const at::Tensor& b_inverse_,
          const at::Tensor& a_inverse_, const at::Tensor& scale, int64_t offset)
      : rows(b_.size(0)), columns(a_.size(0)) {
    TORCH_CHECK_VALUE(b_.dim() == 2 && a_.dim() == 2 && b_.size(1) == a_.size(1),
                      "b and a must be (N, D) and (M, D), got ", b_.sizes(), " and ", a_.sizes());
    TORCH_CHECK_VALUE(b_inverse_.numel() == rows && a_inverse_.numel() == columns,
                      "inverse norms must be one per row");
    TORCH_CHECK_VALUE(offset >= 0 && offset + rows <= columns, "offset=", offset, " is not valid");
    const auto type = scale.scalar_type();
    b = b_.to(type).contiguous();
    a = a_.to(type).contiguous();
    b_inverse = b_inverse_.to(type).contiguous();
    a_inverse = a_inverse_.to(type).contiguous();
  }
};

struct Sums {
  at::Tensor positive, row_lse, row_max, column_lse, column_max, kept;
};

// Block maxima and sums (n, blocks), merged block by block.
template <class T>
void merge_rows(const at::Tensor& tops, const at::Tensor& sums, Sums& out) {
  out.row_max.copy_(tops.amax(1));
  const at::Tensor shift = out.row_max.clamp_min(std::numeric_limits<T>::lowest());
  out.row_lse.copy_(shift + (sums * (tops - shift.unsqueeze(1)).exp()).sum(1).log());
}

template <class T>
void statistics_in(const Problem& problem, T scale, int64_t offset, bool with_columns, Sums& out) {
  const int64_t rows = problem.rows, columns = problem.columns;
  const int64_t blocks = ceil_div(columns, kColumnBlock);
  const T* a_inverse = problem.a_inverse.template const_data_ptr<T>();
  const T* b_inverse = problem.b_inverse.template const_data_ptr<T>();
  const bool keep = out.kept.numel() > 0;
  const auto options = problem.b.options();
  at::Tensor tops = at::empty({rows, blocks}, options), sums = at::empty({rows, blocks}, options);
  T *top = tops.mutable_data_ptr<T>(), *sum = sums.mutable_data_ptr<T>();
  T* positive = out.positive.mutable_data_ptr<T>();
  T* column_max = out.column_max.mutable_data_ptr<T>();
  T* column_sum = out.column_lse.mutable_data_ptr<T>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    at::Tensor buffer =
        keep ? at::Tensor() : at::empty({std::min(rows, kTileRows), kColumnBlock}, options);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k * kColumnBlock, n = std::min(kColumnBlock, columns - first);
      const at::Tensor own_a = problem.a.narrow(0, first, n).t();
      for (int64_t start = 0; start < rows; start += kTileRows) {
        const int64_t count = std::min(kTileRows, rows - start);
        at::Tensor products = keep ? out.kept.narrow(0, start, count).narrow(1, first, n)
                                   : buffer.narrow(0, 0, count).narrow(1, 0, n);
        at::mm_out(products, problem.b.narrow(0, start, count), own_a);
        const Tile<T> tile{products.mutable_data_ptr<T>(), count, n, products.stride(0),
                           offset + start - first, b_inverse + start, a_inverse + first, scale};
        row_clone(tile, positive + start, top + start * blocks + k, sum + start * blocks + k,
                  blocks);
        if (with_columns) column_clone(tile, column_max + first, column_sum + first);
      }
    }
  });
  merge_rows<T>(tops, sums, out);
  if (with_columns) {
    out.column_lse.log_().add_(out.column_max.clamp_min(std::numeric_limits<T>::lowest()));
  }
  if (keep) out.kept.diagonal(offset).copy_(out.positive);
}

// positive, row_lse, row_max (N,); column_lse, column_max (M,), or (0,) unless `with_columns`; the
// logits (N, M) if they are kKeptElements at most,
// else (0, 0).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> statistics(
    const at::Tensor& b, const at::Tensor& a, const at::Tensor& b_inverse,
    const at::Tensor& a_inverse, const at::Tensor& scale, int64_t offset, bool with_columns) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Problem problem(b, a, b_inverse, a_inverse, scale, offset);
  const auto options = scale.options();
  const int64_t rows = problem.rows, columns = problem.columns;
  const bool keep = rows * columns <= kKeptElements;
  Sums out{at::empty({rows}, options), at::empty({rows}, options), at::empty({rows}, options),
           at::zeros({with_columns ? columns : 0}, options),
           at::full({with_columns ? columns : 0}, -std::numeric_limits<double>::infinity(), options),
           at::empty({keep ? rows : 0, keep ? columns : 0}, options)};
  AT_DISPATCH_FLOATING_TYPES(scale.scalar_type(), "info_nce_statistics", [&] {
    statistics_in<scalar_t>(problem, scale.item<scalar_t>(), offset, with_columns, out);
  });
  return {out.positive, out.row_lse, out.row_max, out.column_lse, out.column_max, out.kept};
}

struct Targets {
  at::Tensor row_lse, row_weight, positive_grad, column_lse, column_weight, logits;
};

template <class T>
void gradients_in(const Problem& problem, T scale, int64_t offset, const Targets& targets,
                  at::Tensor& by_b, at::Tensor& by_a, at::Tensor& dots) {
  const int64_t rows = problem.rows, columns = problem.columns, width = problem.a.size(1);
  const int64_t blocks = dots.size(1);
  const bool symmetric = targets.column_lse.numel() > 0, kept = targets.logits.numel() > 0;
  const T* a_inverse = problem.a_inverse.template const_data_ptr<T>();
  const T* b_inverse = problem.b_inverse.template const_data_ptr<T>();
  const T* row_lse = targets.row_lse.template const_data_ptr<T>();
  const T* row_weight = targets.row_weight.template const_data_ptr<T>();
  const T* positive_grad = targets.positive_grad.template const_data_ptr<T>();
  const T* column_lse = symmetric ? targets.column_lse.template const_data_ptr<T>() : nullptr;
  const T* column_weight = symmetric ? targets.column_weight.template const_data_ptr<T>() : nullptr;
  T* dot = dots.mutable_data_ptr<T>();
  at::Tensor buffer = at::empty({std::min(rows, kGradRows), columns}, problem.b.options());
  for (int64_t start = 0; start < rows; start += kGradRows) {
    const int64_t count = std::min(kGradRows, rows - start);
    const at::Tensor grads = buffer.narrow(0, 0, count), own_b = problem.b.narrow(0, start, count);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t first = k * kColumnBlock, n = std::min(kColumnBlock, columns - first);
        at::Tensor out = grads.narrow(1, first, n);
        const at::Tensor from =
            kept ? targets.logits.narrow(0, start, count).narrow(1, first, n) : out;
        if (!kept) at::mm_out(out, own_b, problem.a.narrow(0, first, n).t());
        const Tile<T> tile{static_cast<T*>(from.data_ptr()), count, n, from.stride(0),
                           offset + start - first, b_inverse + start, a_inverse + first, scale};
        const TileTargets<T> to{row_lse + start, row_weight + start, positive_grad + start,
                                symmetric ? column_lse + first : nullptr,
                                symmetric ? column_weight + first : nullptr};
        grad_clone(tile, kept, to, out.mutable_data_ptr<T>(), out.stride(0),
                   dot + start * blocks + k, blocks);
        by_a.narrow(0, first, n).addmm_(out.t(), own_b);
      }
    });
    at::parallel_for(0, ceil_div(width, kWidthBlock), 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t first = k * kWidthBlock, n = std::min(kWidthBlock, width - first);
        at::Tensor out = by_b.narrow(0, start, count).narrow(1, first, n);
        at::mm_out(out, grads, problem.a.narrow(1, first, n));
      }
    });
  }
}

// Gradients by b (N, D) and a (M, D) with the inverse norms held fixed, and by scale.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients(
    const at::Tensor& b, const at::Tensor& a, const at::Tensor& b_inverse,
    const at::Tensor& a_inverse, const at::Tensor& scale, int64_t offset, const at::Tensor& row_lse,
    const at::Tensor& row_weight, const at::Tensor& positive_grad, const at::Tensor& column_lse,
    const at::Tensor& column_weight, const at::Tensor& logits) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Problem problem(b, a, b_inverse, a_inverse, scale, offset);
  const Targets targets{row_lse.contiguous(),    row_weight.contiguous(),
                        positive_grad.contiguous(), column_lse.contiguous(),
                        column_weight.contiguous(), logits.contiguous()};
  at::Tensor by_b = at::empty_like(problem.b, at::MemoryFormat::Contiguous);
  at::Tensor by_a = at::zeros_like(problem.a, at::MemoryFormat::Contiguous);
  at::Tensor dots =
      at::empty({problem.rows, ceil_div(problem.columns, kColumnBlock)}, scale.options());
  AT_DISPATCH_FLOATING_TYPES(scale.scalar_type(), "info_nce_gradients", [&] {
    gradients_in<scalar_t>(problem, scale.item<scalar_t>(), offset, targets, by_b, by_a, dots);
  });
  return {by_b, by_a, dots.sum() / scale};
}

}  // namespace

// The schemas are defined in kernels/contrastive/fused.py.
TORCH_LIBRARY_IMPL(kdcmae_fast, CPU, m) {
  m.impl("info_nce_statistics_cpp", statistics);
  m.impl("info_nce_gradients_cpp", gradients);
}

}  // namespace kdcmae_fast

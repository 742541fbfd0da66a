// Frame similarities and retrieval ranks on the CPU; kernels/similarity/README.md has the maths,
// reference.py the same in Python, similarity.h the tiles.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <tuple>

#include "similarity.h"

namespace kdcmae_fast {
namespace {

constexpr int64_t kGradClips = 8;    // clips whose gradient is summed up by one task
constexpr double kTinyNorm = 1e-12;  // smallest norm a frame is divided by

template <class T>
KDCMAE_INLINE void add_scaled(int64_t n, T weight, const T* x, T* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += weight * x[i];
}

#define KDCMAE_ADD(T)                                                     \
  KDCMAE_CLONES void add_clone(int64_t n, T weight, const T* x, T* sum) { \
    add_scaled(n, weight, x, sum);                                        \
  }
KDCMAE_ADD(float)
KDCMAE_ADD(double)
#undef KDCMAE_ADD

// Scores (N, M), and for the maxima where they are: k T + l (diagonal: k), else (0, 0).
std::tuple<at::Tensor, at::Tensor> similarity(const at::Tensor& a, const at::Tensor& b,
                                              const at::Tensor& a_inverse,
                                              const at::Tensor& b_inverse,
                                              c10::string_view strategy) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Problem problem(a, b, a_inverse, b_inverse, strategy);
  const int64_t n = a.size(0), m = b.size(0);
  const bool with_index = problem.strategy != Strategy::kDiagonalMean;
  at::Tensor scores = at::empty({n, m}, a_inverse.options());
  at::Tensor index =
      at::empty({with_index ? n : 0, with_index ? m : 0}, scores.options().dtype(at::kInt));
  const Blocks rows(n, problem.block(n)), columns(m, problem.block(m));
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "frame_similarity", [&] {
    at::parallel_for(0, rows.count * columns.count, 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      Tile<scalar_t> tile(problem, rows.size, columns.size, with_index);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t i = t / columns.count, j = t % columns.count;
        const int64_t top = rows.first(i), height = rows.length(i);
        const int64_t left = columns.first(j), length = columns.length(j);
        tile.compute(top, height, left, length);
        scores.narrow(0, top, height).narrow(1, left, length).copy_(tile.scores);
        if (with_index) index.narrow(0, top, height).narrow(1, left, length).copy_(tile.index);
      }
    });
  });
  return {scores, index};
}

// Gradient by the unit frames of some clips of one side, times their inverse norms and less what
// the norms take back; d (count, D) is by the scaled frames `k`.
void finish_grad(const at::Tensor& d, const Side& side, const at::Tensor& buffer, int64_t first,
                 int64_t count, int64_t k, bool normalize, const at::Tensor& out) {
  if (normalize) {
    const at::Tensor unit = side.pack(buffer, first, count, k);
    const at::Tensor inverse = side.inverse.narrow(0, first, count).select(1, k).unsqueeze(1);
    at::Tensor along = at::bmm(d.unsqueeze(1), unit.unsqueeze(2)).squeeze(2);
    along.masked_fill_(inverse >= 0.999 / kTinyNorm, 0);  // there the norm is a constant
    d.addcmul_(unit, along, -1).mul_(inverse);
  }
  out.narrow(0, first, count).select(1, k).copy_(d);
}

// One-hot gradients: every score's goes to the two frames that it is the product of.
template <class T>
void scatter_grad(const at::Tensor& weights, const at::Tensor& index, const Side& x, const Side& y,
                  Strategy strategy, bool of_b, bool normalize, at::Tensor& out) {
  const int64_t n = x.clips(), m = y.clips(), frames = x.x.size(1), width = x.x.size(2);
  const at::Tensor others = y.x.to(weights.scalar_type()).contiguous();
  const T* other = others.const_data_ptr<T>();
  const T* other_inverse = y.inverse.const_data_ptr<T>();
  const T* weight = weights.const_data_ptr<T>();
  const int32_t* at = index.const_data_ptr<int32_t>();
  at::parallel_for(0, ceil_div(n, kGradClips), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const at::Tensor sums = at::empty({frames, kGradClips, width}, weights.options());
    const at::Tensor buffer = at::empty({kGradClips, width}, weights.options());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kGradClips, count = std::min(kGradClips, n - first);
      sums.zero_();
      for (int64_t i = first; i < first + count; ++i) {
        T* sum = sums.mutable_data_ptr<T>() + (i - first) * width;
        for (int64_t j = 0; j < m; ++j) {
          const int32_t where = at[i * m + j];
          int64_t k = where, l = where;
          if (strategy == Strategy::kMax) k = where / frames, l = where % frames;
          if (of_b) std::swap(k, l);
          const int64_t frame = j * frames + l;
          add_clone(width, weight[i * m + j] * other_inverse[frame], other + frame * width,
                    sum + k * kGradClips * width);
        }
      }
      for (int64_t k = 0; k < frames; ++k) {
        finish_grad(sums.select(0, k).narrow(0, 0, count), x, buffer, first, count, k, normalize,
                    out);
      }
    }
  });
}

// weights (n, m) / T times the frames of y, or their mean.
void product_grad(const at::Tensor& weights, const Side& x, const Side& y, Strategy strategy,
                  bool normalize, at::Tensor& out) {
  const int64_t frames = x.x.size(1), width = x.x.size(2);
  const bool pooled = strategy == Strategy::kMean;
  const at::Tensor common =
      pooled ? at::mm(weights, y.pooled().x.select(1, 0)).div_(frames) : at::Tensor();
  const Blocks rows(x.clips(), kClips), columns(y.clips(), kClips);
  at::parallel_for(0, rows.count * frames, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const at::Tensor sums = at::empty({rows.size, width}, weights.options());
    const at::Tensor buffer =
        at::empty({std::max(rows.size, columns.size), width}, weights.options());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / frames, k = task % frames;
      const int64_t first = rows.first(i), count = rows.length(i);
      at::Tensor sum = sums.narrow(0, 0, count);
      if (pooled) {
        sum.copy_(common.narrow(0, first, count));
      } else {
        sum.zero_();
        for (int64_t j = 0; j < columns.count; ++j) {
          const int64_t left = columns.first(j), length = columns.length(j);
          sum.addmm_(weights.narrow(0, first, count).narrow(1, left, length),
                     y.pack(buffer, left, length, k));
        }
        sum.div_(frames);
      }
      finish_grad(sum, x, buffer, first, count, k, normalize, out);
    }
  });
}

// Gradient by a (of_b: by b), in its dtype, from the one by the scores (N, M).
at::Tensor similarity_grad(const at::Tensor& grad, const at::Tensor& index, const at::Tensor& a,
                           const at::Tensor& b, const at::Tensor& a_inverse,
                           const at::Tensor& b_inverse, c10::string_view name, bool normalize,
                           bool of_b) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Strategy strategy = strategy_named(name);
  Side x{a, a_inverse.contiguous()}, y{b, b_inverse.contiguous()};
  if (of_b) std::swap(x, y);
  const auto type = a_inverse.scalar_type();
  const at::Tensor weights = (of_b ? grad.t() : grad).to(type).contiguous();
  at::Tensor out = at::empty(x.x.sizes(), x.x.options());
  if (strategy == Strategy::kDiagonalMean || strategy == Strategy::kMean) {
    product_grad(weights, x, y, strategy, normalize, out);
    return out;
  }
  const at::Tensor where = (of_b ? index.t() : index).contiguous();
  AT_DISPATCH_FLOATING_TYPES(type, "frame_similarity_grad", [&] {
    scatter_grad<scalar_t>(weights, where, x, y, strategy, of_b, normalize, out);
  });
  return out;
}

// Compares a row of scores with its own pair's and with those of its columns. `more` and `least`:
// above the first is more similar than the pair, from the second on as similar or more.
KDCMAE_INLINE void count_row(int64_t n, const double* x, double more, double least,
                             const double* column_more, const double* column_least,
                             int64_t* row_above, int64_t* row_from, int64_t* column_above,
                             int64_t* column_from) {
  int64_t above = 0, from = 0;
  for (int64_t j = 0; j < n; ++j) {
    above += x[j] > more;
    from += x[j] >= least;
    column_above[j] += x[j] > column_more[j];
    column_from[j] += x[j] >= column_least[j];
  }
  *row_above += above;
  *row_from += from;
}

KDCMAE_CLONES void count_clone(int64_t n, const double* x, double more, double least,
                               const double* column_more, const double* column_least,
                               int64_t* row_above, int64_t* row_from, int64_t* column_above,
                               int64_t* column_from) {
  count_row(n, x, more, least, column_more, column_least, row_above, row_from, column_above,
            column_from);
}

// Scores of the true pairs, and from where on another is more similar, or as similar.
struct Thresholds {
  at::Tensor more, least;

  explicit Thresholds(int64_t n)
      : more(at::empty({n}, at::kDouble)), least(at::empty({n}, at::kDouble)) {}

  void set(int64_t i, double own, double tolerance, bool relative) {
    const double slack = !relative ? tolerance : std::isfinite(own) ? tolerance * std::abs(own) : 0;
    more.mutable_data_ptr<double>()[i] = own + slack;
    least.mutable_data_ptr<double>()[i] = own - slack;
  }
};

void count_tile(const at::Tensor& scores, int64_t top, int64_t left, const Thresholds& own,
                at::Tensor& counts) {
  const int64_t n = counts.size(1);
  const double* more = own.more.const_data_ptr<double>();
  const double* least = own.least.const_data_ptr<double>();
  int64_t* out = counts.mutable_data_ptr<int64_t>();
  for (int64_t r = 0; r < scores.size(0); ++r) {
    const int64_t i = top + r;
    count_clone(scores.size(1), scores.const_data_ptr<double>() + r * scores.size(1), more[i],
                least[i], more + left, least + left, out + i, out + n + i, out + 2 * n + left,
                out + 3 * n + left);
  }
}

// (4, N): per clip of a the clips of b that are more similar than its pair, and those that are as
// similar, the pair included; then the same per clip of b. Two scores are the same if they differ
// by `tolerance` or less, times the pair's own if `relative`.
at::Tensor similarity_counts(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_inverse,
                             const at::Tensor& b_inverse, c10::string_view strategy,
                             double tolerance, bool relative, int64_t tile_size) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t n = a.size(0);
  TORCH_CHECK_VALUE(b.size(0) == n, "a and b must have as many clips, got ", n, " and ", b.size(0));
  TORCH_CHECK_VALUE(a_inverse.scalar_type() == at::kDouble, "ranks are computed in float64");
  const Problem problem(a, b, a_inverse, b_inverse, strategy);
  const int64_t most = problem.block(n);
  const Blocks blocks(n, tile_size > 0 ? std::min(tile_size, most) : most);
  Thresholds own(n);
  at::Tensor counts = at::zeros({4, n}, at::kLong);
  std::mutex merging;
  // Tiles on the diagonal hold the pairs' own scores, which all others are compared with.
  const auto walk = [&](int64_t tiles, bool diagonal) {
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      Tile<double> tile(problem, blocks.size, blocks.size, false);
      at::Tensor partial = at::zeros_like(counts);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t i = t % blocks.count;
        const int64_t j = (i + t / blocks.count + (diagonal ? 0 : 1)) % blocks.count;
        const int64_t top = blocks.first(i), left = blocks.first(j);
        tile.compute(top, blocks.length(i), left, blocks.length(j));
        if (diagonal) {
          const double* scores = tile.scores.template const_data_ptr<double>();
          for (int64_t r = 0; r < blocks.length(i); ++r) {
            own.set(top + r, scores[r * blocks.length(i) + r], tolerance, relative);
          }
        }
        count_tile(tile.scores, top, left, own, partial);
      }
      const std::lock_guard<std::mutex> lock(merging);
      counts.add_(partial);
    });
  };
  walk(blocks.count, true);
  walk(blocks.count * (blocks.count - 1), false);
  counts.select(0, 1).sub_(counts.select(0, 0));
  counts.select(0, 3).sub_(counts.select(0, 2));
  return counts;
}

}  // namespace

// The schemas are defined in kernels/similarity/library.py.
TORCH_LIBRARY_IMPL(kdcmae_fast, CPU, m) {
  m.impl("frame_similarity_cpp", similarity);
  m.impl("frame_similarity_grad_cpp", similarity_grad);
  m.impl("similarity_counts_cpp", similarity_counts);
}

}  // namespace kdcmae_fast

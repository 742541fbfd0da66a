// Tiles of clip similarities, for csrc/cpu/similarity.cpp.
//
// A tile is some clips of a against some of b. Their frames are packed, unit length and in the type
// of the computation, and multiplied by at::mm on one thread; what the strategy makes of the
// products follows while they are in the cache. The tiling depends on the shape alone, so results
// do not depend on the number of threads.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "vector_math.h"

namespace kdcmae_fast {
namespace {

constexpr int64_t kClips = 384;   // a side of a tile at most, where frames meet one by one
constexpr int64_t kFrames = 512;  // the same in frames, where all meet all

enum class Strategy { kDiagonalMean, kDiagonalMax, kMean, kMax };

Strategy strategy_named(c10::string_view name) {
  if (name == "diagonal_mean") return Strategy::kDiagonalMean;
  if (name == "diagonal_max") return Strategy::kDiagonalMax;
  if (name == "mean") return Strategy::kMean;
  TORCH_CHECK_VALUE(name == "max", "unknown strategy ", name);
  return Strategy::kMax;
}

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Takes `n` values into running maxima; `label` goes where the maximum is new. NaN stays.
template <class T>
KDCMAE_INLINE void fold_max(int64_t n, const T* x, int32_t label, T* best, int32_t* index) {
  if (index == nullptr) {
    for (int64_t i = 0; i < n; ++i) best[i] = (x[i] > best[i]) | (x[i] != x[i]) ? x[i] : best[i];
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const bool take = (x[i] > best[i]) | (x[i] != x[i]);
    best[i] = take ? x[i] : best[i];
    index[i] = take ? label : index[i];
  }
}

// Products of one clip's T frames with those of m clips (T, m T) -> their largest, one per clip,
// and where it is: the first in (k, l) order, as k T + l. work and work_index hold m T.
template <class T>
KDCMAE_INLINE void block_max(int64_t m, int64_t frames, const T* x, T* best, int32_t* index,
                             T* work, int32_t* work_index) {
  const int64_t n = m * frames;
  for (int64_t i = 0; i < n; ++i) work[i] = x[i];
  if (index != nullptr) std::fill(work_index, work_index + n, 0);
  int32_t* rows_of = index == nullptr ? nullptr : work_index;
  for (int64_t k = 1; k < frames; ++k) fold_max(n, x + k * n, int32_t(k), work, rows_of);
  for (int64_t j = 0; j < m; ++j) {
    const T* values = work + j * frames;
    T top = values[0];
    if (index == nullptr) {
      for (int64_t l = 1; l < frames; ++l) {
        top = (values[l] > top) | (values[l] != values[l]) ? values[l] : top;
      }
    } else {
      const int32_t* rows = work_index + j * frames;
      int64_t at = rows[0] * frames;
      for (int64_t l = 1; l < frames; ++l) {
        const int64_t here = rows[l] * frames + l;
        const T x = values[l];
        if (x > top || x != x || (x == top && here < at)) top = x, at = here;
      }
      index[j] = int32_t(at);
    }
    best[j] = top;
  }
}

#define KDCMAE_PASSES(T)                                                                      \
  KDCMAE_CLONES void fold_clone(int64_t n, const T* x, int32_t label, T* best, int32_t* at) { \
    fold_max(n, x, label, best, at);                                                          \
  }                                                                                           \
  KDCMAE_CLONES void block_clone(int64_t m, int64_t frames, const T* x, T* best, int32_t* at, \
                                 T* work, int32_t* work_at) {                                 \
    block_max(m, frames, x, best, at, work, work_at);                                         \
  }
KDCMAE_PASSES(float)
KDCMAE_PASSES(double)
#undef KDCMAE_PASSES

// Clips of one side: x (N, T, D) in any dtype and layout, inverse (N, T) what its frames are
// multiplied by, in the type of the computation.
struct Side {
  at::Tensor x, inverse;

  int64_t clips() const { return x.size(0); }

  // Frame k of some clips, scaled, into `out`'s first rows: (count, D).
  at::Tensor pack(const at::Tensor& out, int64_t first, int64_t count, int64_t k) const {
    at::Tensor rows = out.narrow(0, 0, count);
    rows.copy_(x.narrow(0, first, count).select(1, k));
    return rows.mul_(inverse.narrow(0, first, count).select(1, k).unsqueeze(1));
  }

  // All frames of some clips: (count T, D).
  at::Tensor pack(const at::Tensor& out, int64_t first, int64_t count) const {
    at::Tensor rows = out.narrow(0, 0, count * x.size(1)).view({count, x.size(1), x.size(2)});
    rows.copy_(x.narrow(0, first, count));
    rows.mul_(inverse.narrow(0, first, count).unsqueeze(2));
    return rows.view({count * x.size(1), x.size(2)});
  }

  // The mean of each clip's scaled frames, as clips of one frame.
  Side pooled() const {
    const int64_t n = clips(), frames = x.size(1), width = x.size(2);
    const auto options = inverse.options();
    at::Tensor means = at::empty({n, 1, width}, options);
    const int64_t step = std::max<int64_t>(1, kFrames / frames);
    at::parallel_for(0, ceil_div(n, step), 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const at::Tensor buffer = at::empty({step * frames, width}, options);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * step, count = std::min(step, n - first);
        at::Tensor out = means.narrow(0, first, count).select(1, 0);
        at::mean_out(out, pack(buffer, first, count).view({count, frames, width}), {1});
      }
    });
    return {means, at::ones({n, 1}, options)};
  }
};

// Equal blocks of at most `most` clips.
struct Blocks {
  int64_t clips, size, count;

  Blocks(int64_t clips_, int64_t most) : clips(clips_) {
    size = std::max<int64_t>(1, ceil_div(clips, std::max<int64_t>(1, ceil_div(clips, most))));
    count = ceil_div(clips, size);
  }
  int64_t first(int64_t i) const { return i * size; }
  int64_t length(int64_t i) const { return std::min(size, clips - i * size); }
};

struct Problem {
  Side a, b;
  Strategy strategy;
  int64_t frames, width;

  Problem(const at::Tensor& a_, const at::Tensor& b_, const at::Tensor& a_inverse,
          const at::Tensor& b_inverse, c10::string_view strategy_)
      : a{a_, a_inverse}, b{b_, b_inverse}, strategy(strategy_named(strategy_)) {
    TORCH_CHECK_VALUE(a_.dim() == 3 && b_.dim() == 3 && a_.size(1) == b_.size(1) &&
                          a_.size(2) == b_.size(2) && a_.size(1) > 0,
                      "a and b must be (N, T, D) and (M, T, D), got ", a_.sizes(), " and ",
                      b_.sizes());
    TORCH_CHECK_VALUE(a_inverse.sizes() == a_.sizes().slice(0, 2) &&
                          b_inverse.sizes() == b_.sizes().slice(0, 2),
                      "inverse norms must be one per frame");
    if (strategy == Strategy::kMean) {
      a = a.pooled();
      b = b.pooled();
      strategy = Strategy::kDiagonalMean;
    }
    frames = a.x.size(1);
    width = a.x.size(2);
  }

  // Clips on a side of a tile: several tiles even if there are few clips, for the threads.
  int64_t block(int64_t clips) const {
    if (strategy == Strategy::kMax) return std::max<int64_t>(1, kFrames / frames);
    return std::min(kClips, std::max<int64_t>(32, ceil_div(clips, 4)));
  }
};

// Buffers of one thread for tiles of up to n x m clips, and the tile computed last.
template <class T>
class Tile {
 public:
  Tile(const Problem& problem, int64_t n, int64_t m, bool with_index)
      : problem_(problem), all_(problem.strategy == Strategy::kMax), with_index_(with_index) {
    const auto options = problem.a.inverse.options();
    const int64_t group = all_ ? problem.frames : 1;
    a_ = at::empty({n * group, problem.width}, options);
    b_ = at::empty({m * group, problem.width}, options);
    if (problem.strategy != Strategy::kDiagonalMean) {
      products_ = at::empty({n * group * m * group}, options);
    }
    scores_ = at::empty({n * m}, options);
    if (with_index) index_ = at::empty({n * m}, options.dtype(at::kInt));
    if (all_) {
      work_ = at::empty({m * group}, options);
      work_index_ = at::empty({m * group}, options.dtype(at::kInt));
    }
  }

  // Scores of n clips of a from i on with m clips of b from j on.
  void compute(int64_t i, int64_t n, int64_t j, int64_t m) {
    scores = scores_.narrow(0, 0, n * m).view({n, m});
    if (with_index_) index = index_.narrow(0, 0, n * m).view({n, m});
    if (all_) return compute_all(i, n, j, m);
    for (int64_t k = 0; k < problem_.frames; ++k) {
      const at::Tensor x = problem_.a.pack(a_, i, n, k), y = problem_.b.pack(b_, j, m, k).t();
      if (k == 0) {
        at::mm_out(scores, x, y);
        if (with_index_) index.zero_();
      } else if (problem_.strategy == Strategy::kDiagonalMean) {
        scores.addmm_(x, y);
      } else {
        at::Tensor products = products_.narrow(0, 0, n * m).view({n, m});
        at::mm_out(products, x, y);
        fold_clone(n * m, products.const_data_ptr<T>(), int32_t(k), scores.mutable_data_ptr<T>(),
                   with_index_ ? index.mutable_data_ptr<int32_t>() : nullptr);
      }
    }
    if (problem_.strategy == Strategy::kDiagonalMean) scores.div_(problem_.frames);
  }

  at::Tensor scores, index;  // (n, m)

 private:
  void compute_all(int64_t i, int64_t n, int64_t j, int64_t m) {
    const int64_t frames = problem_.frames, row = m * frames;
    at::Tensor products = products_.narrow(0, 0, n * frames * row).view({n * frames, row});
    at::mm_out(products, problem_.a.pack(a_, i, n), problem_.b.pack(b_, j, m).t());
    for (int64_t r = 0; r < n; ++r) {
      block_clone(m, frames, products.const_data_ptr<T>() + r * frames * row,
                  scores.mutable_data_ptr<T>() + r * m,
                  with_index_ ? index.mutable_data_ptr<int32_t>() + r * m : nullptr,
                  work_.mutable_data_ptr<T>(), work_index_.mutable_data_ptr<int32_t>());
    }
  }

  const Problem& problem_;
  const bool all_, with_index_;
  at::Tensor a_, b_, products_, scores_, index_, work_, work_index_;
};

}  // namespace
}  // namespace kdcmae_fast

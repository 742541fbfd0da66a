// The masked reconstruction loss on the CPU: kernels/reconstruction/README.md has the maths.
//
// A patch is formed once for all views that lack it and stays in the first-level cache: pixels and
// predictions are read from memory once. Statistics are those of the patch minus its first value,
// centred before they are squared. Row sums run in token order whatever the number of threads.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "patches.h"
#include "reconstruction.h"
#include "vector_math.h"

namespace kdcmae_fast {
namespace {

constexpr double kEps = 1e-6;  // inside the square root of the patch deviation
constexpr int64_t kGrain = 16;  // patches

// Subtract `offset` from x; the sum of the results, or of their squares.
template <class T, bool squares>
KDCMAE_INLINE T shifted_sum(T* x, int64_t n, T offset) {
  return sum_terms<T>(n, [&](int64_t i, auto zero) KDCMAE_LAMBDA {
    using V = decltype(zero);
    const V y = load<V>(x + i) - offset;
    store(x + i, y);
    return squares ? y * y : y;
  });
}

template <class T>
KDCMAE_INLINE void normalize(T* x, int64_t n) {
  const T mean = shifted_sum<T, false>(x, n, x[0]) / T(n);
  const T squares = shifted_sum<T, true>(x, n, mean);
  const T rstd = T(1) / std::sqrt(squares / T(n - 1) + T(kEps));
  for (int64_t i = 0; i < n; ++i) x[i] *= rstd;
}

template <class T>
KDCMAE_INLINE T squared_error(const T* x, const T* y, int64_t n) {
  return sum_terms<T>(n, [&](int64_t i, auto zero) KDCMAE_LAMBDA {
    using V = decltype(zero);
    const V error = load<V>(x + i) - load<V>(y + i);
    return error * error;
  });
}

template <class T>
KDCMAE_INLINE void scaled_error(const T* x, const T* y, T scale, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - y[i]) * scale;
}

// Clones cannot be templates.
KDCMAE_CLONES void normalize_patch(float* x, int64_t n) { normalize(x, n); }
KDCMAE_CLONES void normalize_patch(double* x, int64_t n) { normalize(x, n); }
KDCMAE_CLONES float error_of(const float* x, const float* y, int64_t n) {
  return squared_error(x, y, n);
}
KDCMAE_CLONES double error_of(const double* x, const double* y, int64_t n) {
  return squared_error(x, y, n);
}
KDCMAE_CLONES void error_into(const float* x, const float* y, float w, int64_t n, float* out) {
  scaled_error(x, y, w, n, out);
}
KDCMAE_CLONES void error_into(const double* x, const double* y, double w, int64_t n, double* out) {
  scaled_error(x, y, w, n, out);
}

// The patches of one batch and the plan of its views.
struct Task {
  Task(const at::Tensor& pred_in, const MaskedPatches& given, bool masked_only)
      : pixels(given.pixels.contiguous()), pred(pred_in.contiguous()),
        plan(given.rank_of_token.contiguous()), p(pixels, given.patch), len_keep(given.len_keep),
        views(given.num_views), norm_pix(given.norm_pix), only_masked(masked_only),
        masked(p.tokens - len_keep) {
    check_order(plan, p.batch, p.tokens);
    check_views(p.tokens, len_keep, views);
    const int64_t rows = only_masked ? masked : p.tokens;
    TORCH_CHECK_VALUE(pred.dim() == 3 && pred.size(0) == views * p.batch && pred.size(1) == rows &&
                          pred.size(2) == p.values, "pred has shape ", pred.sizes());
    TORCH_CHECK_VALUE(masked > 0 && (!norm_pix || p.values > 1), "nothing to normalise or to predict");
    const Normalization n = normalization(pixels, p.channels, given.mean, given.std);
    for (int64_t i = 0; i < p.values; ++i) {
      const int64_t memory = p.target[i];
      places.push_back(p.runs[memory / p.run] + memory % p.run);
      if (!n.scale.defined()) continue;
      const int64_t channel = memory / (p.values / p.channels);
      scale.push_back(n.scale.const_data_ptr<double>()[channel]);
      shift.push_back(n.shift.const_data_ptr<double>()[channel]);
    }
  }

  // Which of the view's masked tokens this one is, or -1 if it is visible.
  int64_t masked_index(int64_t view, int64_t b, int64_t token) const {
    int64_t index = plan.const_data_ptr<int16_t>()[b * p.tokens + token] - (view + 1) * len_keep;
    if (index < 0) index += p.tokens;
    return index < masked ? index : -1;
  }

  // The row of pred, counted over the batch, that predicts `token`.
  int64_t pred_row(int64_t row, int64_t token, int64_t index) const {
    return only_masked ? row * masked + index : row * p.tokens + token;
  }

  template <class Pixel, class T>
  void target(int64_t b, int64_t token, const T* scales, const T* shifts, T* out) const {
    const Pixel* from = pixels.const_data_ptr<Pixel>() + b * p.sample + p.first[token];
    const int64_t* place = places.data();
    for (int64_t i = 0; i < p.values; ++i) {
      if constexpr (std::is_same_v<Pixel, uint8_t>) {
        out[i] = T(from[place[i]]) * scales[i] - shifts[i];
      } else {
        out[i] = static_cast<T>(from[place[i]]);
      }
    }
    if (norm_pix) normalize_patch(out, p.values);
  }

  at::Tensor pixels, pred, plan;
  Patches p;
  int64_t len_keep, views;
  bool norm_pix, only_masked;
  int64_t masked;
  std::vector<int64_t> places;
  std::vector<double> scale, shift;
};

// visit(Pixel{}, Pred{}, T{}) with the types of this task; T is what it computes in.
template <class F>
void dispatch(const Task& task, const F& visit) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, task.pred.scalar_type(), "pred", [&] {
    using Pred = scalar_t;
    if (task.pixels.scalar_type() == at::kByte) return visit(uint8_t{}, Pred{}, Wide<Pred>{});
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, task.pixels.scalar_type(), "pixels", [&] {
          using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, Wide<Pred>>;
          visit(scalar_t{}, Pred{}, T{});
        });
  });
}

// The row itself where it has the type to compute in, else converted into `scratch`.
template <class T, class Pred>
const T* as_wide(const Pred* row, int64_t n, T* scratch) {
  if constexpr (std::is_same_v<T, Pred>) return row;
  convert(row, n, scratch);
  return scratch;
}

// Patches [begin, end), each formed once and shown to all views that lack it: masked(row, token,
// place, target), else visible(row, token, place). `place`: of the first prediction of the patch,
// if there is one.
template <class Pixel, class T, class Masked, class Visible>
KDCMAE_INLINE void visit_patches(const Task& task, int64_t begin, int64_t end,
                                 const Masked& masked, const Visible& visible) {
  const Patches& p = task.p;
  const std::vector<T> scale(task.scale.begin(), task.scale.end());
  const std::vector<T> shift(task.shift.begin(), task.shift.end());
  std::vector<T> target(p.values);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / p.tokens, token = p.in_memory_order(i % p.tokens);
    bool formed = false;
    for (int64_t view = 0; view < task.views; ++view) {
      const int64_t row = view * p.batch + b, index = task.masked_index(view, b, token);
      const int64_t place = task.pred_row(row, token, index) * p.values;
      if (index < 0) {
        visible(row, token, place);
        continue;
      }
      if (!formed) task.target<Pixel>(b, token, scale.data(), shift.data(), target.data());
      formed = true;
      masked(row, token, place, target.data());
    }
  }
}

template <class Pixel, class Pred, class T>
void forward_range(const Task& task, int64_t begin, int64_t end, T* errors) {
  const int64_t tokens = task.p.tokens, values = task.p.values;
  std::vector<T> scratch(values);
  const Pred* pred = task.pred.const_data_ptr<Pred>();
  visit_patches<Pixel, T>(
      task, begin, end,
      [&](int64_t row, int64_t token, int64_t place, const T* target) {
        const T* own = as_wide(pred + place, values, scratch.data());
        errors[row * tokens + token] = error_of(own, target, values);
      },
      [&](int64_t row, int64_t token, int64_t) { errors[row * tokens + token] = T(0); });
}

template <class Pixel, class Pred, class T>
void backward_range(const Task& task, int64_t begin, int64_t end, const T* weights, Pred* dpred) {
  const int64_t values = task.p.values;
  std::vector<T> scratch(values);
  const Pred* pred = task.pred.const_data_ptr<Pred>();
  visit_patches<Pixel, T>(
      task, begin, end,
      [&](int64_t row, int64_t, int64_t place, const T* target) {
        const T* own = as_wide(pred + place, values, scratch.data());
        if constexpr (std::is_same_v<T, Pred>) {
          error_into(own, target, weights[row], values, dpred + place);
        } else {
          error_into(own, target, weights[row], values, scratch.data());
          convert(scratch.data(), values, dpred + place);
        }
      },
      [&](int64_t, int64_t, int64_t place) {
        if (task.only_masked) return;  // it has no place
        std::memset(static_cast<void*>(dpred + place), 0, values * sizeof(Pred));
      });
}

// Loss of every row, (K*B,), float64 if pred or pixels are, else float32.
at::Tensor loss(const at::Tensor& pred, const at::Tensor& pixels,
                const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& std,
                const at::Tensor& rank_of_token, int64_t len_keep, int64_t num_views,
                at::IntArrayRef patch, bool norm_pix, bool masked_only) {
  return row_losses(pred, {pixels, mean, std, rank_of_token, len_keep, num_views, patch, norm_pix},
                    masked_only);
}

// grad (K*B,) -> dpred, in shape and dtype of pred.
at::Tensor loss_backward(const at::Tensor& grad, const at::Tensor& pred, const at::Tensor& pixels,
                         const std::optional<at::Tensor>& mean,
                         const std::optional<at::Tensor>& std, const at::Tensor& rank_of_token,
                         int64_t len_keep, int64_t num_views, at::IntArrayRef patch, bool norm_pix,
                         bool masked_only) {
  TORCH_CHECK_VALUE(rank_of_token.dim() == 2 && pred.dim() == 3, "pred has shape ", pred.sizes());
  const double values = double(rank_of_token.size(1) - len_keep) * double(pred.size(2));
  const bool wide = pred.scalar_type() == at::kDouble || pixels.scalar_type() == at::kDouble;
  const at::Tensor weights = grad.to(wide ? at::kDouble : at::kFloat).mul(2.0 / values);
  at::Tensor dpred = at::empty_like(pred, at::MemoryFormat::Contiguous);
  scaled_errors(pred, {pixels, mean, std, rank_of_token, len_keep, num_views, patch, norm_pix},
                masked_only, weights, dpred);
  return dpred;
}

}  // namespace

at::Tensor row_losses(const at::Tensor& pred, const MaskedPatches& patches, bool masked_only) {
  const Task task(pred, patches, masked_only);
  const Patches& p = task.p;
  const int64_t rows = task.views * p.batch;
  at::Tensor out;
  dispatch(task, [&](auto pixel, auto value, auto wide) {
    using T = decltype(wide);
    out = at::empty({rows}, pred.options().dtype(c10::CppTypeToScalarType<T>::value));
    std::vector<T> errors(rows * p.tokens);
    at::parallel_for(0, p.batch * p.tokens, kGrain, [&](int64_t begin, int64_t end) {
      forward_range<decltype(pixel), decltype(value)>(task, begin, end, errors.data());
    });
    T* result = out.mutable_data_ptr<T>();
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0;
      for (int64_t token = 0; token < p.tokens; ++token) sum += errors[row * p.tokens + token];
      result[row] = T(sum / double(task.masked * p.values));
    }
  });
  return out;
}

void scaled_errors(const at::Tensor& pred, const MaskedPatches& patches, bool masked_only,
                   const at::Tensor& weights_in, at::Tensor& out) {
  const Task task(pred, patches, masked_only);
  const Patches& p = task.p;
  TORCH_CHECK_VALUE(weights_in.dim() == 1 && weights_in.size(0) == task.views * p.batch,
                    "grad has shape ", weights_in.sizes());
  const at::Tensor weights = weights_in.contiguous();
  dispatch(task, [&](auto pixel, auto value, auto wide) {
    using T = decltype(wide);
    using Pred = decltype(value);
    const T* weight = weights.const_data_ptr<T>();
    Pred* to = out.mutable_data_ptr<Pred>();
    at::parallel_for(0, p.batch * p.tokens, kGrain, [&](int64_t begin, int64_t end) {
      backward_range<decltype(pixel)>(task, begin, end, weight, to);
    });
  });
}

// The schemas are defined in kernels/reconstruction/fused.py, beside the other implementations.
TORCH_LIBRARY_IMPL(kdcmae_fast, CPU, m) {
  m.impl("reconstruction_loss_cpp", loss);
  m.impl("reconstruction_loss_backward_cpp", loss_backward);
}

}  // namespace kdcmae_fast

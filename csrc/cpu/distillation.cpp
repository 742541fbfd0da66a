// Row divergences and their gradients on the CPU; kernels/distillation/README.md has the formulas.
// One thread takes whole rows. A row's probabilities live in scratch that stays in the L1 cache, so
// each pass over memory reads both inputs once, and the gradient pass computes everything anew.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <tuple>
#include <vector>

#include "vector_math.h"

namespace kdcmae_fast {
namespace {

enum class Divergence { kSymmetric, kForward, kJensenShannon };
enum class Distribution { kSoftmax, kShift, kBatchShift };

template <class T>
struct Task {
  Divergence divergence;
  Distribution distribution;
  T inverse_temperature;
  int64_t width;
  const T *p, *q;      // (B, width)
  T low_p, low_q;      // the batch's minima, for kBatchShift
};

// One view's row as probabilities.
template <class T>
struct Row {
  const T* z;
  T* probability;
  T lse = 0;      // softmax: log of the sum of exp(z / temperature)
  T low = 0;      // shift: what was shifted by
  T inverse = 1;  // shift: 1 / sum, or 1 where there is no mass
  bool mass = true;
};

constexpr double kEps = 1e-12;

template <class T>
KDCMAE_INLINE void fill_probabilities(const Task<T>& task, T batch_low, Row<T>& row) {
  const int64_t n = task.width;
  const T* z = row.z;
  T* x = row.probability;
  if (task.distribution == Distribution::kSoftmax) {
    const T scale = task.inverse_temperature;
    const T top = scale * max_over(n, z[0], [=](int64_t i) KDCMAE_LAMBDA { return z[i]; });
    for (int64_t i = 0; i < n; ++i) x[i] = vexp(z[i] * scale - top);
    const T sum = sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA { return x[i]; });
    row.lse = top + std::log(sum);
    row.inverse = T(1) / sum;
  } else {
    row.low = task.distribution == Distribution::kBatchShift
                  ? batch_low
                  : -max_over(n, -z[0], [=](int64_t i) KDCMAE_LAMBDA { return -z[i]; });
    const T shift = std::abs(row.low);
    const T sum = sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA { return z[i] + shift; });
    row.mass = sum > 0;
    row.inverse = row.mass ? T(1) / sum : T(1);
    for (int64_t i = 0; i < n; ++i) x[i] = z[i] + shift;
  }
  for (int64_t i = 0; i < n; ++i) x[i] *= row.inverse;
}

template <class T>
KDCMAE_INLINE void fill_row(const Task<T>& task, int64_t r, T* scratch, Row<T>& p, Row<T>& q) {
  p.z = task.p + r * task.width;
  q.z = task.q + r * task.width;
  p.probability = scratch;
  q.probability = scratch + task.width;
  fill_probabilities(task, task.low_p, p);
  fill_probabilities(task, task.low_q, q);
}

template <class T>
KDCMAE_INLINE T row_loss(const Task<T>& task, const Row<T>& p, const Row<T>& q) {
  const int64_t n = task.width;
  const T *x = p.probability, *y = q.probability;
  const bool both = task.divergence == Divergence::kSymmetric;
  constexpr T eps = T(kEps);
  if (task.divergence == Divergence::kJensenShannon) {
    return sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA {
      const T middle = (x[i] + y[i]) / 2 + eps;
      return (x[i] * vlog((x[i] + eps) / middle) + y[i] * vlog((y[i] + eps) / middle)) / 2;
    });
  }
  if (task.distribution == Distribution::kSoftmax) {
    const T scale = task.inverse_temperature, offset = p.lse - q.lse;
    const T *u = p.z, *v = q.z;
    return sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA {
      const T ratio = (u[i] - v[i]) * scale - offset;
      return (both ? (x[i] - y[i]) / 2 : x[i]) * ratio;
    });
  }
  return sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA {
    const T ratio = vlog((x[i] + eps) / (y[i] + eps));
    return (both ? (x[i] - y[i]) / 2 : x[i]) * ratio;
  });
}

// KL of softmax rows: the gradients in closed form, without a division by a probability.
template <class T>
KDCMAE_INLINE void softmax_kl_grad(const Task<T>& task, T weight, const Row<T>& p, const Row<T>& q,
                                   T* grad_p, T* grad_q) {
  const int64_t n = task.width;
  const T *x = p.probability, *y = q.probability, *u = p.z, *v = q.z;
  const T scale = task.inverse_temperature, offset = p.lse - q.lse;
  const T kl_pq = sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA {
    return x[i] * ((u[i] - v[i]) * scale - offset);
  });
  if (task.divergence == Divergence::kForward) {
    weight *= scale;
    for (int64_t i = 0; i < n; ++i) {
      grad_p[i] = weight * x[i] * ((u[i] - v[i]) * scale - offset - kl_pq);
      grad_q[i] = weight * (y[i] - x[i]);
    }
    return;
  }
  const T kl_qp = -sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA {
    return y[i] * ((u[i] - v[i]) * scale - offset);
  });
  weight *= scale / 2;
  for (int64_t i = 0; i < n; ++i) {
    const T ratio = (u[i] - v[i]) * scale - offset, difference = x[i] - y[i];
    grad_p[i] = weight * (x[i] * (ratio - kl_pq) + difference);
    grad_q[i] = weight * (y[i] * (-ratio - kl_qp) - difference);
  }
}

// Gradients by the probabilities of the divergences that have an eps inside their logarithms.
template <class T>
KDCMAE_INLINE void probability_grad(const Task<T>& task, const T* x, const T* y, T* by_x, T* by_y) {
  const int64_t n = task.width;
  constexpr T eps = T(kEps);
  if (task.divergence == Divergence::kJensenShannon) {
    for (int64_t i = 0; i < n; ++i) {
      const T middle = (x[i] + y[i]) / 2, a = x[i] + eps, b = y[i] + eps, m = middle + eps;
      by_x[i] = (vlog(a / m) + x[i] / a - middle / m) / 2;
      by_y[i] = (vlog(b / m) + y[i] / b - middle / m) / 2;
    }
  } else if (task.divergence == Divergence::kForward) {
    for (int64_t i = 0; i < n; ++i) {
      const T a = x[i] + eps, b = y[i] + eps;
      by_x[i] = vlog(a / b) + x[i] / a;
      by_y[i] = -x[i] / b;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const T a = x[i] + eps, b = y[i] + eps, ratio = vlog(a / b);
      by_x[i] = (ratio + (x[i] - y[i]) / a) / 2;
      by_y[i] = (-ratio + (y[i] - x[i]) / b) / 2;
    }
  }
}

// Gradient by an entry that is the minimum, of that by its mass: |low| moves with it. Below zero its
// mass is 0 whatever it is, and the gradient by its mass, of the order of 1 / eps, has to cancel
// before anything is added to it.
template <class T>
KDCMAE_INLINE T low_grad(T grad, T low, T mean_of_lowest, T share_of_others) {
  if (low > 0) return grad + mean_of_lowest + share_of_others;
  return low < 0 ? (grad - mean_of_lowest) - share_of_others : grad;
}

// Turns the gradient by a row's probabilities into weight * the gradient by the row, in place.
// Returns what flows into the minimum of the whole batch from entries that are not it.
template <class T>
KDCMAE_INLINE T feature_grad(const Task<T>& task, T weight, const Row<T>& row, T* grad) {
  const int64_t n = task.width;
  const T *x = row.probability, *z = row.z;
  T inner = sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA { return grad[i] * x[i]; });
  if (task.distribution == Distribution::kSoftmax) {
    weight *= task.inverse_temperature;
    for (int64_t i = 0; i < n; ++i) grad[i] = weight * x[i] * (grad[i] - inner);
    return 0;
  }
  weight *= row.inverse;
  if (!row.mass) inner = 0;
  for (int64_t i = 0; i < n; ++i) grad[i] = weight * (grad[i] - inner);
  const T low = row.low;
  const T others = sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA {
    return z[i] == low ? T(0) : grad[i];
  });
  if (task.distribution == Distribution::kBatchShift) return others;
  const T lowest = sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA {
    return z[i] == low ? grad[i] : T(0);
  });
  const T ties = sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA { return T(z[i] == low); });
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = z[i] == low ? low_grad(grad[i], low, lowest / ties, others / ties) : grad[i];
  }
  return 0;
}

template <class T>
KDCMAE_INLINE void loss_rows(const Task<T>& task, int64_t begin, int64_t end, T* scratch, T* loss) {
  for (int64_t r = begin; r < end; ++r) {
    Row<T> p, q;
    fill_row(task, r, scratch, p, q);
    loss[r] = row_loss(task, p, q);
  }
}

// into_low: (B, 2), what flows into the batch's minima from each row of p and q.
template <class T>
KDCMAE_INLINE void grad_rows(const Task<T>& task, int64_t begin, int64_t end, T* scratch,
                             const T* weight, T* grad_p, T* grad_q, T* into_low) {
  const bool direct = task.distribution == Distribution::kSoftmax &&
                      task.divergence != Divergence::kJensenShannon;
  for (int64_t r = begin; r < end; ++r) {
    Row<T> p, q;
    fill_row(task, r, scratch, p, q);
    T *by_p = grad_p + r * task.width, *by_q = grad_q + r * task.width;
    if (direct) {
      softmax_kl_grad(task, weight[r], p, q, by_p, by_q);
    } else {
      probability_grad(task, p.probability, q.probability, by_p, by_q);
      into_low[2 * r] = feature_grad(task, weight[r], p, by_p);
      into_low[2 * r + 1] = feature_grad(task, weight[r], q, by_q);
    }
  }
}

// Clones cannot be templates.
KDCMAE_CLONES void loss_range(const Task<float>& task, int64_t begin, int64_t end, float* scratch,
                              float* loss) {
  loss_rows(task, begin, end, scratch, loss);
}
KDCMAE_CLONES void loss_range(const Task<double>& task, int64_t begin, int64_t end, double* scratch,
                              double* loss) {
  loss_rows(task, begin, end, scratch, loss);
}
KDCMAE_CLONES void grad_range(const Task<float>& task, int64_t begin, int64_t end, float* scratch,
                              const float* weight, float* by_p, float* by_q, float* into_low) {
  grad_rows(task, begin, end, scratch, weight, by_p, by_q, into_low);
}
KDCMAE_CLONES void grad_range(const Task<double>& task, int64_t begin, int64_t end, double* scratch,
                              const double* weight, double* by_p, double* by_q, double* into_low) {
  grad_rows(task, begin, end, scratch, weight, by_p, by_q, into_low);
}

Divergence divergence_of(std::string_view name) {
  if (name == "kl") return Divergence::kSymmetric;
  if (name == "kl_12") return Divergence::kForward;
  TORCH_CHECK_VALUE(name == "js", "divergence=", name, " is not one of kl, kl_12, js");
  return Divergence::kJensenShannon;
}

Distribution distribution_of(std::string_view name) {
  if (name == "softmax") return Distribution::kSoftmax;
  if (name == "shift") return Distribution::kShift;
  TORCH_CHECK_VALUE(name == "batch_shift", "distribution=", name, " is not known");
  return Distribution::kBatchShift;
}

at::ScalarType compute_type(const at::Tensor& p, const at::Tensor& q) {
  const bool wide = p.scalar_type() == at::kDouble || q.scalar_type() == at::kDouble;
  return wide ? at::kDouble : at::kFloat;
}

// Both views contiguous in the type of the computation.
std::tuple<at::Tensor, at::Tensor> operands(const at::Tensor& p, const at::Tensor& q) {
  TORCH_CHECK_VALUE(p.dim() == 2 && p.sizes() == q.sizes() && p.size(1) > 0,
                    "p and q must be (B, D) with D > 0, got ", p.sizes(), " and ", q.sizes());
  const auto type = compute_type(p, q);
  return {p.to(type).contiguous(), q.to(type).contiguous()};
}

template <class T>
Task<T> make_task(const at::Tensor& p, const at::Tensor& q, std::string_view divergence,
                  std::string_view distribution, double temperature) {
  Task<T> task{divergence_of(divergence), distribution_of(distribution), T(1 / temperature),
               p.size(1), p.const_data_ptr<T>(), q.const_data_ptr<T>(), 0, 0};
  if (task.distribution == Distribution::kBatchShift && p.size(0) > 0) {
    task.low_p = p.amin().item<T>();
    task.low_q = q.amin().item<T>();
  }
  return task;
}

int64_t grain(int64_t width) { return std::max<int64_t>(1, 4096 / width); }

at::Tensor rows(const at::Tensor& p, const at::Tensor& q, std::string_view divergence,
                std::string_view distribution, double temperature) {
  const auto [u, v] = operands(p, q);
  at::Tensor loss = at::empty({u.size(0)}, u.options());
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "distillation_rows", [&, u = u, v = v] {
    const auto task = make_task<scalar_t>(u, v, divergence, distribution, temperature);
    scalar_t* out = loss.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, u.size(0), grain(task.width), [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> scratch(2 * task.width);
      loss_range(task, begin, end, scratch.data(), out);
    });
  });
  return loss;
}

// Adds what flows into a batch's minimum to the entries that are it, in equal shares.
template <class T>
void add_low_grad(const at::Tensor& z, T low, const std::vector<T>& into_low, int64_t view,
                  at::Tensor& grad) {
  T others = 0;
  for (size_t r = view; r < into_low.size(); r += 2) others += into_low[r];
  const at::Tensor ties = (z == low).view(-1).nonzero().view(-1);
  if (ties.size(0) == 0) return;  // the minimum is not a number
  at::Tensor lowest = grad.view(-1).index_select(0, ties);
  const T mean = lowest.mean().item<T>(), share = others / T(ties.size(0));
  T* x = lowest.mutable_data_ptr<T>();
  for (int64_t i = 0; i < lowest.size(0); ++i) x[i] = low_grad(x[i], low, mean, share);
  grad.view(-1).index_copy_(0, ties, lowest);
}

std::tuple<at::Tensor, at::Tensor> rows_grad(const at::Tensor& grad, const at::Tensor& p,
                                             const at::Tensor& q, std::string_view divergence,
                                             std::string_view distribution, double temperature) {
  const auto [u, v] = operands(p, q);
  TORCH_CHECK_VALUE(grad.dim() == 1 && grad.size(0) == u.size(0), "grad must be (B,)");
  const at::Tensor weights = grad.to(u.scalar_type()).contiguous();
  at::Tensor grad_p = at::empty_like(u), grad_q = at::empty_like(v);
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "distillation_rows_grad", [&, u = u, v = v] {
    const auto task = make_task<scalar_t>(u, v, divergence, distribution, temperature);
    std::vector<scalar_t> into_low(2 * u.size(0));
    const scalar_t* weight = weights.const_data_ptr<scalar_t>();
    scalar_t* by_p = grad_p.mutable_data_ptr<scalar_t>();
    scalar_t* by_q = grad_q.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, u.size(0), grain(task.width), [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> scratch(2 * task.width);
      grad_range(task, begin, end, scratch.data(), weight, by_p, by_q, into_low.data());
    });
    if (task.distribution == Distribution::kBatchShift && u.size(0) > 0) {
      add_low_grad(u, task.low_p, into_low, 0, grad_p);
      add_low_grad(v, task.low_q, into_low, 1, grad_q);
    }
  });
  return {grad_p.to(p.scalar_type()), grad_q.to(q.scalar_type())};
}

}  // namespace

// The schemas are defined in kernels/distillation/op.py, beside the other implementations.
TORCH_LIBRARY_IMPL(kdcmae_fast, CPU, m) {
  m.impl("distillation_rows_cpp", rows);
  m.impl("distillation_rows_grad_cpp", rows_grad);
}

}  // namespace kdcmae_fast

// The DINO loss and its gradient on the CPU; kernels/distillation/README.md has the formulas.
// One thread takes whole samples: the teachers' probabilities of one sample live in scratch, every
// student crop is weighed against their sum, and memory is read once.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "vector_math.h"

namespace kdcmae_fast {
namespace {

template <class T>
struct Task {
  int64_t batch, width, teachers, students, matched;  // matched: pairs left out of the mean
  T teacher_scale, student_scale;                      // 1 / temperature
  const T *teacher, *student, *center;                 // (crops, batch, width), center (width)
  T *top, *total;  // (teachers + students, batch): maximum of scaled logits, sum of exponentials

  T pairs() const { return T(teachers * students - matched); }
  int64_t scratch() const { return (teachers + 1) * width; }
};

// The sum of the teachers' probabilities of one sample, then those of each teacher.
template <class T>
struct Targets {
  T* sum;
  T* of(const Task<T>& task, int64_t crop) const { return sum + (crop + 1) * task.width; }
};

// Sum of f(0) + ... + f(n - 1) over a wide row. A few of its terms are most of the sum; one long
// addition would round off the thousands that come after them.
template <class T, class F>
KDCMAE_INLINE double wide_sum(int64_t n, F f) {
  constexpr int64_t kBlock = 512;
  double total = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    total += sum_over<T>(std::min(kBlock, n - first), [=](int64_t i) KDCMAE_LAMBDA {
      return f(first + i);
    });
  }
  return total;
}

template <class T>
KDCMAE_INLINE void fill_targets(const Task<T>& task, int64_t b, bool known,
                                const Targets<T>& targets) {
  const int64_t n = task.width;
  const T scale = task.teacher_scale;
  const T* c = task.center;
  T* sum = targets.sum;
  for (int64_t t = 0; t < task.teachers; ++t) {
    const int64_t row = t * task.batch + b;
    const T* z = task.teacher + row * n;
    T* q = targets.of(task, t);
    if (!known) {
      task.top[row] = scale * max_over(n, z[0] - c[0], [=](int64_t i) KDCMAE_LAMBDA {
                        return z[i] - c[i];
                      });
    }
    const T top = task.top[row];
    for (int64_t i = 0; i < n; ++i) q[i] = vexp((z[i] - c[i]) * scale - top);
    if (!known) {
      task.total[row] = T(wide_sum<T>(n, [=](int64_t i) KDCMAE_LAMBDA { return q[i]; }));
    }
    const T inverse = T(1) / task.total[row];
    if (t == 0) {
      for (int64_t i = 0; i < n; ++i) sum[i] = q[i] = q[i] * inverse;
    } else {
      for (int64_t i = 0; i < n; ++i) sum[i] += q[i] = q[i] * inverse;
    }
  }
}

template <class T>
KDCMAE_INLINE void loss_rows(const Task<T>& task, int64_t begin, int64_t end, T* scratch, T* loss) {
  const int64_t n = task.width;
  const T scale = task.student_scale;
  const Targets<T> targets{scratch};
  for (int64_t b = begin; b < end; ++b) {
    fill_targets(task, b, false, targets);
    double sum = 0;
    for (int64_t s = 0; s < task.students; ++s) {
      const T* z = task.student + (s * task.batch + b) * n;
      const T top = scale * max_over(n, z[0], [=](int64_t i) KDCMAE_LAMBDA { return z[i]; });
      const T total = T(wide_sum<T>(n, [=](int64_t i) KDCMAE_LAMBDA {
        return vexp(z[i] * scale - top);
      }));
      const T log_total = std::log(total);
      const T* q = targets.sum;
      sum += wide_sum<T>(n, [=](int64_t i) KDCMAE_LAMBDA {
        return q[i] * (z[i] * scale - top - log_total);
      });
      if (s < task.matched) {
        const T* own = targets.of(task, s);
        sum -= wide_sum<T>(n, [=](int64_t i) KDCMAE_LAMBDA {
          return own[i] * (z[i] * scale - top - log_total);
        });
      }
      const int64_t row = (task.teachers + s) * task.batch + b;
      task.top[row] = top;
      task.total[row] = total;
    }
    loss[b] = T(-sum / double(task.pairs()));
  }
}

template <class T>
KDCMAE_INLINE void grad_rows(const Task<T>& task, int64_t begin, int64_t end, T* scratch,
                             const T* weights, T* grad_student) {
  const int64_t n = task.width;
  const T scale = task.student_scale;
  const Targets<T> targets{scratch};
  for (int64_t b = begin; b < end; ++b) {
    fill_targets(task, b, true, targets);
    const T weight = weights[b] * scale / task.pairs();
    for (int64_t s = 0; s < task.students; ++s) {
      const int64_t row = (task.teachers + s) * task.batch + b;
      const T* z = task.student + (s * task.batch + b) * n;
      T* grad = grad_student + (s * task.batch + b) * n;
      const T top = task.top[row];
      const T* q = targets.sum;
      if (s < task.matched) {
        const T factor = T(task.teachers - 1) / task.total[row];
        const T* own = targets.of(task, s);
        for (int64_t i = 0; i < n; ++i) {
          grad[i] = weight * (factor * vexp(z[i] * scale - top) - (q[i] - own[i]));
        }
      } else {
        const T factor = T(task.teachers) / task.total[row];
        for (int64_t i = 0; i < n; ++i) {
          grad[i] = weight * (factor * vexp(z[i] * scale - top) - q[i]);
        }
      }
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
                              const float* weights, float* grad) {
  grad_rows(task, begin, end, scratch, weights, grad);
}
KDCMAE_CLONES void grad_range(const Task<double>& task, int64_t begin, int64_t end, double* scratch,
                              const double* weights, double* grad) {
  grad_rows(task, begin, end, scratch, weights, grad);
}

// Contiguous in the type of the computation.
struct Logits {
  at::Tensor teacher, student, center;
};

Logits logits(const at::Tensor& teacher, const at::Tensor& student, const at::Tensor& center) {
  TORCH_CHECK_VALUE(teacher.dim() == 3 && student.dim() == 3 &&
                        teacher.size(1) == student.size(1) && teacher.size(2) == student.size(2) &&
                        teacher.size(2) > 0 && center.dim() == 1 &&
                        center.size(0) == teacher.size(2),
                    "teacher must be (T, B, D), student (S, B, D) and center (D), got ",
                    teacher.sizes(), ", ", student.sizes(), " and ", center.sizes());
  bool wide = false;
  for (const at::Tensor& x : {teacher, student, center}) wide |= x.scalar_type() == at::kDouble;
  const auto type = wide ? at::kDouble : at::kFloat;
  return {teacher.to(type).contiguous(), student.to(type).contiguous(),
          center.to(type).contiguous()};
}

template <class T>
Task<T> make_task(const Logits& x, const at::Tensor& statistics, double teacher_temperature,
                  double student_temperature, bool exclude_matched) {
  const int64_t teachers = x.teacher.size(0), students = x.student.size(0);
  T* top = statistics.mutable_data_ptr<T>();
  return {x.student.size(1), x.student.size(2), teachers, students,
          exclude_matched ? std::min(teachers, students) : 0,
          T(1 / teacher_temperature), T(1 / student_temperature),
          x.teacher.const_data_ptr<T>(), x.student.const_data_ptr<T>(),
          x.center.const_data_ptr<T>(), top, top + statistics.numel() / 2};
}

template <class T>
int64_t grain(const Task<T>& task) {
  return std::max<int64_t>(1, 4096 / (task.width * (task.teachers + task.students)));
}

std::tuple<at::Tensor, at::Tensor> dino_rows(const at::Tensor& teacher, const at::Tensor& student,
                                             const at::Tensor& center, double teacher_temperature,
                                             double student_temperature, bool exclude_matched) {
  const Logits x = logits(teacher, student, center);
  const int64_t batch = x.student.size(1), crops = x.teacher.size(0) + x.student.size(0);
  at::Tensor loss = at::empty({batch}, x.student.options());
  at::Tensor statistics = at::empty({2, crops, batch}, x.student.options());
  AT_DISPATCH_FLOATING_TYPES(x.student.scalar_type(), "dino_rows", [&] {
    const auto task = make_task<scalar_t>(x, statistics, teacher_temperature, student_temperature,
                                          exclude_matched);
    scalar_t* out = loss.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, batch, grain(task), [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> scratch(task.scratch());
      loss_range(task, begin, end, scratch.data(), out);
    });
  });
  return {loss, statistics};
}

at::Tensor dino_rows_grad(const at::Tensor& grad, const at::Tensor& teacher,
                          const at::Tensor& student, const at::Tensor& center,
                          const at::Tensor& statistics, double teacher_temperature,
                          double student_temperature, bool exclude_matched) {
  const Logits x = logits(teacher, student, center);
  const auto type = x.student.scalar_type();
  const int64_t batch = x.student.size(1);
  TORCH_CHECK_VALUE(grad.dim() == 1 && grad.size(0) == batch, "grad must be (B,)");
  TORCH_CHECK_VALUE(statistics.scalar_type() == type && statistics.is_contiguous() &&
                        statistics.numel() == 2 * batch * (x.teacher.size(0) + x.student.size(0)),
                    "statistics must be (2, T + S, B) from the forward pass");
  const at::Tensor weights = grad.to(type).contiguous();
  at::Tensor grad_student = at::empty_like(x.student);
  AT_DISPATCH_FLOATING_TYPES(type, "dino_rows_grad", [&] {
    const auto task = make_task<scalar_t>(x, statistics, teacher_temperature, student_temperature,
                                          exclude_matched);
    const scalar_t* weight = weights.const_data_ptr<scalar_t>();
    scalar_t* out = grad_student.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, batch, grain(task), [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> scratch(task.scratch());
      grad_range(task, begin, end, scratch.data(), weight, out);
    });
  });
  return grad_student.to(student.scalar_type());
}

}  // namespace

// The schemas are defined in kernels/distillation/dino.py, beside the other implementations.
TORCH_LIBRARY_IMPL(kdcmae_fast, CPU, m) {
  m.impl("dino_rows_cpp", dino_rows);
  m.impl("dino_rows_grad_cpp", dino_rows_grad);
}

}  // namespace kdcmae_fast

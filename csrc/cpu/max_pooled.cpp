// Max-pooled logits on the CPU; kernels/contrastive/README.md has the maths and
// max_pooled_reference.py the same in Python.
//
// Letters: N maps of P cells, M vectors, width D. Maps come as they are, in any dtype and strides:
// a task takes a few of them, copied only if they are not rows of the computation's type already.
// Forward: one product of those cells with a block of vectors, then the largest cell of each column
// while the products are in the cache. Backward: each pair (n, m) has a gradient at one cell only,
// so both gradients are sums of M (N) weighted rows, 2NMD operations instead of the 2NPMD of a
// product with the one-hot matrix. Every sum has a fixed order.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "vector_math.h"

namespace kdcmae_fast {
namespace {

constexpr int64_t kVectorBlock = 512;  // of a product
constexpr int64_t kCellRows = 256;     // that many cells are multiplied at once, if maps are small
constexpr int64_t kWidthBlock = 64;    // of a row's sum that stays in registers
constexpr int64_t kWidthSlice = 128;   // of the vectors' gradient
constexpr int64_t kImages = 4;         // summed at once into the vectors' gradient

// Products of one map (cells, n) to its best products and their cells, the first of equal ones.
template <class T>
KDCMAE_INLINE void pool_pass(const T* products, int64_t stride, int64_t cells, int64_t n,
                             const T* cell_scale, T* top, int16_t* cell) {
  for (int64_t i = 0; i < n; ++i) {
    top[i] = products[i] * cell_scale[0];
    cell[i] = 0;
  }
  for (int64_t p = 1; p < cells; ++p) {
    const T* row = products + p * stride;
    const T factor = cell_scale[p];
    const auto here = static_cast<int16_t>(p);
    for (int64_t i = 0; i < n; ++i) {
      const T x = row[i] * factor;
      const bool better = (x > top[i]) | (x != x);  // a NaN stays: nothing is larger
      top[i] = better ? x : top[i];
      cell[i] = better ? here : cell[i];
    }
  }
}

// to (width) = sum over the listed vectors of weight * vector.
template <class T>
KDCMAE_INLINE void weighted_rows(const T* rows, int64_t width, const int32_t* which,
                                 const T* weight, int64_t count, T* to) {
  int64_t first = 0;
  for (; first + kWidthBlock <= width; first += kWidthBlock) {
    T sum[kWidthBlock] = {};
    for (int64_t k = 0; k < count; ++k) {
      const T* row = rows + which[k] * width + first;
      for (int64_t d = 0; d < kWidthBlock; ++d) sum[d] += weight[k] * row[d];
    }
    for (int64_t d = 0; d < kWidthBlock; ++d) to[first + d] = sum[d];
  }
  for (int64_t d = first; d < width; ++d) to[d] = T(0);
  for (int64_t k = 0; k < count; ++k) {
    const T* row = rows + which[k] * width;
    for (int64_t d = first; d < width; ++d) to[d] += weight[k] * row[d];
  }
}

// to += sum over kImages rows of weight * row.
template <class T>
KDCMAE_INLINE void add_rows(const T* const* rows, const T* weight, int64_t width, T* to) {
  const T *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  const T u = weight[0], v = weight[1], w = weight[2], x = weight[3];
  for (int64_t i = 0; i < width; ++i) {
    to[i] += (u * a[i] + v * b[i]) + (w * c[i] + x * d[i]);
  }
}

// to = inverse * (to - along * unit row), the unit row being x * inverse.
template <class T>
KDCMAE_INLINE void through_norm(const T* x, T inverse, T along, int64_t width, T* to) {
  const T back = along * inverse;
  for (int64_t d = 0; d < width; ++d) to[d] = inverse * (to[d] - back * x[d]);
}

// Clones cannot be templates.
#define KDCMAE_PASSES(T)                                                                         \
  KDCMAE_CLONES void pool_clone(const T* products, int64_t stride, int64_t cells, int64_t n,     \
                                const T* cell_scale, T* top, int16_t* cell) {                    \
    pool_pass(products, stride, cells, n, cell_scale, top, cell);                                \
  }                                                                                              \
  KDCMAE_CLONES void weighted_clone(const T* rows, int64_t width, const int32_t* which,          \
                                    const T* weight, int64_t count, T* to) {                     \
    weighted_rows(rows, width, which, weight, count, to);                                        \
  }                                                                                              \
  KDCMAE_CLONES void add_clone(const T* const* rows, const T* weight, int64_t width, T* to) {    \
    add_rows(rows, weight, width, to);                                                           \
  }                                                                                              \
  KDCMAE_CLONES void norm_clone(const T* x, T inverse, T along, int64_t width, T* to) {          \
    through_norm(x, inverse, along, width, to);                                                  \
  }
KDCMAE_PASSES(float)
KDCMAE_PASSES(double)
#undef KDCMAE_PASSES

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// The operands of one call; the small ones in the type of the computation.
struct Rows {
  at::Tensor maps, inverse, vectors;
  int64_t images, cells, width, columns;
  bool in_place;  // maps can be read where they are

  Rows(const at::Tensor& maps_, const at::Tensor& inverse_, const at::Tensor& vectors_,
       const at::Tensor& scale)
      : maps(maps_),
        images(maps_.size(0)),
        cells(maps_.size(1)),
        width(maps_.size(2)),
        columns(vectors_.size(0)) {
    TORCH_CHECK_VALUE(vectors_.dim() == 2 && vectors_.size(1) == width,
                      "maps and vectors must be (N, P, D) and (M, D), got ", maps_.sizes(),
                      " and ", vectors_.sizes());
    TORCH_CHECK_VALUE(inverse_.numel() == images * cells, "inverse norms must be one per cell");
    TORCH_CHECK_VALUE(cells > 0 && cells <= 32768, "maps must have 1 to 32768 cells, got ", cells);
    const auto type = scale.scalar_type();
    inverse = inverse_.to(type).contiguous();
    vectors = vectors_.to(type).contiguous();
    in_place = maps.scalar_type() == type && maps.is_contiguous();
  }

  // Images that make about kCellRows rows.
  int64_t group() const { return std::min(images, std::max<int64_t>(1, kCellRows / cells)); }

  // Room for `count` images, or a slice of their width, where they have to be copied.
  at::Tensor buffer(int64_t count, int64_t slice) const {
    return in_place ? at::Tensor() : at::empty({count, cells, slice}, vectors.options());
  }

  at::Tensor load(int64_t first, int64_t count, const at::Tensor& buffer, int64_t left,
                  int64_t slice) const {
    const at::Tensor some = maps.narrow(0, first, count).narrow(2, left, slice);
    return in_place ? some : buffer.narrow(0, 0, count).copy_(some);
  }
};

template <class T>
void scores_in(const Rows& rows, T scale, T* logits, int16_t* cells) {
  const int64_t group = rows.group(), columns = rows.columns;
  const T* inverse = rows.inverse.template const_data_ptr<T>();
  at::parallel_for(0, ceil_div(rows.images, group), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const at::Tensor buffer = rows.buffer(group, rows.width);
    const at::Tensor products = at::empty(
        {group * rows.cells, std::min(columns, kVectorBlock)}, rows.vectors.options());
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k * group, count = std::min(group, rows.images - first);
      const at::Tensor flat = rows.load(first, count, buffer, 0, rows.width).view({-1, rows.width});
      for (int64_t start = 0; start < columns; start += kVectorBlock) {
        const int64_t n = std::min(kVectorBlock, columns - start);
        at::Tensor out = products.narrow(0, 0, count * rows.cells).narrow(1, 0, n);
        at::mm_out(out, flat, rows.vectors.narrow(0, start, n).t());
        for (int64_t i = 0; i < count; ++i) {
          const int64_t at = (first + i) * columns + start;
          pool_clone(out.const_data_ptr<T>() + i * rows.cells * out.stride(0), out.stride(0),
                     rows.cells, n, inverse + (first + i) * rows.cells, logits + at, cells + at);
        }
      }
      T* own = logits + first * columns;
      for (int64_t i = 0; i < count * columns; ++i) own[i] *= scale;
    }
  });
}

// Logits (N, M): scale * max over p of inverse[n, p] <maps[n, p], vectors[m]>, and those p, int16.
std::tuple<at::Tensor, at::Tensor> scores(const at::Tensor& maps, const at::Tensor& inverse,
                                          const at::Tensor& vectors, const at::Tensor& scale) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Rows rows(maps, inverse, vectors, scale);
  at::Tensor logits = at::empty({rows.images, rows.columns}, scale.options());
  at::Tensor cells = at::empty({rows.images, rows.columns}, scale.options().dtype(at::kShort));
  AT_DISPATCH_FLOATING_TYPES(scale.scalar_type(), "max_pooled_scores", [&] {
    scores_in<scalar_t>(rows, scale.item<scalar_t>(), logits.mutable_data_ptr<scalar_t>(),
                        cells.mutable_data_ptr<int16_t>());
  });
  return {logits, cells};
}

// What both gradients read, per pair (N, M).
struct Pairs {
  at::Tensor grad, cells;

  Pairs(const Rows& rows, const at::Tensor& grad_, const at::Tensor& cells_)
      : grad(grad_.contiguous()), cells(cells_.contiguous()) {
    TORCH_CHECK_VALUE(grad.scalar_type() == rows.vectors.scalar_type() &&
                          grad.numel() == rows.images * rows.columns &&
                          cells.scalar_type() == at::kShort && cells.numel() == grad.numel(),
                      "grad and cells must be (N, M)");
  }
};

// One image's vectors, sorted by the cell they belong to: which of them, with their gradients.
template <class T>
struct ByCell {
  std::vector<int64_t> starts;  // (cells + 1)
  std::vector<int32_t> which;
  std::vector<T> weight, along;  // along: sum over a cell's vectors of gradient * logit

  ByCell(int64_t cells, int64_t columns)
      : starts(cells + 1), which(columns), weight(columns), along(cells) {}

  void sort(const int16_t* cell, const T* grad, const T* logit) {
    const auto columns = static_cast<int64_t>(which.size());
    std::fill(starts.begin(), starts.end(), 0);
    std::fill(along.begin(), along.end(), T(0));
    for (int64_t m = 0; m < columns; ++m) {
      ++starts[cell[m] + 1];
      along[cell[m]] += grad[m] * logit[m];
    }
    for (size_t p = 1; p < starts.size(); ++p) starts[p] += starts[p - 1];
    for (int64_t m = 0; m < columns; ++m) {
      const int64_t at = starts[cell[m]]++;
      which[at] = static_cast<int32_t>(m);
      weight[at] = grad[m];
    }
    // Each start has moved on to the next one's place.
    for (size_t p = starts.size() - 1; p > 0; --p) starts[p] = starts[p - 1];
    starts[0] = 0;
  }
};

template <class T>
void by_maps_in(const Rows& rows, T scale, T unit, const Pairs& pairs, const at::Tensor& logits,
                bool normalize, at::Tensor& by_maps) {
  const int64_t width = rows.width, cells = rows.cells, columns = rows.columns;
  const T* inverse = rows.inverse.template const_data_ptr<T>();
  const T* vectors = rows.vectors.template const_data_ptr<T>();
  const T* grad = pairs.grad.template const_data_ptr<T>();
  const T* logit = logits.const_data_ptr<T>();
  const int16_t* cell = pairs.cells.template const_data_ptr<int16_t>();
  const bool direct = by_maps.scalar_type() == rows.vectors.scalar_type();
  at::parallel_for(0, rows.images, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const at::Tensor buffer = normalize ? rows.buffer(1, width) : at::Tensor();
    const at::Tensor staged =
        direct ? at::Tensor() : at::empty({1, cells, width}, rows.vectors.options());
    ByCell<T> sorted(cells, columns);
    for (int64_t n = begin; n < end; ++n) {
      const at::Tensor out = direct ? by_maps.narrow(0, n, 1) : staged;
      T* to = out.mutable_data_ptr<T>();
      const at::Tensor image = normalize ? rows.load(n, 1, buffer, 0, width) : at::Tensor();
      const T* x = normalize ? image.const_data_ptr<T>() : nullptr;
      sorted.sort(cell + n * columns, grad + n * columns, logit + n * columns);
      for (T& weight : sorted.weight) weight *= scale * unit;
      for (int64_t p = 0; p < cells; ++p) {
        const int64_t first = sorted.starts[p], count = sorted.starts[p + 1] - first;
        weighted_clone(vectors, width, sorted.which.data() + first, sorted.weight.data() + first,
                       count, to + p * width);
        if (normalize && count > 0) {
          norm_clone(x + p * width, inverse[n * cells + p], sorted.along[p] * unit, width,
                     to + p * width);
        }
      }
      if (!direct) by_maps.narrow(0, n, 1).copy_(staged);
    }
  });
}

// Gradient by the maps (N, P, D), in `dtype`, from `unit` times `grad` by the logits.
at::Tensor gradient_by_maps(const at::Tensor& maps, const at::Tensor& inverse,
                            const at::Tensor& vectors, const at::Tensor& scale,
                            const at::Tensor& unit, const at::Tensor& grad,
                            const at::Tensor& logits, const at::Tensor& cells, bool normalize,
                            at::ScalarType dtype) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Rows rows(maps, inverse, vectors, scale);
  const Pairs pairs(rows, grad, cells);
  at::Tensor by_maps = at::empty(maps.sizes(), scale.options().dtype(dtype));
  AT_DISPATCH_FLOATING_TYPES(scale.scalar_type(), "max_pooled_gradient_by_maps", [&] {
    by_maps_in<scalar_t>(rows, scale.item<scalar_t>(), unit.item<scalar_t>(), pairs,
                         logits.contiguous(), normalize, by_maps);
  });
  return by_maps;
}

template <class T>
void by_vectors_in(const Rows& rows, T scale, const Pairs& pairs, T* by_vectors) {
  const int64_t width = rows.width, cells = rows.cells, columns = rows.columns;
  const T* inverse = rows.inverse.template const_data_ptr<T>();
  const T* grad = pairs.grad.template const_data_ptr<T>();
  const int16_t* cell = pairs.cells.template const_data_ptr<int16_t>();
  // A task is a slice of the width: the maps are read once, the result's slice stays in the cache.
  at::parallel_for(0, ceil_div(width, kWidthSlice), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t left = k * kWidthSlice, slice = std::min(kWidthSlice, width - left);
      const at::Tensor buffer = rows.buffer(kImages, slice);
      for (int64_t first = 0; first < rows.images; first += kImages) {
        const int64_t count = std::min(kImages, rows.images - first);
        const at::Tensor images = rows.load(first, count, buffer, left, slice);
        const T* x = images.const_data_ptr<T>();
        const int64_t stride = images.stride(1);
        for (int64_t m = 0; m < columns; ++m) {
          const T* from[kImages] = {x, x, x, x};
          T weight[kImages] = {};
          for (int64_t i = 0; i < count; ++i) {
            const int64_t n = first + i, p = cell[n * columns + m];
            from[i] = x + (i * cells + p) * stride;
            weight[i] = scale * grad[n * columns + m] * inverse[n * cells + p];
          }
          add_clone(from, weight, slice, by_vectors + m * width + left);
        }
      }
    }
  });
}

// Gradient by the vectors (M, D) from `unit` times `grad` by the logits.
at::Tensor gradient_by_vectors(const at::Tensor& maps, const at::Tensor& inverse,
                               const at::Tensor& vectors, const at::Tensor& scale,
                               const at::Tensor& unit, const at::Tensor& grad,
                               const at::Tensor& cells) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Rows rows(maps, inverse, vectors, scale);
  const Pairs pairs(rows, grad, cells);
  at::Tensor by_vectors = at::zeros(vectors.sizes(), scale.options());
  AT_DISPATCH_FLOATING_TYPES(scale.scalar_type(), "max_pooled_gradient_by_vectors", [&] {
    by_vectors_in<scalar_t>(rows, scale.item<scalar_t>() * unit.item<scalar_t>(), pairs,
                            by_vectors.mutable_data_ptr<scalar_t>());
  });
  return by_vectors;
}

}  // namespace

// The schemas are defined in kernels/contrastive/max_pooled_fused.py.
TORCH_LIBRARY_IMPL(kdcmae_fast, CPU, m) {
  m.impl("max_pooled_scores_cpp", scores);
  m.impl("max_pooled_gradient_by_maps_cpp", gradient_by_maps);
  m.impl("max_pooled_gradient_by_vectors_cpp", gradient_by_vectors);
}

}  // namespace kdcmae_fast

// Maximum mean discrepancy and its gradients on the CPU; kernels/alignment/README.md has the
// formulas. Rows of both sets lie in one centred matrix Z. Distances exist tile by tile: a tile is
// one matrix product on one thread, then every kernel of its pairs while they are in the cache. With
// the gradients a row of tiles stays until it has been multiplied with Z.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>
#include <vector>

#include "vector_math.h"

namespace kdcmae_fast {
namespace {

constexpr int64_t kBlock = 256;       // rows and columns of a tile
constexpr int64_t kWidthBlock = 128;  // of the product with Z
constexpr int64_t kColumns = 256;     // centred at a time
constexpr int64_t kMaxGammas = 32;
// A squared distance below this share of the two squared norms is summed up from differences: as a
// difference of products it would have lost more than two digits.
constexpr double kNear = 1.0 / 128;

// Kernels exp(-gamma d2), ascending, as misses: 1 minus the kernel. Each is a power of the one before,
// or has an exponential of its own (power 0).
template <class T>
struct Family {
  int64_t count;
  T gammas[kMaxGammas];
  int64_t powers[kMaxGammas];
};

template <class T>
struct Tile {
  T* products;  // (rows, n) at this stride; with gradients overwritten by them
  int64_t rows, n, stride;
  bool diagonal;  // the tile's columns are its rows
  const T *row_norms, *column_norms;
  const T *row_z, *column_z;  // (rows, width), (n, width)
  int64_t width;
  T coefficient;
};

// 1 - exp(-t) of t >= 0, to about 2 ulp also where it is small.
template <class T>
KDCMAE_INLINE T miss_of(T t) {
  using B = Bits<T>;
  using Int = typename B::Int;
  const T x = t > T(40) ? T(-40) : -t;
  constexpr T kRound = T(3) * T(Int{1} << (B::kMantissa - 1));
  const T shifted = x * T(1.4426950408889634074) + kRound;
  const T n = shifted - kRound;
  const T r = (x - n * B::kLn2High) - n * B::kLn2Low;
  T series = T(1);
  for (int k = B::kExpTerms; k > 1; --k) series = T(1) + series * r * (T(1) / T(k));
  const Int whole = bits_as<Int>(shifted) - bits_as<Int>(kRound);
  const T power = bits_as<T>((whole + B::kBias) << B::kMantissa);
  return (T(1) - power) - power * (series * r);
}

// Misses of kernels to those of their powers. 1 - (1-p)(1-q) = p + q (1-p) adds up positive numbers,
// so that no step loses relative precision, and reaches 1 exactly, which p (2-p) does not.
template <class T>
KDCMAE_INLINE void raise(T* miss, int64_t n, int64_t power) {
  T base[kBlock];
  for (int64_t i = 0; i < n; ++i) base[i] = miss[i];
  for (int64_t i = 0; i < n; ++i) miss[i] = power & 1 ? base[i] : T(0);
  for (power >>= 1; power > 0; power >>= 1) {
    for (int64_t i = 0; i < n; ++i) base[i] += base[i] * (T(1) - base[i]);
    if (power & 1) {
      for (int64_t i = 0; i < n; ++i) miss[i] += base[i] * (T(1) - miss[i]);
    }
  }
}

// Squared distances of row r to the tile's columns from the products.
template <class T>
KDCMAE_INLINE void fill_distances(const Tile<T>& tile, int64_t r, T* distance) {
  const int64_t n = tile.n;
  const T* products = tile.products + r * tile.stride;
  const T norm = tile.row_norms[r];
  const T* norms = tile.column_norms;
  for (int64_t i = 0; i < n; ++i) {
    const T d = norm + norms[i] - T(2) * products[i];
    distance[i] = d < T(0) ? T(0) : d;
  }
  if (tile.diagonal) distance[r] = 0;
  const T near = sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA {
    return distance[i] < T(kNear) * (norm + norms[i]) ? T(1) : T(0);
  });
  if (near <= T(tile.diagonal)) return;  // none but the row itself
  const T* z = tile.row_z + r * tile.width;
  for (int64_t i = 0; i < n; ++i) {
    if (distance[i] >= T(kNear) * (norm + norms[i])) continue;
    const T* other = tile.column_z + i * tile.width;
    distance[i] = sum_over<T>(tile.width, [=](int64_t k) KDCMAE_LAMBDA {
      return (z[k] - other[k]) * (z[k] - other[k]);
    });
  }
}

// Sum of the misses of all pairs of a tile, times its coefficient. With gradients: the products
// become coefficient * (sum over kernels of gamma * kernel), and row_sum and column_sum theirs,
// column_sum added to what it holds.
template <class T>
KDCMAE_INLINE double tile_pass(const Tile<T>& tile, const Family<T>& family, bool gradients,
                               T* row_sum, T* column_sum) {
  const int64_t n = tile.n;
  T distance[kBlock], miss[kBlock], total[kBlock], weight[kBlock];
  double sum = 0;
  for (int64_t r = 0; r < tile.rows; ++r) {
    fill_distances(tile, r, distance);
    for (int64_t i = 0; i < n; ++i) total[i] = weight[i] = 0;
    for (int64_t k = 0; k < family.count; ++k) {
      const T gamma = family.gammas[k];
      if (family.powers[k] == 0) {
        for (int64_t i = 0; i < n; ++i) miss[i] = miss_of(gamma * distance[i]);
      } else {
        raise(miss, n, family.powers[k]);
      }
      for (int64_t i = 0; i < n; ++i) total[i] += miss[i];
      if (gradients) {
        for (int64_t i = 0; i < n; ++i) weight[i] += gamma * (T(1) - miss[i]);
      }
    }
    const T* misses = total;
    sum += sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA { return misses[i]; });
    if (!gradients) continue;
    T* out = tile.products + r * tile.stride;
    for (int64_t i = 0; i < n; ++i) {
      // Equal rows do not move each other; their large weights would cancel, but for rounding.
      out[i] = distance[i] == T(0) ? T(0) : tile.coefficient * weight[i];
      column_sum[i] += out[i];
    }
    row_sum[r] = sum_over<T>(n, [=](int64_t i) KDCMAE_LAMBDA { return out[i]; });
  }
  return sum * double(tile.coefficient);
}

template <class T>
KDCMAE_INLINE void square_rows(const T* z, int64_t begin, int64_t end, int64_t width, T* norms) {
  for (int64_t r = begin; r < end; ++r) {
    const T* row = z + r * width;
    norms[r] = sum_over<T>(width, [=](int64_t i) KDCMAE_LAMBDA { return row[i] * row[i]; });
  }
}

// Subtracts the rows' mean from columns first ... first + n of z (rows, width).
template <class T>
KDCMAE_INLINE void centre_columns(T* z, int64_t rows, int64_t width, int64_t first, int64_t n) {
  T mean[kColumns] = {};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) mean[i] += z[r * width + first + i];
  }
  for (int64_t i = 0; i < n; ++i) mean[i] /= T(rows);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) z[r * width + first + i] -= mean[i];
  }
}

// Clones cannot be templates.
#define KDCMAE_PASSES(T)                                                                         \
  KDCMAE_CLONES double tile_clone(const Tile<T>& tile, const Family<T>& family, bool gradients,  \
                                  T* row_sum, T* column_sum) {                                   \
    return tile_pass(tile, family, gradients, row_sum, column_sum);                              \
  }                                                                                              \
  KDCMAE_CLONES void norm_clone(const T* z, int64_t begin, int64_t end, int64_t width, T* out) { \
    square_rows(z, begin, end, width, out);                                                      \
  }                                                                                              \
  KDCMAE_CLONES void centre_clone(T* z, int64_t rows, int64_t width, int64_t first, int64_t n) { \
    centre_columns(z, rows, width, first, n);                                                    \
  }
KDCMAE_PASSES(float)
KDCMAE_PASSES(double)
#undef KDCMAE_PASSES

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// f(first, last) over pieces of begin ... end, each on one thread. A single item runs in the caller's
// place, where a matrix product would take all threads and round differently: hence one more, empty.
template <class F>
void on_single_threads(int64_t begin, int64_t end, const F& f) {
  at::parallel_for(begin, end + 1, 1, [&](int64_t first, int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    f(first, std::min(last, end));
  });
}

// The rows of one block: all of x or all of y.
struct Block {
  int64_t first, rows;
  bool of_y;
};

// One call: the centred rows, their norms, the kernels, the weights of the pairs.
template <class T>
struct Problem {
  at::Tensor z;  // (n, width), rows of x before those of y
  std::vector<T> norms;
  std::vector<Block> blocks;
  Family<T> family;
  double xx, yy, xy, constant = 0;
  int64_t width;

  Problem(const at::Tensor& x, const at::Tensor& y, std::string_view variant,
          at::ArrayRef<double> gammas, at::IntArrayRef powers)
      : width(x.size(1)) {
    const int64_t n = x.size(0), m = y.size(0);
    const double rows = double(n), columns = double(m);
    xx = -1 / (rows * rows), yy = -1 / (columns * columns), xy = 1 / (rows * columns);
    if (variant == "unbiased") {
      xx = -1 / (rows * (rows - 1)), yy = -1 / (columns * (columns - 1));
    } else if (variant == "kdc_tiled") {
      xy = -xy, constant = 4;
    } else {
      TORCH_CHECK_VALUE(variant == "xkd" || variant == "kdc_rbf", "variant=", variant,
                        " is not one of xkd, unbiased, kdc_rbf, kdc_tiled");
    }
    z = at::empty({n + m, width}, x.options().dtype(c10::CppTypeToScalarType<T>::value));
    z.narrow(0, 0, n).copy_(x);
    z.narrow(0, n, m).copy_(y);
    T* data = z.template mutable_data_ptr<T>();
    at::parallel_for(0, ceil_div(width, kColumns), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t first = k * kColumns, size = std::min(kColumns, width - first);
        centre_clone(data, n + m, width, first, size);
      }
    });
    norms.resize(n + m);
    at::parallel_for(0, n + m, std::max<int64_t>(1, 16384 / width), [&](int64_t begin, int64_t end) {
      norm_clone(data, begin, end, width, norms.data());
    });
    fill_family(variant, gammas, powers);
    for (const bool of_y : {false, true}) {
      const int64_t first = of_y ? n : 0, count = of_y ? m : n;
      for (int64_t start = 0; start < count; start += kBlock) {
        blocks.push_back({first + start, std::min(kBlock, count - start), of_y});
      }
    }
  }

  void fill_family(std::string_view variant, at::ArrayRef<double> gammas, at::IntArrayRef powers) {
    double scale = 1;
    if (variant == "kdc_tiled") {
      scale = 1 / (double(width) * double(width));
    } else if (variant == "kdc_rbf") {
      double spread = 0;
      for (const T norm : norms) spread += norm;
      scale = spread == 0 ? 0 : double(norms.size() - 1) / (2 * spread);
    }
    family.count = gammas.size();
    for (size_t k = 0; k < gammas.size(); ++k) family.gammas[k] = T(scale * gammas[k]);
    std::copy(powers.begin(), powers.end(), family.powers);
  }

  at::Tensor rows_of(const Block& block) const { return z.narrow(0, block.first, block.rows); }

  // Products of two blocks into `out`, and what the pass over them needs.
  Tile<T> multiply(const Block& rows, const Block& columns, at::Tensor& out) const {
    at::mm_out(out, rows_of(rows), rows_of(columns).t());
    const T* data = z.template const_data_ptr<T>();
    const double weight = rows.of_y == columns.of_y ? (rows.of_y ? yy : xx) : xy;
    return {out.mutable_data_ptr<T>(), rows.rows, columns.rows, out.stride(0),
            rows.first == columns.first, norms.data() + rows.first, norms.data() + columns.first,
            data + rows.first * width, data + columns.first * width, width, T(weight)};
  }
};

template <class T>
double loss_in(const Problem<T>& problem) {
  const size_t count = problem.blocks.size();
  std::vector<std::pair<size_t, size_t>> pairs;
  for (size_t i = 0; i < count; ++i) {
    for (size_t j = i; j < count; ++j) pairs.emplace_back(i, j);
  }
  std::vector<double> sums(pairs.size());
  on_single_threads(0, pairs.size(), [&](int64_t begin, int64_t end) {
    at::Tensor buffer = at::empty({kBlock, kBlock}, problem.z.options());
    for (int64_t p = begin; p < end; ++p) {
      const auto [i, j] = pairs[p];
      const Block &rows = problem.blocks[i], &columns = problem.blocks[j];
      at::Tensor out = buffer.narrow(0, 0, rows.rows).narrow(1, 0, columns.rows);
      const auto tile = problem.multiply(rows, columns, out);
      // A pair of different blocks stands for both orders of its rows.
      sums[p] = (i == j ? 1 : 2) * tile_clone(tile, problem.family, false, nullptr, nullptr);
    }
  });
  double loss = problem.constant;
  for (const double sum : sums) loss += sum;
  return loss;
}

// Loss, and the gradients by the rows of Z: 4 (row sums * Z - C Z) with C the tiles' weights.
template <class T>
double loss_and_grads_in(const Problem<T>& problem, bool need_x, bool need_y, at::Tensor& grads) {
  const auto& blocks = problem.blocks;
  const int64_t count = blocks.size(), n = problem.z.size(0), width = problem.width;
  const auto needed = [&](const Block& block) { return block.of_y ? need_y : need_x; };
  at::Tensor workspace = at::empty({std::min(n, kBlock), n}, problem.z.options());
  at::Tensor totals = at::zeros({n}, problem.z.options());
  T* total = totals.mutable_data_ptr<T>();
  std::vector<T> row_sums(count * kBlock);
  std::vector<double> sums(count);
  double loss = problem.constant;
  for (int64_t i = 0; i < count; ++i) {
    const Block& rows = blocks[i];
    const at::Tensor weights = workspace.narrow(0, 0, rows.rows), own = problem.rows_of(rows);
    on_single_threads(i, count, [&](int64_t begin, int64_t end) {
      T unused[kBlock] = {};
      for (int64_t j = begin; j < end; ++j) {
        const Block& columns = blocks[j];
        at::Tensor out = weights.narrow(1, columns.first, columns.rows);
        const auto tile = problem.multiply(rows, columns, out);
        const bool gradients = needed(rows) || needed(columns);
        T* column_sum = j > i ? total + columns.first : unused;
        sums[j] = (i == j ? 1 : 2) *
                  tile_clone(tile, problem.family, gradients, &row_sums[j * kBlock], column_sum);
        if (j > i && needed(columns)) {
          grads.narrow(0, columns.first, columns.rows).addmm_(out.t(), own, 1, -1);
        }
      }
    });
    for (int64_t j = i; j < count; ++j) loss += sums[j];
    if (!needed(rows)) continue;
    for (int64_t j = i; j < count; ++j) {
      for (int64_t r = 0; r < rows.rows; ++r) total[rows.first + r] += row_sums[j * kBlock + r];
    }
    on_single_threads(0, ceil_div(width, kWidthBlock), [&](int64_t begin, int64_t end) {
      const at::Tensor onto = grads.narrow(0, rows.first, rows.rows);
      for (int64_t k = begin; k < end; ++k) {
        const int64_t first = k * kWidthBlock, size = std::min(kWidthBlock, width - first);
        at::Tensor out = onto.narrow(1, first, size);
        // One product over all columns would depend on the number of threads in its last bits.
        for (int64_t j = i; j < count; ++j) {
          const at::Tensor others = problem.rows_of(blocks[j]).narrow(1, first, size);
          out.addmm_(weights.narrow(1, blocks[j].first, blocks[j].rows), others, 1, -1);
        }
      }
    });
  }
  grads.addcmul_(problem.z, totals.unsqueeze(1)).mul_(4);
  return loss;
}

at::ScalarType check(const at::Tensor& x, const at::Tensor& y, at::ArrayRef<double> gammas,
                     at::IntArrayRef powers) {
  TORCH_CHECK_VALUE(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1) && x.numel() > 0 &&
                        y.numel() > 0,
                    "x and y must be (N, D) and (M, D), not empty, got ", x.sizes(), " and ",
                    y.sizes());
  TORCH_CHECK_VALUE(gammas.size() == powers.size() && int64_t(gammas.size()) <= kMaxGammas &&
                        !powers.empty() && powers[0] == 0,
                    "gammas and powers must be equally many, 1 to ", kMaxGammas);
  return x.scalar_type() == at::kDouble || y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor loss(const at::Tensor& x, const at::Tensor& y, std::string_view variant,
                at::ArrayRef<double> gammas, at::IntArrayRef powers) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  at::Tensor out;
  const auto type = check(x, y, gammas, powers);
  AT_DISPATCH_FLOATING_TYPES(type, "mmd", [&] {
    const Problem<scalar_t> problem(x, y, variant, gammas, powers);
    out = at::scalar_tensor(loss_in(problem), x.options().dtype(type));
  });
  return out;
}

// Loss, and the gradients by x and y in the type of the computation; (0, D) where not needed.
std::tuple<at::Tensor, at::Tensor, at::Tensor> loss_and_grads(
    const at::Tensor& x, const at::Tensor& y, std::string_view variant, at::ArrayRef<double> gammas,
    at::IntArrayRef powers, bool need_x, bool need_y) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto type = check(x, y, gammas, powers);
  at::Tensor out, by_x, by_y;
  AT_DISPATCH_FLOATING_TYPES(type, "mmd_grads", [&] {
    const Problem<scalar_t> problem(x, y, variant, gammas, powers);
    at::Tensor grads = at::zeros_like(problem.z);
    const double value = loss_and_grads_in(problem, need_x, need_y, grads);
    out = at::scalar_tensor(value, x.options().dtype(type));
    by_x = grads.narrow(0, 0, need_x ? x.size(0) : 0).clone();
    by_y = grads.narrow(0, x.size(0), need_y ? y.size(0) : 0).clone();
  });
  return {out, by_x, by_y};
}

}  // namespace

// The schemas are defined in kernels/alignment/op.py, beside the other implementations.
TORCH_LIBRARY_IMPL(kdcmae_fast, CPU, m) {
  m.impl("mmd_cpp", loss);
  m.impl("mmd_grads_cpp", loss_and_grads);
}

}  // namespace kdcmae_fast

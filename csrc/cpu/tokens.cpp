// Moving tokens on the CPU: gathering rows and patches, assembling decoder sequences.
//
// Every output row is written once by one thread, sums run in an order that does not depend on the
// number of threads. Plans (int16) are read as they are; no index is built.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "patches.h"
#include "vector_math.h"

namespace kdcmae_fast {
namespace {

constexpr int64_t kGrainBytes = 1 << 15;
constexpr int64_t kBlock = 8;  // positions that one task sums over the batch

int64_t grain(int64_t row_bytes) {
  return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes));
}

at::Tensor dense_rows(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous();
}

// x (B, L, D) of any strides between rows -> (K*B, keep, D).
at::Tensor gather_tokens(const at::Tensor& x_in, const at::Tensor& token_of_rank, int64_t len_keep,
                         int64_t num_views) {
  TORCH_CHECK_VALUE(x_in.dim() == 3, "x must be (B, L, D), got ", x_in.sizes());
  const int64_t batch = x_in.size(0), tokens = x_in.size(1), dim = x_in.size(2);
  check_order(token_of_rank, batch, tokens);
  check_views(tokens, len_keep, num_views);
  const at::Tensor x = dense_rows(x_in), order = token_of_rank.contiguous();
  at::Tensor out = at::empty({num_views * batch, len_keep, dim}, x.options());
  const int64_t size = x.element_size(), bytes = dim * size;
  const int64_t sample_stride = x.stride(0) * size, token_stride = x.stride(1) * size;
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int16_t* plan = order.const_data_ptr<int16_t>();
  at::parallel_for(0, num_views * batch * len_keep, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / len_keep, slot = i % len_keep, view = row / batch, b = row % batch;
      const int64_t token = plan[b * tokens + view * len_keep + slot];
      std::memcpy(to + i * bytes, from + b * sample_stride + token * token_stride, bytes);
    }
  });
  return out;
}

// grad (K*B, keep, D) -> (B, L, D), zero where no view keeps a token.
at::Tensor gather_tokens_backward(const at::Tensor& grad_in, const at::Tensor& token_of_rank,
                                  int64_t len_keep, int64_t num_views) {
  const int64_t batch = token_of_rank.size(0), tokens = token_of_rank.size(1);
  TORCH_CHECK_VALUE(grad_in.dim() == 3 && grad_in.size(0) == num_views * batch &&
                        grad_in.size(1) == len_keep, "grad has shape ", grad_in.sizes());
  check_order(token_of_rank, batch, tokens);
  check_views(tokens, len_keep, num_views);
  const at::Tensor grad = grad_in.contiguous(), order = token_of_rank.contiguous();
  const int64_t dim = grad.size(2), bytes = dim * grad.element_size();
  at::Tensor dx = at::empty({batch, tokens, dim}, grad.options());
  const char* from = static_cast<const char*>(grad.const_data_ptr());
  char* to = static_cast<char*>(dx.mutable_data_ptr());
  const int16_t* plan = order.const_data_ptr<int16_t>();
  at::parallel_for(0, batch * tokens, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tokens, rank = i % tokens;
      char* row = to + (b * tokens + plan[i]) * bytes;
      if (rank < num_views * len_keep) {
        const int64_t view = rank / len_keep, slot = rank % len_keep;
        std::memcpy(row, from + ((view * batch + b) * len_keep + slot) * bytes, bytes);
      } else {
        std::memset(row, 0, bytes);
      }
    }
  });
  return dx;
}

// Patches side by side, read line by line: memory sees long sequential reads.
template <class From, class To, class Run>
void copy_group(const Patches& p, const std::vector<const From*>& from, const Wide<To>* scale,
                const Wide<To>* shift, const std::vector<To*>& to, Run run) {
  const int64_t runs = int64_t(p.runs.size()), per_channel = runs / p.channels;
  for (int64_t r = 0; r < runs; ++r) {
    const Wide<To> a = scale[r / per_channel], b = shift[r / per_channel];
    for (size_t j = 0; j < from.size(); ++j) {
      const From* source = from[j] + p.runs[r];
      To* target = to[j] + r * run;
      if constexpr (std::is_same_v<From, uint8_t>) {
        for (int64_t i = 0; i < run; ++i) target[i] = static_cast<To>(Wide<To>(source[i]) * a - b);
      } else {
        convert(source, run, target);
      }
    }
  }
}

// Groups [begin, end) of all samples; plan is token_of_rank.
template <class From, class To>
void copy_groups(const Patches& p, const int16_t* plan, int64_t len_keep, int64_t num_views,
                 const From* from, const Wide<To>* scale, const Wide<To>* shift, To* to,
                 int64_t begin, int64_t end) {
  const int64_t groups = p.tokens / p.width;
  std::vector<int64_t> row_of(p.tokens);
  std::vector<const From*> sources;
  std::vector<To*> targets;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / groups, first = p.group(i % groups);
    if (i == begin || i % groups == 0) {
      std::fill(row_of.begin(), row_of.end(), -1);
      for (int64_t rank = 0; rank < num_views * len_keep; ++rank) {
        const int64_t view = rank / len_keep, slot = rank % len_keep;
        row_of[plan[b * p.tokens + rank]] = (view * p.batch + b) * len_keep + slot;
      }
    }
    sources.clear();
    targets.clear();
    for (int64_t token = first; token < first + p.width * p.step; token += p.step) {
      if (row_of[token] < 0) continue;
      sources.push_back(from + b * p.sample + p.first[token]);
      targets.push_back(to + row_of[token] * p.values);
    }
    if (p.run == 16) {
      copy_group(p, sources, scale, shift, targets, std::integral_constant<int64_t, 16>{});
    } else {
      copy_group(p, sources, scale, shift, targets, p.run);
    }
  }
}

// The visible patches in memory order, (K*B*keep, P), of the given dtype.
at::Tensor visible_patches(const at::Tensor& pixels_in, const std::optional<at::Tensor>& mean,
                           const std::optional<at::Tensor>& std, const at::Tensor& token_of_rank,
                           int64_t len_keep, int64_t num_views, at::IntArrayRef patch,
                           at::ScalarType dtype) {
  const at::Tensor pixels = pixels_in.contiguous(), order = token_of_rank.contiguous();
  const Patches p(pixels, patch);
  check_order(token_of_rank, p.batch, p.tokens);
  check_views(p.tokens, len_keep, num_views);
  const Normalization n = normalization(pixels, p.channels, mean, std);
  const int64_t rows = num_views * p.batch * len_keep;
  at::Tensor out = at::empty({rows, p.values}, pixels.options().dtype(dtype));
  const int16_t* plan = order.const_data_ptr<int16_t>();
  const auto fill = [&](auto from_type, auto to_type) {
    using From = decltype(from_type);
    using To = decltype(to_type);
    std::vector<Wide<To>> scale(p.channels), shift(p.channels);
    for (int64_t c = 0; n.scale.defined() && c < p.channels; ++c) {
      scale[c] = Wide<To>(n.scale.const_data_ptr<double>()[c]);
      shift[c] = Wide<To>(n.shift.const_data_ptr<double>()[c]);
    }
    const From* from = pixels.const_data_ptr<From>();
    To* to = out.mutable_data_ptr<To>();
    const int64_t groups = p.tokens / p.width;
    at::parallel_for(0, p.batch * groups, 4, [&](int64_t begin, int64_t end) {
      copy_groups(p, plan, len_keep, num_views, from, scale.data(), shift.data(), to, begin, end);
    });
  };
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "visible_patches", [&] {
    using To = scalar_t;
    if (pixels.scalar_type() == at::kByte) {
      fill(uint8_t{}, To{});
    } else {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, pixels.scalar_type(),
                                      "visible_patches", [&] { fill(scalar_t{}, To{}); });
    }
  });
  return out;
}

// One decoder sequence of several segments: where the visible token of a place comes from.
struct Sequence {
  std::vector<at::Tensor> plans;
  std::vector<const int16_t*> ranks;          // per segment, rank_of_token (B, L)
  std::vector<int64_t> lengths, keeps, starts, slots;  // slots: first visible token of a segment
  std::vector<int32_t> segment;               // per place
  int64_t batch = 0, views = 1, length = 0, visible = 0;
  bool released = false;

  Sequence(at::TensorList rank_of_token, at::IntArrayRef len_keep, int64_t num_views, bool rel)
      : keeps(len_keep.vec()), views(num_views), released(rel) {
    TORCH_CHECK_VALUE(!rank_of_token.empty() && rank_of_token.size() == len_keep.size(),
                      "one plan and one len_keep per segment are needed");
    for (size_t s = 0; s < keeps.size(); ++s) {
      const at::Tensor& plan = rank_of_token[s];
      if (s == 0) batch = plan.size(0);
      check_order(plan, batch, plan.size(1));
      check_views(plan.size(1), keeps[s], views);
      plans.push_back(plan.contiguous());
      ranks.push_back(plans.back().const_data_ptr<int16_t>());
      lengths.push_back(plan.size(1));
      starts.push_back(length);
      slots.push_back(visible);
      segment.insert(segment.end(), lengths[s], int32_t(s));
      length += lengths[s];
      visible += keeps[s];
    }
  }

  // The visible token of `row` (view-major) that belongs to `place`, or -1 for a mask token.
  int64_t slot(int64_t row, int64_t place) const {
    const int32_t s = segment[place];
    const int64_t view = released ? 0 : row / batch, b = row % batch;
    int64_t rank = ranks[s][b * lengths[s] + place - starts[s]] - view * keeps[s];
    if (rank < 0) rank += lengths[s];
    return rank < keeps[s] ? slots[s] + rank : -1;
  }
};

template <class T>
KDCMAE_INLINE void add_row(const T* x, const Wide<T>* pos, int64_t dim, T* y) {
  for (int64_t i = 0; i < dim; ++i) y[i] = static_cast<T>(Wide<T>(x[i]) + pos[i]);
}

template <class T>
void assemble_rows(const Sequence& s, const at::Tensor& x, const at::Tensor& pos,
                   const at::Tensor& filler, at::Tensor& y) {
  const int64_t dim = y.size(2), bytes = dim * int64_t(sizeof(T));
  const int64_t row_stride = x.stride(0), token_stride = x.stride(1);
  const T* from = x.const_data_ptr<T>();
  const T* masked = filler.const_data_ptr<T>();
  const Wide<T>* positions = pos.const_data_ptr<Wide<T>>();
  T* to = y.mutable_data_ptr<T>();
  at::parallel_for(0, y.size(0) * s.length, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / s.length, place = i % s.length, slot = s.slot(row, place);
      if (slot < 0) {
        std::memcpy(to + i * dim, masked + place * dim, bytes);
      } else {
        add_row(from + row * row_stride + slot * token_stride, positions + place * dim, dim,
                to + i * dim);
      }
    }
  });
}

// x (K*B, sum of keeps, D); pos (L, D) in float32, or float64 for float64 x; filler (L, D) like x:
// the mask token with positions. Returns (K*B, L, D).
at::Tensor assemble(const at::Tensor& x_in, const at::Tensor& pos, const at::Tensor& filler,
                    at::TensorList rank_of_token, at::IntArrayRef len_keep, int64_t num_views,
                    bool released) {
  const Sequence s(rank_of_token, len_keep, num_views, released);
  TORCH_CHECK_VALUE(x_in.dim() == 3 && x_in.size(0) == s.views * s.batch &&
                        x_in.size(1) == s.visible, "x has shape ", x_in.sizes());
  const at::Tensor x = dense_rows(x_in);
  const at::ScalarType wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const std::vector<int64_t> table{s.length, x.size(2)};
  TORCH_CHECK_VALUE(pos.sizes() == table && pos.scalar_type() == wide, "pos has shape ",
                    pos.sizes(), " and dtype ", pos.scalar_type());
  TORCH_CHECK_VALUE(filler.sizes() == table && filler.scalar_type() == x.scalar_type(),
                    "filler has shape ", filler.sizes(), " and dtype ", filler.scalar_type());
  at::Tensor y = at::empty({x.size(0), s.length, x.size(2)}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "assemble", [&] {
    assemble_rows<scalar_t>(s, x, pos.contiguous(), filler.contiguous(), y);
  });
  return y;
}

// sum[i] += row[i]
template <class T>
KDCMAE_INLINE void accumulate(const T* row, int64_t dim, Wide<T>* sum) {
  for (int64_t i = 0; i < dim; ++i) sum[i] += Wide<T>(row[i]);
}

// total += recent, recent = 0
template <class W>
KDCMAE_INLINE void join(std::vector<W>& recent, int64_t count, W* total) {
  accumulate(recent.data(), count, total);
  std::fill_n(recent.begin(), count, W(0));
}

// Rows are summed some at a time, then these sums: thousands of rows one after the other would cost
// a digit in float32.
template <class T>
void split_gradient(const Sequence& s, const at::Tensor& grad, at::Tensor& dx, at::Tensor& dmask,
                    at::Tensor* dpos) {
  using W = Wide<T>;
  const int64_t rows = grad.size(0), dim = grad.size(2), bytes = dim * int64_t(sizeof(T));
  const int64_t some = std::max<int64_t>(32, std::ceil(std::sqrt(double(rows))));
  const int64_t blocks = (s.length + kBlock - 1) / kBlock;
  at::Tensor partial = at::zeros({blocks, dim}, dmask.options());
  const T* from = grad.const_data_ptr<T>();
  T* visible = dx.mutable_data_ptr<T>();
  W* partials = partial.mutable_data_ptr<W>();
  W* positions = dpos == nullptr ? nullptr : dpos->mutable_data_ptr<W>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<W> masked(dim), places(positions == nullptr ? 0 : kBlock * dim);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, last = std::min(s.length, first + kBlock);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t place = first; place < last; ++place) {
          const T* g = from + (row * s.length + place) * dim;
          const int64_t slot = s.slot(row, place);
          if (slot >= 0) std::memcpy(visible + (row * s.visible + slot) * dim, g, bytes);
          if (slot < 0) accumulate(g, dim, masked.data());
          if (positions != nullptr) accumulate(g, dim, places.data() + (place - first) * dim);
        }
        if ((row + 1) % some != 0 && row + 1 != rows) continue;
        join(masked, dim, partials + block * dim);
        if (positions != nullptr) join(places, (last - first) * dim, positions + first * dim);
      }
    }
  });
  W* total = dmask.mutable_data_ptr<W>();
  for (int64_t block = 0; block < blocks; ++block) accumulate(partials + block * dim, dim, total);
}

at::Tensor wide_zeros(at::IntArrayRef shape, const at::Tensor& like) {
  const bool wide = like.scalar_type() == at::kDouble;
  return at::zeros(shape, like.options().dtype(wide ? at::kDouble : at::kFloat));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> split(const at::Tensor& grad_in, const Sequence& s,
                                                     bool sum_positions) {
  TORCH_CHECK_VALUE(grad_in.dim() == 3 && grad_in.size(0) == s.views * s.batch &&
                        grad_in.size(1) == s.length, "grad has shape ", grad_in.sizes());
  const at::Tensor grad = grad_in.contiguous();
  const int64_t dim = grad.size(2);
  at::Tensor dx = at::empty({grad.size(0), s.visible, dim}, grad.options());
  at::Tensor dmask = wide_zeros({dim}, grad), dpos;
  if (sum_positions) dpos = wide_zeros({s.length, dim}, grad);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "split", [&] {
    split_gradient<scalar_t>(s, grad, dx, dmask, sum_positions ? &dpos : nullptr);
  });
  return {dx, dmask, dpos};
}

// grad (K*B, L, D) -> dx (K*B, sum of keeps, D), dmask (D,) in float32 (float64 for float64).
std::tuple<at::Tensor, at::Tensor> assemble_backward(const at::Tensor& grad,
                                                     at::TensorList rank_of_token,
                                                     at::IntArrayRef len_keep, int64_t num_views,
                                                     bool released) {
  auto [dx, dmask, dpos] = split(grad, {rank_of_token, len_keep, num_views, released}, false);
  return {dx, dmask};
}

// And dpos (L, D), the sum over rows.
std::tuple<at::Tensor, at::Tensor, at::Tensor> assemble_backward_pos(
    const at::Tensor& grad, at::TensorList rank_of_token, at::IntArrayRef len_keep,
    int64_t num_views, bool released) {
  return split(grad, {rank_of_token, len_keep, num_views, released}, true);
}

}  // namespace

// The schemas are defined in kernels/tokens/library.py, beside the other implementations.
TORCH_LIBRARY_IMPL(kdcmae_fast, CPU, m) {
  m.impl("gather_rows_cpp", gather_tokens);
  m.impl("gather_rows_backward_cpp", gather_tokens_backward);
  m.impl("visible_patches_cpp", visible_patches);
  m.impl("assemble_cpp", assemble);
  m.impl("assemble_backward_cpp", assemble_backward);
  m.impl("assemble_backward_pos_cpp", assemble_backward_pos);
}

}  // namespace kdcmae_fast

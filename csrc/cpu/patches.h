// Patches of a batch of pixels as offsets into its contiguous memory, for the layouts of
// kernels/tokens/patches.py: audio (B, T, F), image (B, C, H, W), video (B, C, T, H, W).
#pragma once

#include <ATen/ATen.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace kdcmae_fast {

// uint8 pixels become value * scale - shift, with one pair per channel.
struct Normalization {
  at::Tensor scale, shift;  // (C,) float64, undefined for floating pixels
};

struct Patches {
  int64_t batch = 0, tokens = 1, values = 1, channels = 1;
  int64_t sample = 0;             // values per sample
  int64_t run = 0;                // neighbouring values of a patch that are neighbours in memory
  int64_t width = 0, step = 0;    // patches side by side in memory: how many, and their tokens
  std::vector<int64_t> first;     // per token: its first value
  std::vector<int64_t> runs;      // per run of a patch, in memory order: offset from `first`
  std::vector<int32_t> target;    // per value in target order: its place in memory order
  bool audio = false;

  // pixels: contiguous. patch: in the order of the grid, audio (pF, pT).
  Patches(const at::Tensor& pixels, at::IntArrayRef patch) {
    const int64_t ndim = pixels.dim();
    TORCH_CHECK_VALUE(ndim >= 3 && ndim <= 5, "pixels have ", ndim, " axes, not 3, 4 or 5");
    audio = ndim == 3;
    batch = pixels.size(0);
    channels = audio ? 1 : pixels.size(1);
    // Sides and patch in memory order, without the channels.
    std::vector<int64_t> sides = pixels.sizes().slice(audio ? 1 : 2).vec(), extents = patch.vec();
    TORCH_CHECK_VALUE(extents.size() == sides.size(), "patch_size has ", extents.size(), " axes");
    if (audio) std::swap(extents[0], extents[1]);
    const size_t axes = sides.size();
    std::vector<int64_t> grid(axes), strides(axes, 1);
    int64_t area = 1;
    for (size_t axis = axes; axis-- > 0;) {
      TORCH_CHECK_VALUE(extents[axis] > 0 && sides[axis] % extents[axis] == 0, "patch_size ",
                        extents[axis], " does not divide ", sides[axis]);
      strides[axis] = area;
      area *= sides[axis];
      grid[axis] = sides[axis] / extents[axis];
      tokens *= grid[axis];
      values *= extents[axis];
    }
    const int64_t plane = values;
    values *= channels;
    sample = channels * area;
    run = extents[axes - 1];
    width = grid[axes - 1];
    step = audio ? grid[0] : 1;
    for (int64_t token = 0; token < tokens; ++token) {
      int64_t left = token, place = 0;
      for (size_t i = 0; i < axes; ++i) {  // fastest coordinate of a token first
        const size_t axis = audio ? i : axes - 1 - i;
        place += left % grid[axis] * extents[axis] * strides[axis];
        left /= grid[axis];
      }
      first.push_back(place);
    }
    for (int64_t value = 0; value < values; value += run) {
      int64_t left = value % plane, place = value / plane * area;
      for (size_t axis = axes; axis-- > 0;) {
        place += left % extents[axis] * strides[axis];
        left /= extents[axis];
      }
      runs.push_back(place);
    }
    for (int64_t value = 0; value < values; ++value) {
      const int64_t rows = extents[0];
      target.push_back(int32_t(audio ? value % rows * run + value / rows
                                     : value % channels * plane + value / channels));
    }
  }

  // The n-th token when neighbours in memory follow each other.
  int64_t in_memory_order(int64_t n) const { return group(n / width) + n % width * step; }

  // The first token of the n-th group of `width` patches, whose tokens are `step` apart.
  int64_t group(int64_t n) const { return audio ? n : n * width; }
};

// The statistics of uint8 pixels (mean and std per channel) as a scale and a shift.
inline Normalization normalization(const at::Tensor& pixels, int64_t channels,
                                   const std::optional<at::Tensor>& mean,
                                   const std::optional<at::Tensor>& std) {
  if (pixels.scalar_type() != at::kByte) return {};
  TORCH_CHECK_VALUE(mean && std && mean->numel() == channels && std->numel() == channels,
                    "uint8 pixels need one mean and one std for each of ", channels, " channels");
  const at::Tensor m = mean->to(at::kDouble), s = std->to(at::kDouble);
  return {s.mul(255).reciprocal().contiguous(), m.div(s).contiguous()};
}

// Raise unless `order` is (batch, tokens) int16 with values that may be used as indices.
inline void check_order(const at::Tensor& order, int64_t batch, int64_t tokens) {
  TORCH_CHECK_VALUE(order.dim() == 2 && order.size(0) == batch && order.size(1) == tokens &&
                        order.scalar_type() == at::kShort,
                    "a plan must be (", batch, ", ", tokens, ") int16, got ", order.sizes());
  const at::Tensor plain = order.contiguous();
  const int16_t* values = plain.const_data_ptr<int16_t>();
  int16_t low = 0, high = 0;
  for (int64_t i = 0; i < plain.numel(); ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  TORCH_CHECK_VALUE(low >= 0 && (high < tokens || plain.numel() == 0), "a plan names token ",
                    low < 0 ? low : high, " of ", tokens);
}

inline void check_views(int64_t tokens, int64_t len_keep, int64_t num_views) {
  TORCH_CHECK_VALUE(len_keep >= 0 && num_views > 0 && len_keep * num_views <= tokens, num_views,
                    " views of ", len_keep, " tokens do not fit into ", tokens);
}

// The type to compute in for values of type T.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
inline __attribute__((always_inline)) void convert(const From* from, int64_t count, To* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

}  // namespace kdcmae_fast

// Mask plans on the CPU, bit-equal to kernels/masking/reference.py; kernels/masking/README.md has
// the contract (mask_rng version 1). One thread takes whole samples.
//
// Random words are uniform, so of four buckets per token few hold two keys: scatter by the top bits,
// then one insertion pass over nearly sorted keys. O(L) expected, where a comparison sort mispredicts
// a branch per step. Classes of the structured modes are applied afterwards by a stable counting
// sort.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "philox.h"

namespace kdcmae_fast {
namespace {

enum Mode { kUnstructured, kTime, kFreq, kTimeFreq, kTube, kBlock, kNumModes };
enum Domain : uint32_t { kTokens, kColumns, kRows, kTubes, kRectangles };
constexpr int kNumRectangles = 4;
constexpr int64_t kMaxTokens = 32767;

struct Spec {
  uint64_t seed;
  uint32_t step;
  uint32_t stream;
  int64_t mode;
  std::vector<int64_t> grid;
  std::vector<int64_t> sizes;
  int64_t tokens = 1;
};

// Scratch of one thread, sized for the whole grid.
struct Scratch {
  explicit Scratch(int64_t n)
      : words(n + 4 * kPhiloxLanes), keys(n), order(n), sorted(n), classes(n), ranks(n), axis_ranks(n) {}
  std::vector<uint32_t> words;
  std::vector<uint64_t> keys;
  std::vector<int16_t> order, sorted;
  std::vector<int32_t> classes, ranks, axis_ranks;
  std::vector<int32_t> bins;
};

void random_words(const Spec& spec, uint64_t id, Domain domain, int64_t count, uint32_t* out) {
  const uint32_t high = uint32_t(id >> 32) << 16 | uint32_t(spec.mode) << 8 | spec.stream;
  philox4x32(uint32_t(domain) << 24, uint32_t(id), spec.step, high, uint32_t(spec.seed),
             uint32_t(spec.seed >> 32), (count + 3) / 4, out);
}

// order[0..count): indices in ascending order of (words, index).
void sort_words(const uint32_t* words, int64_t count, Scratch& s) {
  // Bits of the bucket number: with four buckets per key few keys share one, and the passes over
  // the buckets cost less than the branches that sorting a shared one mispredicts.
  int bits = 2;
  while (int64_t{1} << bits < 4 * count && bits < 14) ++bits;
  const int shift = 32 - bits;
  s.bins.assign(int64_t{1} << bits, 0);
  int32_t* const next = s.bins.data();  // where the next key of each bucket goes
  uint64_t* const keys = s.keys.data();
  for (int64_t i = 0; i < count; ++i) ++next[words[i] >> shift];
  int32_t begin = 0;
  for (int64_t b = 0; b < int64_t{1} << bits; ++b) {
    const int32_t size = next[b];
    next[b] = begin;
    begin += size;
  }
  for (int64_t i = 0; i < count; ++i) {
    keys[next[words[i] >> shift]++] = uint64_t(words[i]) << 16 | uint64_t(i);
  }
  uint64_t largest = keys[0];
  for (int64_t i = 1; i < count; ++i) {
    const uint64_t key = keys[i];
    if (key >= largest) {
      largest = key;
      continue;
    }
    int64_t j = i;
    for (; j > 0 && keys[j - 1] > key; --j) keys[j] = keys[j - 1];
    keys[j] = key;
  }
  for (int64_t i = 0; i < count; ++i) s.order[i] = int16_t(keys[i] & 0xFFFF);
}

// Random rank of each row, column or tube, in s.axis_ranks.
void rank_axis(const Spec& spec, uint64_t id, Domain domain, int64_t length, Scratch& s) {
  random_words(spec, id, domain, length, s.words.data());
  sort_words(s.words.data(), length, s);
  for (int64_t r = 0; r < length; ++r) s.axis_ranks[s.order[r]] = int32_t(r);
}

void mark_rectangles(const Spec& spec, uint64_t id, Scratch& s) {
  const int64_t height = spec.grid[spec.grid.size() - 2], width = spec.grid.back();
  uint32_t words[4 * kPhiloxLanes];
  random_words(spec, id, kRectangles, 4 * kNumRectangles, words);
  std::fill(s.classes.begin(), s.classes.end(), 0);
  const auto below = [](uint32_t word, int64_t bound) { return int64_t(word) * bound >> 32; };
  for (int r = 0; r < kNumRectangles; ++r) {
    const uint32_t* w = words + 4 * r;
    const int64_t h = spec.sizes[0] + below(w[0], spec.sizes[1] - spec.sizes[0] + 1);
    const int64_t v = spec.sizes[2] + below(w[1], spec.sizes[3] - spec.sizes[2] + 1);
    const int64_t top = below(w[2], height - h + 1), left = below(w[3], width - v + 1);
    for (int64_t y = top; y < top + h; ++y) {
      std::fill_n(s.classes.begin() + y * width + left, v, 1);
    }
  }
  for (int64_t t = height * width; t < spec.tokens; ++t) s.classes[t] = s.classes[t - height * width];
}

// Writes s.classes (lowest is kept first); returns how many classes there are.
int64_t classify(const Spec& spec, uint64_t id, Scratch& s) {
  if (spec.mode == kBlock) {
    mark_rectangles(spec, id, s);
    return 2;
  }
  if (spec.mode == kTube) {
    const int64_t area = spec.grid[1] * spec.grid[2];
    rank_axis(spec, id, kTubes, area, s);
    for (int64_t t = 0; t < spec.tokens; ++t) s.classes[t] = s.axis_ranks[t % area];
    return area;
  }
  const int64_t rows = spec.grid[0], columns = spec.grid[1];
  if (spec.mode == kFreq || spec.mode == kTimeFreq) {
    rank_axis(spec, id, kRows, rows, s);
    for (int64_t t = 0; t < spec.tokens; ++t) s.classes[t] = s.axis_ranks[t / columns];
    if (spec.mode == kFreq) return rows;
  }
  rank_axis(spec, id, kColumns, columns, s);
  if (spec.mode == kTime) {
    for (int64_t t = 0; t < spec.tokens; ++t) s.classes[t] = s.axis_ranks[t % columns];
    return columns;
  }
  for (int64_t t = 0; t < spec.tokens; ++t) {
    const bool row = s.classes[t] >= rows - spec.sizes[0];
    const bool column = s.axis_ranks[t % columns] >= columns - spec.sizes[1];
    s.classes[t] = row ? (column ? 1 : 2) : (column ? 3 : 0);
  }
  return 4;
}

// s.order, sorted by class; equal classes stay in the order they are in.
void sort_classes(int64_t num_classes, int64_t tokens, Scratch& s) {
  s.bins.assign(num_classes + 1, 0);
  for (int64_t t = 0; t < tokens; ++t) ++s.bins[s.classes[t] + 1];
  for (int64_t c = 0; c < num_classes; ++c) s.bins[c + 1] += s.bins[c];
  for (int64_t r = 0; r < tokens; ++r) s.sorted[s.bins[s.classes[s.order[r]]]++] = s.order[r];
  s.order.swap(s.sorted);
}

void write_plan(const Scratch& s, int64_t tokens, int16_t* token_of_rank, int16_t* rank_of_token) {
  for (int64_t r = 0; r < tokens; ++r) {
    token_of_rank[r] = s.order[r];
    rank_of_token[s.order[r]] = int16_t(r);
  }
}

void check_spec(const at::Tensor& ids, const Spec& spec) {
  TORCH_CHECK_VALUE(ids.dim() == 1 && ids.scalar_type() == at::kLong, "sample_ids must be (B,) int64");
  TORCH_CHECK_VALUE(spec.mode >= 0 && spec.mode < kNumModes, "mode ", spec.mode, " is not known");
  TORCH_CHECK_VALUE(spec.tokens > 0 && spec.tokens <= kMaxTokens, "grid has ", spec.tokens, " tokens");
  const size_t axes = spec.grid.size(), sizes = spec.sizes.size();
  const bool block = spec.mode == kBlock, planar = spec.mode >= kTime && spec.mode <= kTimeFreq;
  TORCH_CHECK_VALUE(!planar || axes == 2, "this mode needs a grid of 2 axes, got ", axes);
  TORCH_CHECK_VALUE(spec.mode != kTube || axes == 3, "mode tube needs a grid of 3 axes, got ", axes);
  TORCH_CHECK_VALUE(!block || axes == 2 || axes == 3, "mode block needs 2 or 3 axes, got ", axes);
  TORCH_CHECK_VALUE(sizes == (block ? 4u : spec.mode == kTimeFreq ? 2u : 0u), "sizes has ", sizes);
  for (size_t axis = 0; block && axis < 2; ++axis) {
    const int64_t low = spec.sizes[2 * axis], high = spec.sizes[2 * axis + 1];
    TORCH_CHECK_VALUE(0 < low && low <= high && high <= spec.grid[axes - 2 + axis],
                      "rectangle side ", low, "..", high, " does not fit");
  }
}

std::tuple<at::Tensor, at::Tensor> mask_plan(
    const at::Tensor& sample_ids, const std::optional<at::Tensor>& step_tensor, int64_t seed,
    int64_t step, int64_t stream, int64_t mode, at::IntArrayRef grid, at::IntArrayRef sizes) {
  if (step_tensor) step += step_tensor->item<int64_t>();
  Spec spec{uint64_t(seed), uint32_t(step), uint32_t(stream), mode, grid.vec(), sizes.vec()};
  for (const int64_t axis : grid) spec.tokens *= axis;
  check_spec(sample_ids, spec);
  const int64_t batch = sample_ids.size(0), tokens = spec.tokens;
  const at::Tensor ids = sample_ids.contiguous();
  const auto options = sample_ids.options().dtype(at::kShort);
  at::Tensor token_of_rank = at::empty({batch, tokens}, options);
  at::Tensor rank_of_token = at::empty({batch, tokens}, options);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  int16_t* orders = token_of_rank.mutable_data_ptr<int16_t>();
  int16_t* ranks = rank_of_token.mutable_data_ptr<int16_t>();
  // Tens of microseconds of work per thread: less does not pay for waking a core.
  const int64_t samples = std::max<int64_t>(1, 16384 / tokens);
  at::parallel_for(0, batch, samples, [&](int64_t begin, int64_t end) {
    Scratch s(tokens);
    for (int64_t b = begin; b < end; ++b) {
      const uint64_t sample = uint64_t(id[b]);
      const int64_t classes = mode == kUnstructured ? 1 : classify(spec, sample, s);
      random_words(spec, sample, kTokens, tokens, s.words.data());
      sort_words(s.words.data(), tokens, s);
      if (classes > 1) sort_classes(classes, tokens, s);
      write_plan(s, tokens, orders + b * tokens, ranks + b * tokens);
    }
  });
  return {token_of_rank, rank_of_token};
}

std::tuple<at::Tensor, at::Tensor> rank_noise(const at::Tensor& noise) {
  TORCH_CHECK_VALUE(noise.dim() == 2 && noise.size(1) <= kMaxTokens, "noise must be (B, L), L <= ",
                    kMaxTokens);
  const int64_t batch = noise.size(0), tokens = noise.size(1);
  const auto options = noise.options().dtype(at::kShort);
  at::Tensor token_of_rank = at::empty({batch, tokens}, options);
  at::Tensor rank_of_token = at::empty({batch, tokens}, options);
  const at::Tensor keys = noise.to(at::kDouble).contiguous();  // exact for every floating type
  const double* key = keys.const_data_ptr<double>();
  int16_t* orders = token_of_rank.mutable_data_ptr<int16_t>();
  int16_t* ranks = rank_of_token.mutable_data_ptr<int16_t>();
  const int64_t samples = std::max<int64_t>(1, 4096 / std::max<int64_t>(tokens, 1));
  at::parallel_for(0, batch, samples, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const double* row = key + b * tokens;
      int16_t* order = orders + b * tokens;
      for (int64_t t = 0; t < tokens; ++t) order[t] = int16_t(t);
      std::sort(order, order + tokens, [row](int16_t i, int16_t j) {
        if (row[i] < row[j]) return true;
        if (row[j] < row[i]) return false;
        const bool nan_i = std::isnan(row[i]), nan_j = std::isnan(row[j]);
        return nan_i != nan_j ? nan_j : i < j;
      });
      for (int64_t r = 0; r < tokens; ++r) ranks[b * tokens + order[r]] = int16_t(r);
    }
  });
  return {token_of_rank, rank_of_token};
}

}  // namespace

// The schemas are defined in kernels/masking/op.py, beside the other implementations.
TORCH_LIBRARY_IMPL(kdcmae_fast, CPU, m) {
  m.impl("mask_plan_cpp", mask_plan);
  m.impl("rank_noise_cpp", rank_noise);
}

}  // namespace kdcmae_fast

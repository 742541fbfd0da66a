// Attention of bfloat16 heads on CPUs with units for bfloat16 products; the formulas are in
// kernels/attention/README.md.
//
// One thread takes one head of one sample: forward some queries against all keys at a time,
// backward some keys against some queries, whose scores stay in the L1 cache. Products are of
// bfloat16 operands, sums, softmax and everything else is float. Nothing depends on the number of
// threads. q (B, H, L, d); k, v (B, H, S, d); lse (B, H, L).

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "bf16_products.h"

namespace kdcmae_fast {
namespace {

#ifdef KDCMAE_BF16_UNITS

constexpr int64_t kQueries = 128;  // backward: queries at a time
constexpr float kLog2E = 1.4426950408889634f;

int64_t padded(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

// A tensor (B, H, rows, d) of any strides but the last.
struct Heads {
  explicit Heads(const at::Tensor& x)
      : data(static_cast<Bf16*>(x.data_ptr())), heads(x.size(1)), rows(x.size(2)),
        width(x.size(3)), batch_pitch(x.stride(0)), head_pitch(x.stride(1)), pitch(x.stride(2)) {}

  Bf16* head(int64_t index) const {
    return data + index / heads * batch_pitch + index % heads * head_pitch;
  }

  // One head as rows of `n` values; what is beyond its own stays as it is.
  void read(int64_t index, int64_t n, Bf16* to) const {
    const Bf16* from = head(index);
    for (int64_t row = 0; row < rows; ++row) {
      std::memcpy(to + row * n, from + row * pitch, size_t(width) * sizeof(Bf16));
    }
  }

  // scale * values, `width` of them, into a row of a head.
  KDCMAE_BF16_INLINE void write(int64_t index, int64_t row, float scale,
                                const float* values) const {
    Bf16* to = head(index) + row * pitch;
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < width; i += kLanes32) {
      const int64_t left = width - i;
      const auto mask = __mmask16(left >= kLanes32 ? 0xffff : (1 << left) - 1);
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(values + i), factor);
      _mm256_mask_storeu_epi16(to + i, mask, round_lanes(scaled));
    }
  }

  Bf16* data;
  int64_t heads, rows, width, batch_pitch, head_pitch, pitch;
};

struct Sizes {
  Sizes(const at::Tensor& q, const at::Tensor& k)
      : tasks(q.size(0) * q.size(1)), queries(q.size(2)), keys(k.size(2)),
        all_queries(padded(queries)), all_keys(padded(keys)), n(padded(q.size(3))),
        scale(1.0f / std::sqrt(float(q.size(3)))) {}

  int64_t tasks, queries, keys, all_queries, all_keys, n;
  float scale;
};

struct Forward {
  Sizes size;
  Heads q, k, v, out;
  float* lse;
  bool tiles;
};

// Softmax of a row of scores, not yet divided by its sum, which is returned with the largest score.
KDCMAE_BF16_INLINE std::pair<float, float> exponentials(const float* scores, int64_t keys,
                                                        float scale, Bf16* out) {
  const int64_t whole = keys / kLanes32 * kLanes32;
  const auto rest = __mmask16((1 << (keys - whole)) - 1);
  const __m512 none = _mm512_set1_ps(-INFINITY);
  const auto last = _mm512_mask_loadu_ps(none, rest, scores + whole);
  __m512 most = last;
  for (int64_t i = 0; i < whole; i += kLanes32) {
    most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
  }
  const float top = _mm512_reduce_max_ps(most);
  const __m512 highest = _mm512_set1_ps(top), factor = _mm512_set1_ps(scale * kLog2E);
  __m512 sums = _mm512_setzero_ps();
  for (int64_t i = 0; i < whole; i += kLanes32) {
    const __m512 score = _mm512_loadu_ps(scores + i);
    const __m512 p = exp2_lanes(_mm512_mul_ps(_mm512_sub_ps(score, highest), factor));
    sums = _mm512_add_ps(sums, p);
    _mm256_storeu_si256((__m256i*)(out + i), round_lanes(p));
  }
  if (rest) {
    const __m512 p = _mm512_maskz_mov_ps(
        rest, exp2_lanes(_mm512_mul_ps(_mm512_sub_ps(last, highest), factor)));
    sums = _mm512_add_ps(sums, p);
    _mm256_storeu_si256((__m256i*)(out + whole), round_lanes(p));
  }
  return {_mm512_reduce_add_ps(sums), top};
}

KDCMAE_BF16 void forward_heads(const Forward& task, int64_t begin, int64_t end) {
  const auto& s = task.size;
  const int64_t n = s.n;
  const Buffer<Bf16> q(s.all_queries * n), rows(s.all_keys * n), p(kStep * s.all_keys);
  const Buffer<Bf16Pair> k(s.all_keys * n / 2), v(s.all_keys * n / 2);
  const Buffer<float> scores(kStep * s.all_keys), out(kStep * n);
  const Tiles tiles(task.tiles);
  for (int64_t head = begin; head < end; ++head) {
    task.q.read(head, n, q);
    task.k.read(head, n, rows);
    transpose_pairs(rows, s.all_keys, n, k);
    task.v.read(head, n, rows);
    pair_rows(rows, s.all_keys, n, v);
    for (int64_t first = 0; first < s.queries; first += kStep) {
      product({q + first * n, n, k, s.all_keys, scores, s.all_keys, kStep, s.all_keys, n, false},
              task.tiles);
      const int64_t count = std::min(kStep, s.queries - first);
      float sums[kStep];
      for (int64_t row = 0; row < count; ++row) {
        const int64_t at = row * s.all_keys;
        const auto [sum, top] = exponentials(scores + at, s.keys, s.scale, p + at);
        sums[row] = sum;
        task.lse[head * s.queries + first + row] = top * s.scale + std::log(sum);
      }
      product({p, s.all_keys, v, n, out, n, kStep, n, s.all_keys, false}, task.tiles);
      for (int64_t row = 0; row < count; ++row) {
        task.out.write(head, first + row, 1.0f / sums[row], out + row * n);
      }
    }
  }
}

struct Backward {
  Sizes size;
  Heads grad, q, k, v, out, dq, dk, dv;
  const float* lse;
  bool tiles;
};

// What one thread holds of one head, and of kStep of its keys against kQueries queries.
struct Buffers {
  explicit Buffers(const Sizes& s)
      : rows(s.all_queries * s.n), out(s.all_queries * s.n), k(s.all_keys * s.n),
        v(s.all_keys * s.n), k_t(s.all_keys * s.n), p(kStep * kQueries), ds(kStep * kQueries),
        k_t_pairs(s.all_keys * s.n / 2), q_t(s.all_queries * s.n / 2),
        grad_t(s.all_queries * s.n / 2), q_pairs(s.all_queries * s.n / 2),
        grad_pairs(s.all_queries * s.n / 2), ds_pairs(kStep * kQueries / 2), lse(s.all_queries),
        delta(s.all_queries), dq_t(s.all_queries * s.n), scores(kStep * kQueries),
        dp(kStep * kQueries), dq(s.n), dk(kStep * s.n), dv(kStep * s.n) {}

  Buffer<Bf16> rows, out, k, v, k_t, p, ds;
  Buffer<Bf16Pair> k_t_pairs, q_t, grad_t, q_pairs, grad_pairs, ds_pairs;
  Buffer<float> lse, delta;  // of each query; lse in powers of 2
  Buffer<float> dq_t, scores, dp, dq, dk, dv;
};

KDCMAE_BF16 void load_head(const Backward& task, int64_t head, const Buffers& b) {
  const auto& s = task.size;
  const int64_t n = s.n;
  task.k.read(head, n, b.k);
  transpose_pairs(b.k, s.all_keys, n, b.k_t_pairs);
  split_pairs(b.k_t_pairs, s.all_keys, n, b.k_t);
  task.v.read(head, n, b.v);
  task.q.read(head, n, b.rows);
  transpose_pairs(b.rows, s.all_queries, n, b.q_t);
  pair_rows(b.rows, s.all_queries, n, b.q_pairs);
  task.grad.read(head, n, b.rows);
  transpose_pairs(b.rows, s.all_queries, n, b.grad_t);
  pair_rows(b.rows, s.all_queries, n, b.grad_pairs);
  task.out.read(head, n, b.out);
  for (int64_t row = 0; row < s.queries; ++row) {
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += kStep) {
      sums = _mm512_dpbf16_ps(sums, (__m512bh)_mm512_loadu_si512(b.rows + row * n + i),
                              (__m512bh)_mm512_loadu_si512(b.out + row * n + i));
    }
    b.delta[row] = _mm512_reduce_add_ps(sums);
    b.lse[row] = task.lse[head * s.queries + row] * kLog2E;
  }
  std::memset(b.dq_t, 0, size_t(s.all_queries * n) * sizeof(float));
}

// p and ds of kStep keys, of which `valid` exist, and `queries` queries from scores and dp.
KDCMAE_BF16 void score_gradients(const Buffers& b, const float* lse, const float* delta,
                                 int64_t valid, int64_t queries, float scale) {
  const __m512 factor = _mm512_set1_ps(scale * kLog2E);
  for (int64_t row = 0; row < kStep; row += 2) {
    const __mmask16 keep[2] = {__mmask16(row < valid ? 0xffff : 0),
                               __mmask16(row + 1 < valid ? 0xffff : 0)};
    for (int64_t i = 0; i < queries; i += kLanes32) {
      const __m512 shift = _mm512_loadu_ps(lse + i), mean = _mm512_loadu_ps(delta + i);
      __m256i both[2];
#pragma GCC unroll 2
      for (int64_t r = 0; r < 2; ++r) {
        const int64_t at = (row + r) * kQueries + i;
        const __m512 score = _mm512_loadu_ps(b.scores + at), dp = _mm512_loadu_ps(b.dp + at);
        const __m512 p =
            _mm512_maskz_mov_ps(keep[r], exp2_lanes(_mm512_fmsub_ps(score, factor, shift)));
        both[r] = round_lanes(_mm512_mul_ps(p, _mm512_sub_ps(dp, mean)));
        _mm256_storeu_si256((__m256i*)(b.p + at), round_lanes(p));
        _mm256_storeu_si256((__m256i*)(b.ds + at), both[r]);
      }
      _mm512_storeu_si512(b.ds_pairs + row / 2 * kQueries + i, pair_lanes(both[0], both[1]));
    }
  }
}

KDCMAE_BF16 void backward_heads(const Backward& task, int64_t begin, int64_t end) {
  const auto& s = task.size;
  const int64_t n = s.n;
  Buffers b(s);
  const Tiles tiles(task.tiles);
  for (int64_t head = begin; head < end; ++head) {
    load_head(task, head, b);
    for (int64_t key = 0; key < s.keys; key += kStep) {
      const int64_t valid = std::min(kStep, s.keys - key);
      for (int64_t query = 0; query < s.all_queries; query += kQueries) {
        const int64_t m = std::min(kQueries, s.all_queries - query);
        const bool add = query > 0;
        product({b.k + key * n, n, b.q_t + query, s.all_queries, b.scores, kQueries, kStep, m, n,
                 false}, task.tiles);
        product({b.v + key * n, n, b.grad_t + query, s.all_queries, b.dp, kQueries, kStep, m, n,
                 false}, task.tiles);
        score_gradients(b, b.lse + query, b.delta + query, valid, m, s.scale);
        product({b.p, kQueries, b.grad_pairs + query / 2 * n, n, b.dv, n, kStep, n, m, add},
                task.tiles);
        product({b.ds, kQueries, b.q_pairs + query / 2 * n, n, b.dk, n, kStep, n, m, add},
                task.tiles);
        product({b.k_t + key, s.all_keys, b.ds_pairs, kQueries, b.dq_t + query, s.all_queries, n,
                 m, kStep, true}, task.tiles);
      }
      for (int64_t row = 0; row < valid; ++row) {
        task.dk.write(head, key + row, s.scale, b.dk + row * n);
        task.dv.write(head, key + row, 1.0f, b.dv + row * n);
      }
    }
    for (int64_t row = 0; row < s.queries; ++row) {
      for (int64_t i = 0; i < n; ++i) b.dq[i] = b.dq_t[i * s.all_queries + row];
      task.dq.write(head, row, s.scale, b.dq);
    }
  }
}

// x with its last axis contiguous: bfloat16, (B, H, rows, d) with the sizes of `like`, if given.
at::Tensor checked(const char* name, const at::Tensor& x, at::IntArrayRef like) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.scalar_type() == at::kBFloat16 && x.sizes() == like, name,
                    " must be bfloat16 ", like, ", got ", x.scalar_type(), " ", x.sizes());
  return x.stride(3) == 1 ? x : x.contiguous();
}

void check_units(bool tiles) {
  TORCH_CHECK_VALUE(bf16_units() >= (tiles ? 2 : 1), "this CPU has no ",
                    tiles ? "AMX" : "AVX-512", " products of bfloat16");
}

// (B, H, L, d) that lies as (B, L, H, d), where the layer behind wants it.
at::Tensor by_token(const at::Tensor& like) {
  const auto s = like.sizes();
  return at::empty({s[0], s[2], s[1], s[3]}, like.options()).transpose(1, 2);
}

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q_in, const at::Tensor& k_in,
                                             const at::Tensor& v_in, bool tiles) {
  check_units(tiles);
  TORCH_CHECK_VALUE(q_in.dim() == 4 && k_in.dim() == 4, "q and k must be (B, H, L, d)");
  const int64_t batch = q_in.size(0), heads = q_in.size(1), width = q_in.size(3);
  const int64_t keys = k_in.size(2);
  const at::Tensor q = checked("q", q_in, q_in.sizes());
  const at::Tensor k = checked("k", k_in, {batch, heads, keys, width});
  const at::Tensor v = checked("v", v_in, {batch, heads, keys, width});
  const at::Tensor out = by_token(q);
  const at::Tensor lse = at::empty({batch, heads, q.size(2)}, q.options().dtype(at::kFloat));
  const Forward task{Sizes(q, k), Heads(q), Heads(k), Heads(v), Heads(out),
                     lse.mutable_data_ptr<float>(), tiles};
  at::parallel_for(0, task.size.tasks, 1,
                   [&](int64_t begin, int64_t end) { forward_heads(task, begin, end); });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_in, const at::Tensor& q_in, const at::Tensor& k_in,
    const at::Tensor& v_in, const at::Tensor& out_in, const at::Tensor& lse_in, bool tiles) {
  check_units(tiles);
  TORCH_CHECK_VALUE(q_in.dim() == 4 && k_in.dim() == 4, "q and k must be (B, H, L, d)");
  const at::Tensor q = checked("q", q_in, q_in.sizes());
  const std::array<int64_t, 4> kv{q.size(0), q.size(1), k_in.size(2), q.size(3)};
  const at::Tensor k = checked("k", k_in, kv), v = checked("v", v_in, kv);
  const at::Tensor grad = checked("grad", grad_in, q.sizes());
  const at::Tensor out = checked("out", out_in, q.sizes());
  TORCH_CHECK_VALUE(lse_in.scalar_type() == at::kFloat && lse_in.sizes() == q.sizes().slice(0, 3),
                    "lse must be float32 (B, H, L), got ", lse_in.sizes());
  const at::Tensor lse = lse_in.contiguous();
  const at::Tensor dq = by_token(q), dk = by_token(k), dv = by_token(v);
  const Backward task{Sizes(q, k), Heads(grad), Heads(q), Heads(k), Heads(v), Heads(out),
                      Heads(dq), Heads(dk), Heads(dv), lse.const_data_ptr<float>(), tiles};
  at::parallel_for(0, task.size.tasks, 1,
                   [&](int64_t begin, int64_t end) { backward_heads(task, begin, end); });
  return {dq, dk, dv};
}

int64_t units() { return bf16_units(); }

#else

int64_t units() { return 0; }

#endif  // KDCMAE_BF16_UNITS

}  // namespace

// The schemas are defined in kernels/attention/fused.py.
#ifdef KDCMAE_BF16_UNITS
TORCH_LIBRARY_IMPL(kdcmae_fast, CPU, m) {
  m.impl("attention_cpp", attention);
  m.impl("attention_backward_cpp", attention_backward);
}
#endif
TORCH_LIBRARY_IMPL(kdcmae_fast, CompositeExplicitAutograd, m) {
  m.impl("attention_units_cpp", units);
}

}  // namespace kdcmae_fast

// Matrix products of bfloat16 operands into float, on the CPU's own units for them: AMX tiles or
// AVX-512's pairwise products. For kernels whose operands fit into the cache.
//
// Rows, columns and terms of all matrices come in multiples of kStep, padded by whoever calls.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __has_include(<amxbf16intrin.h>)
#define KDCMAE_BF16_UNITS 1

// GCC 12 takes the intrinsics' undefined values for mistakes (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

// Functions that use the units carry this: they must not be reached on a CPU without them.
#define KDCMAE_BF16 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#define KDCMAE_BF16_INLINE inline KDCMAE_BF16 __attribute__((always_inline))

namespace kdcmae_fast {

constexpr int64_t kStep = 32;     // of rows, columns and terms of a product
constexpr int64_t kLanes32 = 16;  // 32-bit values in a register

using Bf16 = uint16_t;
using Bf16Pair = uint32_t;  // the earlier one low

// 0: neither. 1: AVX-512's products. 2: AMX, once the operating system lets this process use it.
inline int bf16_units() {
  static const int units = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
      return 0;
    }
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    const bool tiles = __builtin_cpu_supports("amx-bf16") &&
                       syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return tiles ? 2 : 1;
  }();
  return units;
}

// Zeroed memory at a multiple of 64 bytes.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new(bytes(n), kAlign))) {
    std::memset(data_, 0, bytes(n));
  }
  ~Buffer() { ::operator delete(data_, kAlign); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  static size_t bytes(int64_t n) { return size_t(n) * sizeof(T); }
  T* data_;
};

// C (m, n) = A (m, k) B, or += where `add`. A lies by rows, B by pairs of rows: (k / 2, n, 2).
// A pitch is the distance between rows, of B between rows of pairs.
struct Product {
  const Bf16* a;
  int64_t a_pitch;
  const Bf16Pair* b;
  int64_t b_pitch;
  float* c;
  int64_t c_pitch, m, n, k;
  bool add;
};

// The compiler does not see that the tile instructions read and write memory.
#define KDCMAE_MEMORY_BARRIER asm volatile("" ::: "memory")

// While it lives, this thread's tiles are 16 rows of 64 bytes each.
class Tiles {
 public:
  KDCMAE_BF16 explicit Tiles(bool used) : used_(used) {
    if (!used_) return;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    KDCMAE_MEMORY_BARRIER;
    _tile_loadconfig(&config);
  }
  KDCMAE_BF16 ~Tiles() {
    if (used_) _tile_release();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  bool used_;
};

KDCMAE_BF16_INLINE void product_tiles(const Product& p) {
  const int64_t half = kStep / 2, a_bytes = p.a_pitch * 2, b_bytes = p.b_pitch * 4;
  const int64_t c_bytes = p.c_pitch * 4;
  KDCMAE_MEMORY_BARRIER;
  for (int64_t m = 0; m < p.m; m += kStep) {
    for (int64_t n = 0; n < p.n; n += kStep) {
      float *upper = p.c + m * p.c_pitch + n, *lower = upper + half * p.c_pitch;
      if (p.add) {
        _tile_loadd(0, upper, c_bytes);
        _tile_loadd(1, upper + half, c_bytes);
        _tile_loadd(2, lower, c_bytes);
        _tile_loadd(3, lower + half, c_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < p.k; k += kStep) {
        const Bf16* a = p.a + m * p.a_pitch + k;
        const Bf16Pair* b = p.b + k / 2 * p.b_pitch + n;
        _tile_loadd(4, a, a_bytes);
        _tile_loadd(5, a + half * p.a_pitch, a_bytes);
        _tile_loadd(6, b, b_bytes);
        _tile_loadd(7, b + half, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, upper, c_bytes);
      _tile_stored(1, upper + half, c_bytes);
      _tile_stored(2, lower, c_bytes);
      _tile_stored(3, lower + half, c_bytes);
    }
  }
  KDCMAE_MEMORY_BARRIER;
}

KDCMAE_BF16_INLINE void product_lanes(const Product& p) {
  constexpr int kRows = 8;  // at a time: 16 sums in registers
  for (int64_t m = 0; m < p.m; m += kRows) {
    for (int64_t n = 0; n < p.n; n += kStep) {
      __m512 sums[kRows][2];
      float* c = p.c + m * p.c_pitch + n;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sums[r][0] = p.add ? _mm512_loadu_ps(c + r * p.c_pitch) : _mm512_setzero_ps();
        sums[r][1] = p.add ? _mm512_loadu_ps(c + r * p.c_pitch + kLanes32) : _mm512_setzero_ps();
      }
      const Bf16* a = p.a + m * p.a_pitch;
      const Bf16Pair* b = p.b + n;
      for (int64_t pair = 0; pair < p.k / 2; ++pair, a += 2, b += p.b_pitch) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(b);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(b + kLanes32);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          Bf16Pair both;
          std::memcpy(&both, a + r * p.a_pitch, sizeof both);
          const __m512bh row = (__m512bh)_mm512_set1_epi32(int(both));
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], row, left);
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], row, right);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        _mm512_storeu_ps(c + r * p.c_pitch, sums[r][0]);
        _mm512_storeu_ps(c + r * p.c_pitch + kLanes32, sums[r][1]);
      }
    }
  }
}

KDCMAE_BF16 inline void product(const Product& p, bool tiles) {
  if (tiles) return product_tiles(p);
  product_lanes(p);
}

// 2^x to about 1e-7; the coefficients are those of Cephes' exp2f.
KDCMAE_BF16_INLINE __m512 exp2_lanes(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.535336188319500e-4f);
  for (float next : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f,
                     2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f}) {
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(next));
  }
  return _mm512_scalef_ps(y, whole);
}

KDCMAE_BF16_INLINE __m256i round_lanes(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

KDCMAE_BF16_INLINE __m512i pair_lanes(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// x (rows, n) by rows -> (n / 2, rows) pairs along a row, for products with the transpose of x.
KDCMAE_BF16 inline void transpose_pairs(const Bf16* x, int64_t rows, int64_t n, Bf16Pair* out) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i index = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int(n / 2)));
  const Bf16Pair* pairs = reinterpret_cast<const Bf16Pair*>(x);
  for (int64_t pair = 0; pair < n / 2; ++pair) {
    for (int64_t row = 0; row < rows; row += kLanes32) {
      const __m512i found = _mm512_i32gather_epi32(index, pairs + row * (n / 2) + pair, 4);
      _mm512_storeu_si512(out + pair * rows + row, found);
    }
  }
}

// (n / 2, rows) pairs as above -> (n, rows), the transpose itself.
KDCMAE_BF16 inline void split_pairs(const Bf16Pair* pairs, int64_t rows, int64_t n, Bf16* out) {
  for (int64_t i = 0; i < n / 2; ++i) {
    for (int64_t row = 0; row < rows; row += kLanes32) {
      const __m512i both = _mm512_loadu_si512(pairs + i * rows + row);
      const __m512i later = _mm512_srli_epi32(both, 16);
      Bf16* to = out + 2 * i * rows + row;
      _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(both));
      _mm256_storeu_si256((__m256i*)(to + rows), _mm512_cvtepi32_epi16(later));
    }
  }
}

// x (rows, n) by rows -> (rows / 2, n) pairs of rows.
KDCMAE_BF16 inline void pair_rows(const Bf16* x, int64_t rows, int64_t n, Bf16Pair* out) {
  for (int64_t row = 0; row < rows; row += 2) {
    for (int64_t i = 0; i < n; i += kLanes32) {
      const __m256i first = _mm256_loadu_si256((const __m256i*)(x + row * n + i));
      const __m256i second = _mm256_loadu_si256((const __m256i*)(x + (row + 1) * n + i));
      _mm512_storeu_si512(out + row / 2 * n + i, pair_lanes(first, second));
    }
  }
}

}  // namespace kdcmae_fast

#endif

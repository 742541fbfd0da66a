// exp, log and sums over rows in loops that the compiler vectorises without -ffast-math.
//
// A loop over these belongs into a function marked KDCMAE_CLONES, which is compiled once per
// instruction set and chosen when the library is loaded; everything it calls is inlined into it.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

// Vectors are passed between inlined functions only, so no calling convention is at stake.
#pragma GCC diagnostic ignored "-Wpsabi"

#define KDCMAE_INLINE inline __attribute__((always_inline))
#define KDCMAE_LAMBDA __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KDCMAE_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define KDCMAE_CLONES __attribute__((noinline))
#endif

namespace kdcmae_fast {

template <class T>
struct Bits;

template <>
struct Bits<float> {
  using Int = int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr int kExpTerms = 7;  // of the Taylor series on |x| <= ln(2) / 2
  static constexpr int kLogTerms = 5;  // of the atanh series on |s| <= 0.172
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kExpLow = -87.3f, kExpHigh = 88.7f;
};

template <>
struct Bits<double> {
  using Int = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr int kExpTerms = 14;
  static constexpr int kLogTerms = 11;
  static constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kExpLow = -708.3, kExpHigh = 709.7;
};

template <class To, class From>
KDCMAE_INLINE To bits_as(From x) {
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// exp(x) to about 2 ulp. Results below the smallest normal number are 0, above the range infinity.
template <class T>
KDCMAE_INLINE T vexp(T x) {
  using B = Bits<T>;
  using Int = typename B::Int;
  T clamped = x < B::kExpLow ? B::kExpLow : x;
  clamped = clamped > B::kExpHigh ? B::kExpHigh : clamped;
  // Adding 1.5 * 2^mantissa rounds to an integer, which the low bits of the sum then hold.
  constexpr T kRound = T(3) * T(Int{1} << (B::kMantissa - 1));
  const T shifted = clamped * T(1.4426950408889634074) + kRound;
  const T n = shifted - kRound;
  const T r = (clamped - n * B::kLn2High) - n * B::kLn2Low;
  T series = T(1);
  for (int k = B::kExpTerms; k > 0; --k) series = T(1) + series * r * (T(1) / T(k));
  // 2^n in two factors: n itself may be one past the largest exponent.
  const Int whole = bits_as<Int>(shifted) - bits_as<Int>(kRound);
  const Int half = whole >> 1;
  const T first = bits_as<T>((half + B::kBias) << B::kMantissa);
  const T second = bits_as<T>((whole - half + B::kBias) << B::kMantissa);
  T y = series * first * second;
  y = x < B::kExpLow ? T(0) : y;
  return x > B::kExpHigh ? std::numeric_limits<T>::infinity() : y;
}

// log(x) to about 2 ulp for positive normal x. NaN and infinity give NaN, without a branch: one
// would keep the loop from being vectorised.
template <class T>
KDCMAE_INLINE T vlog(T x) {
  using B = Bits<T>;
  using Int = typename B::Int;
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)).
  const Int half = bits_as<Int>(T(0.70710678118654752440));
  const Int steps = bits_as<Int>(x) - half;
  const Int e = steps >> B::kMantissa;
  const T m = bits_as<T>((steps & ((Int{1} << B::kMantissa) - 1)) + half);
  const T f = m - T(1);
  const T s = f / (T(2) + f), square = s * s;
  T series = T(0);
  for (int k = B::kLogTerms; k > 0; --k) series = (series + T(1) / T(2 * k + 1)) * square;
  const T n = T(e);
  // log m = 2 s (1 + s^2/3 + ...) = f - s (f - 2 series): f itself is exact.
  const T y = n * B::kLn2High + (n * B::kLn2Low + (f - s * (f - T(2) * series)));
  return y + (x - x);
}

constexpr int kLanes = 16;

// Sum of f(0) + ... + f(n - 1), always in the same order.
template <class T, class F>
KDCMAE_INLINE T sum_over(int64_t n, F f) {
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += f(i + l);
  }
  for (int l = 0; i + l < n; ++l) lanes[l] += f(i + l);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

// Largest of `first` and f(0) ... f(n - 1); NaNs are passed over.
template <class T, class F>
KDCMAE_INLINE T max_over(int64_t n, T first, F f) {
  T lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = first;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const T x = f(i + l);
      lanes[l] = x > lanes[l] ? x : lanes[l];
    }
  }
  for (int l = 0; i + l < n; ++l) {
    const T x = f(i + l);
    lanes[l] = x > lanes[l] ? x : lanes[l];
  }
  for (int l = 1; l < kLanes; ++l) lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
  return lanes[0];
}

// 64 bytes of T: one register or several, whatever the instruction set of the clone has.
template <class T>
struct Lanes {
  typedef T Type __attribute__((vector_size(64)));
  static constexpr int64_t kCount = 64 / int64_t(sizeof(T));
};

template <class V, class T>
KDCMAE_INLINE V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
KDCMAE_INLINE void store(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// term(i, V{}) summed over [0, n), V being several lanes or T; always in the same order. Four sums
// at a time: a single one would wait for each addition.
template <class T, class Term>
KDCMAE_INLINE T sum_terms(int64_t n, Term term) {
  using V = typename Lanes<T>::Type;
  constexpr int64_t kCount = Lanes<T>::kCount;
  V sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kCount <= n; i += 4 * kCount) {
    for (int k = 0; k < 4; ++k) sums[k] += term(i + k * kCount, V{});
  }
  for (; i + kCount <= n; i += kCount) sums[0] += term(i, V{});
  const V all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  T total = 0;
  for (; i < n; ++i) total += term(i, T{});
  for (int64_t lane = 0; lane < kCount; ++lane) total += all[lane];
  return total;
}

}  // namespace kdcmae_fast

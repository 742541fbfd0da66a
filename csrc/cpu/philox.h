// Philox4x32-10 (Salmon et al., SC 2011).
#pragma once

#include <cstdint>

#include "vector_math.h"

namespace kdcmae_fast {

constexpr int kPhiloxLanes = 8;  // blocks computed side by side, one per vector lane

// A 32-bit word per lane, with room for its product. GCC and Clang lower it to what the CPU has.
typedef uint64_t PhiloxWords __attribute__((vector_size(8 * kPhiloxLanes)));

// Words 4 * block .. 4 * block + 3 of the stream (first, c1, c2, c3), (k0, k1), for all blocks
// 0..blocks-1; block b has first + b for its first counter word. Writes whole lanes: out needs room
// for blocks rounded up to kPhiloxLanes.
KDCMAE_CLONES inline void philox4x32(uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3,
                                     uint32_t k0, uint32_t k1, int64_t blocks, uint32_t* out) {
  const PhiloxWords low = PhiloxWords{} + 0xFFFFFFFF;
  for (int64_t start = 0; start < blocks; start += kPhiloxLanes) {
    PhiloxWords x0, x1 = PhiloxWords{} + c1, x2 = PhiloxWords{} + c2, x3 = PhiloxWords{} + c3;
    for (int i = 0; i < kPhiloxLanes; ++i) x0[i] = first + uint32_t(start + i);
    uint32_t key0 = k0, key1 = k1;
    for (int round = 0; round < 10; ++round) {
      const PhiloxWords a = x0 * 0xD2511F53u, b = x2 * 0xCD9E8D57u;
      x0 = (b >> 32) ^ x1 ^ key0;
      x1 = b & low;
      x2 = (a >> 32) ^ x3 ^ key1;
      x3 = a & low;
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
    uint32_t words[4][kPhiloxLanes];
    for (int i = 0; i < kPhiloxLanes; ++i) {
      words[0][i] = uint32_t(x0[i]), words[1][i] = uint32_t(x1[i]);
      words[2][i] = uint32_t(x2[i]), words[3][i] = uint32_t(x3[i]);
    }
    for (int i = 0; i < 4 * kPhiloxLanes; ++i) out[4 * start + i] = words[i % 4][i / 4];
  }
}

}  // namespace kdcmae_fast

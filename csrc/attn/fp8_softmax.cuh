// Softmax of one block of scores in registers: masks, row maximum, exponentials, sums, conversion
// to e4m3.
//
// A thread has 2 rows (i = 0, 1) of the 64 x kBlockN scores: register 4n + 2i + e is row lane / 4 +
// 8i, column 8n + 2 (lane % 4) + e (tile/layout.cuh).
#pragma once
#include <cmath>

#include "ptx/convert.cuh"
#include "tile/fp8_order.cuh"

namespace fa3 {

// Scores outside columns [low[i], high[i]) become -inf. Limits relative to the first column of this
// thread in the piece.
template <int N>
FA3_DEVICE void mask_scores(float (&s)[N], const int (&low)[2], const int (&high)[2]) {
#pragma unroll
  for (int r = 0; r < N; ++r) {
    const int column = 8 * (r >> 2) + (r & 1), i = (r >> 1) & 1;
    if (column < low[i] || column >= high[i]) s[r] = -INFINITY;
  }
}

// Over the four lanes of a row.
FA3_DEVICE float quad_max_nan(float x) {
  x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
FA3_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Largest of the thread's scores of row kRow, by 3-input integer maxima: half the instructions of
// fmaxf. Floats order like signed integers unless both are negative: the result is right if it is
// >= 0, and some negative score if none is (then: row_max_negative). A NaN of the tensor core is
// the largest integer of all.
template <int kRow, int N>
FA3_DEVICE int row_max_signed(const float (&s)[N]) {
  int a = __float_as_int(s[2 * kRow]), b = __float_as_int(s[2 * kRow + 1]);
#pragma unroll
  for (int n = 1; n + 1 < N / 4; n += 2) {
    a = __vimax3_s32(a, __float_as_int(s[4 * n + 2 * kRow]),
                     __float_as_int(s[4 * n + 4 + 2 * kRow]));
    b = __vimax3_s32(b, __float_as_int(s[4 * n + 2 * kRow + 1]),
                     __float_as_int(s[4 * n + 5 + 2 * kRow]));
  }
  static_assert(N / 4 % 2 == 0, "one column pair is left over");
  a = __vimax3_s32(a, __float_as_int(s[N - 4 + 2 * kRow]), __float_as_int(s[N - 3 + 2 * kRow]));
  return max(a, b);
}
// Among scores that are all negative the largest has the smallest bit pattern.
template <int kRow, int N>
FA3_DEVICE float row_max_negative(const float (&s)[N]) {
  uint32_t a = __float_as_uint(s[2 * kRow]), b = __float_as_uint(s[2 * kRow + 1]);
#pragma unroll
  for (int n = 1; n < N / 4; ++n)
    a = __vimin3_u32(a, __float_as_uint(s[4 * n + 2 * kRow]),
                     __float_as_uint(s[4 * n + 1 + 2 * kRow]));
  return __uint_as_float(min(a, b));
}

// sum[row] += weight * sum of 2^(s scale - shift[row])
template <int N>
FA3_DEVICE void add_exp2(const float (&s)[N], float scale, const float (&shift)[2], float weight,
                         float (&sum)[2]) {
#pragma unroll
  for (int r = 0; r < N; ++r) {
    const int row = (r >> 1) & 1;
    sum[row] = fmaf(exp2_approx(fmaf(s[r], scale, -shift[row])), weight, sum[row]);
  }
}

// p' = 2^(s scale - shift[row]), rounded to e4m3: the A operand of P V, word by word (of the four
// words per 32 keys, two belong to either row). With kSum also
// sum[row] += weight * (sum of p' before it is rounded).
//
// One loop in one basic block, because the exponentials, the conversions and the multiplications
// in front of them run on different units. ptxas would still put all multiplications first, while
// the exponentials wait: so those of a group depend on a word of the group before it, by a product
// with zero. (Read as a float a word is finite: bytes of e4m3 without sign are at most 0x7f.)
template <bool kSum, int N>
FA3_DEVICE void exp2_pack(const float (&s)[N], float scale, const float (&shift)[2],
                          uint32_t (&words)[N / 4], float weight, float (&sum)[2]) {
  float after[2] = {shift[0], shift[1]};
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int row = w & 1;
      float p[4];
#pragma unroll
      for (int b = 0; b < 4; ++b)
        p[b] = exp2_approx(fmaf(s[16 * k + p_register(w, b)], scale, -after[row]));
      words[4 * k + w] = pack4_e4m3(p[0], p[1], p[2], p[3]);
      if constexpr (kSum) sum[row] = fmaf((p[0] + p[1]) + (p[2] + p[3]), weight, sum[row]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) after[i] = fmaf(__uint_as_float(words[4 * k + i]), 0.f, shift[i]);
  }
}

}  // namespace fa3

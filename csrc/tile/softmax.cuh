// Online softmax on accumulator fragments, one row of the thread at a time (I = 0, 1), so that a
// kernel can place the pieces between its matrix products. Registers 4n + 2I and 4n + 2I + 1 belong
// to row I (tile/layout.cuh).
//
// Scores turn into exponents of two: with c = scale * log2(e) and a reference r (log2 units), P =
// 2^(S c - r). Any reference gives the same quotient O = sum(P V) / sum(P) as long as nothing
// overflows. The row's maximum is the best one: it makes the largest P exactly 1, which 16 bits
// hold without an error, and the largest weights decide the error of O.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/wgmma.cuh"

namespace fa3 {

constexpr unsigned kFullWarp = 0xffffffffu;

// Over the four lanes that share a row.
FA3_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}
FA3_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// Largest value of row I in this thread. Two chains: one would wait for itself.
template <int I, int N>
FA3_DEVICE float row_max(const float (&s)[N]) {
  float even = s[2 * I], odd = s[2 * I + 1];
#pragma unroll
  for (int n = 1; n < N / 4; ++n) {
    even = fmaxf(even, s[4 * n + 2 * I]);
    odd = fmaxf(odd, s[4 * n + 2 * I + 1]);
  }
  return fmaxf(even, odd);
}

// Register of column e (0 .. N / 2 - 1) of row I.
template <int I>
FA3_HD constexpr int row_register(int e) {
  return 4 * (e / 2) + 2 * I + e % 2;
}
// S -> S c - r, from column kBegin on
template <int I, int kBegin = 0, int N>
FA3_DEVICE void row_exponents(float (&s)[N], float c, float r) {
#pragma unroll
  for (int e = kBegin; e < N / 2; ++e)
    s[row_register<I>(e)] = fmaf(s[row_register<I>(e)], c, -r);
}
// x -> 2^x, from column kBegin on
template <int I, int kBegin = 0, int N>
FA3_DEVICE void row_exp2(float (&s)[N]) {
#pragma unroll
  for (int e = kBegin; e < N / 2; ++e) s[row_register<I>(e)] = exp2_approx(s[row_register<I>(e)]);
}
template <int I, int N>
FA3_DEVICE float row_sum(const float (&s)[N]) {
  float even = s[2 * I], odd = s[2 * I + 1];
#pragma unroll
  for (int n = 1; n < N / 4; ++n) {
    even += s[4 * n + 2 * I];
    odd += s[4 * n + 2 * I + 1];
  }
  return even + odd;
}
// Row I of P as the A operand of P V.
template <class Elem, int I, int N>
FA3_DEVICE void row_pack(const float (&s)[N], uint32_t (&p)[N / 2]) {
#pragma unroll
  for (int n = 0; n < N / 4; ++n)
    p[2 * n + I] = pack2<Elem>(s[4 * n + 2 * I], s[4 * n + 2 * I + 1]);
}
// How the denominator sums P.
enum class RowSum {
  Float,  // FP32 P, before rounding
  Ones,   // P as rounded, by eight more columns of V that hold ones: the tensor cores sum, the
          // accumulator rescales
};

// The denominators of the two rows of a thread.
template <RowSum kKind>
struct RowSums {
  float part[2];  // this thread's columns only; the quad adds up at the end
  FA3_DEVICE void clear() { part[0] = part[1] = 0.f; }
  template <int N>
  FA3_DEVICE void add(const float (&s)[N]) {
    part[0] += row_sum<0>(s);
    part[1] += row_sum<1>(s);
  }
  FA3_DEVICE void scale(const float (&alpha)[2]) {
    part[0] *= alpha[0];
    part[1] *= alpha[1];
  }
  FA3_DEVICE float total(int i) const { return quad_sum(part[i]); }  // of the row
};
template <>
struct RowSums<RowSum::Ones> {  // nothing here: the sums are accumulator columns of P V
  FA3_DEVICE void clear() {}
  template <int N>
  FA3_DEVICE void add(const float (&)[N]) {}
  FA3_DEVICE void scale(const float (&)[2]) {}
};

}  // namespace fa3

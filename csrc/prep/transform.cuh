// The Hadamard transform of 64 neighbouring elements as a product with a 64 x 64 matrix in shared
// memory: wgmma, 64 rows at a time. Head dim 128 is two of those and one butterfly between them.
//
// Rows that enter the product as they are: A is the TMA buffer itself, the matrix is in the type of
// x and holds the signs. Rows that are computed first (rotated): A comes from registers as high and
// low bf16 parts, 16 significant bits together. (TF32 would take half the instructions, and was no
// faster.)
//
// The matrix absorbs all orders: its rows follow the order in which a thread's eight neighbouring
// elements fill the A fragment, its columns the order that puts eight neighbouring results
// into a thread. So x, cos and sin are read and results written 16 bytes at a time.
#pragma once
#include "prep/params.h"
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"
#include "ptx/wgmma.cuh"
#include "tile/layout.cuh"

namespace fa3::prep {

constexpr int kPart = 64;                        // elements of one product
constexpr int kMatrixBytes = kPart * kPart * 2;  // 16-bit

// Which element of a part sits in k-slot k of the A fragment: thread q of a quad holds elements
// 8q .. 8q + 7 and 32 + 8q .. of a row, four per k-step.
FA3_HD int slot_element(int k) {
  const int step = k / 16, inside = k % 16;
  return step / 2 * 32 + inside % 8 / 2 * 8 + step % 2 * 4 + inside / 8 * 2 + inside % 2;
}
FA3_HD int slot_or(bool slots, int k) {
  return slots ? slot_element(k) : k;
}
// Which element of a part column n of the accumulator is: eight neighbours a thread and block.
FA3_HD int column_element(int n) {
  return n / 32 * 32 + n % 8 / 2 * 8 + n / 8 % 4 * 2 + n % 2;
}
// Row of the warp's 16 that lane group g holds as its first (the second is 8 further on). Rotated
// tensors: neighbours in a shared-memory phase differ in bit 2, so that their swizzled units are
// disjoint.
FA3_HD int fragment_row(int g, bool permuted) {
  return permuted ? ((g & 1) << 2) | (g >> 1) : g;
}

// Columns 8 unit .. 8 unit + 7 of row n of the matrix, packed: sign * (-1)^popcount(k & n) in the
// orders above, 1.0 twice being `packed_one`. `signs`: the sign bits of the part's elements, or
// NULL. `slots`: for operands from registers.
FA3_HD void matrix_unit(uint32_t (&w)[4], uint32_t packed_one, const uint32_t* signs, int n,
                        int unit, bool slots) {
  // Column 8 unit + j holds element first + j or, in slots, first + 8 (j / 2) + j % 2.
  const int to = column_element(n), first = slot_or(slots, 8 * unit);
  const int t = slots ? (to & 1) | (to >> 2 & 6) : to & 7;  // the bits of `to` that j meets
  uint32_t negative = (t & 1 ? 0xaau : 0u) ^ (t & 2 ? 0xccu : 0u) ^ (t & 4 ? 0xf0u : 0u);
  int parity = first & to;
  parity ^= parity >> 4, parity ^= parity >> 2, parity ^= parity >> 1;
  if (parity & 1) negative ^= 0xffu;
  if (signs != nullptr) {
    const uint32_t x = signs[first / 32] >> first % 32;
    negative ^= slots ? (x & 3) | (x >> 6 & 0xc) | (x >> 12 & 0x30) | (x >> 18 & 0xc0) : x & 0xff;
  }
  for (int j = 0; j < 4; ++j) {
    const uint32_t b = negative >> 2 * j;
    w[j] = packed_one ^ ((b & 1) << 15) ^ ((b & 2) << 30);
  }
}

// A 64 x 64 matrix as the K-major B operand: row n, column k. By all threads; a kernel starts with
// this, so it is worth doing eight columns at a time.
template <class Elem>
FA3_DEVICE void build_matrix(unsigned char* matrix, const uint32_t* signs, bool slots) {
  for (int i = threadIdx.x; i < kPart * kPart / 8; i += blockDim.x) {
    const int n = i / 8, unit = i % 8;
    uint32_t w[4];
    matrix_unit(w, packed_ones<Elem>(), signs, n, unit, slots);
    *reinterpret_cast<uint4*>(matrix + tile_offset<128, 2>(kPart, n, 8 * unit)) =
        make_uint4(w[0], w[1], w[2], w[3]);
  }
}

// 1 / sqrt(D)
template <int D>
FA3_HD constexpr float hadamard_scale() {
  return D == 64 ? 0.125f : 0.08838834764831845f;
}

// acc[part] = part of the 64 rows at `x` times matrix `part` (at `matrices`, `step` bytes apart).
template <class Elem, int kParts>
FA3_DEVICE void multiply_rows(float (&acc)[kParts][32], uint32_t x, uint32_t matrices, int step) {
  using Product = Wgmma<Elem, kPart>;
  const uint64_t a = descriptor_at(descriptor_form<128>(16), x);
  const uint64_t b = descriptor_at(descriptor_form<128>(16), matrices);
  wgmma_fence();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint64_t as = descriptor_step(a, part * kWarpgroupRows * 128 + s * 32);
      const uint64_t bs = descriptor_step(b, part * step + s * 32);
      if (s == 0)
        Product::template ss_zero<0, 0>(acc[part], as, bs);
      else
        Product::template ss<0, 0>(acc[part], as, bs);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int part = 0; part < kParts; ++part) pin(acc[part]);
}

// Elements 4 s .. 4 s + 3 of a thread's eight, in two blocks of 32 and two rows:
// [partner][row half][element].
using Step = float[2][2][4];

// A step as the A fragments of a k-step each, in two bf16 parts. Registers of a running wgmma.
struct Operand {
  uint32_t high[2][4], low[2][4];

  FA3_DEVICE void split(const Step& v) {
#pragma unroll
    for (int w = 0; w < 2; ++w)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a = v[w][i % 2][i / 2 * 2], b = v[w][i % 2][i / 2 * 2 + 1];
        high[w][i] = pack2<bf16>(a, b);
        const float2 h = unpack2<bf16>(high[w][i]);
        low[w][i] = pack2<bf16>(a - h.x, b - h.y);
      }
  }
  FA3_DEVICE void keep() {
#pragma unroll
    for (int w = 0; w < 2; ++w) pin(high[w]), pin(low[w]);
  }
};

// acc += blocks b and b + D / 64, step s, times the matrices, which are `next` bytes apart;
// committed, not waited for.
template <int D>
FA3_DEVICE void multiply_step(float (&acc)[D / 64][32], const Operand& v, uint64_t matrix, int next,
                              int b, int s) {
  using Product = Wgmma<bf16, kPart>;
  wgmma_fence();
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    const int block = b + w * (D / 64), part = block / 2;
    const uint64_t bs = descriptor_step(matrix, part * next + (block % 2 * 2 + s) * 32);
    const uint32_t* a = v.high[w];
    if (block % 2 == 0 && s == 0)
      Product::template rs_zero<0>(acc[part], a[0], a[1], a[2], a[3], bs);
    else
      Product::template rs<0>(acc[part], a[0], a[1], a[2], a[3], bs);
    a = v.low[w];
    Product::template rs<0>(acc[part], a[0], a[1], a[2], a[3], bs);
  }
  wgmma_commit();
}

// The four elements of step s of eight packed ones.
template <class Elem>
FA3_DEVICE void unpack_step(float* e, const uint4& raw, int s) {
  const float2 a = unpack2<Elem>(s ? raw.z : raw.x), b = unpack2<Elem>(s ? raw.w : raw.y);
  e[0] = a.x, e[1] = a.y, e[2] = b.x, e[3] = b.y;
}

}  // namespace fa3::prep

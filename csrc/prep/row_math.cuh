// Arithmetic of a row (token, head) that one or two lanes hold in registers: rotation, Hadamard,
// conversion.
//
// Value i of a lane is element 8 * (kLanes * (i / 8) + part) + i % 8 of the row, part = lane %
// kLanes: chunks of eight neighbouring elements go to the lanes in turn. So bits 0..2 of the
// element index are register bits, with two lanes bit 3 is the lane bit, and every higher bit is a
// register bit again; a NeoX pair (i, i + D/2) lies in one lane. Everything is FP32: a butterfly is
// one FADD per value, and nothing is rounded before the end.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"
#include "ptx/stream.cuh"
#include "ptx/warp.cuh"

namespace fa3::prep {

template <int kHeadDim>
struct RowShape {
  static constexpr int D = kHeadDim;
  static constexpr int kLanes =
      D >= 192 ? 2 : 1;                      // lanes that share a row: at most 128 values a thread
  static constexpr int kRows = 32 / kLanes;  // rows of a warp
  static constexpr int kValues = D / kLanes;
  static constexpr int kChunks = kValues / 8;
  // Order of the transform. Head dims that are no power of two take a block-diagonal one.
  static constexpr int kOrder = D == 96 ? 32 : D == 192 ? 64 : D;
  static constexpr int kRun = kOrder / kLanes;  // values of a lane that mix
  // 1 / sqrt(kOrder)
  static constexpr float kScale = kOrder == 32    ? 0.17677669529663688f
                                  : kOrder == 64  ? 0.125f
                                  : kOrder == 128 ? 0.08838834764831845f
                                                  : 0.0625f;
  static_assert(D % 32 == 0 && kValues <= 128, "row does not fit the registers");
};

// Which row of the warp's tile a lane holds. With two lanes a row, the eight lanes of a
// shared-memory phase touch rows r, r+2, r+4, r+6, whose swizzled chunk pairs are disjoint.
template <int kLanes>
FA3_HD int lane_row(int lane) {
  if (kLanes == 1) return lane;
  const int r = lane >> 1;
  return ((r & 3) << 1) | ((r >> 2) & 1) | (r & 8);
}

// cos and sin of eight (NeoX) or four (interleaved) pairs.
template <int kPairs>
struct Angles {
  float c[kPairs], s[kPairs];
};

// Address of a lane's row of the cos table in shared memory. One lane a row: the pitch is an odd
// number of 16-byte units, so the lanes of a phase hit different banks. Two: the unit is XORed with
// bits of the row.
template <int kLanes>
struct TableRow {
  uint32_t cos, to_sin;

  static FA3_HD int unit_xor(int row) { return kLanes == 1 ? 0 : ((row >> 1) & 1) | (row & 4); }
  static FA3_HD int pitch(int rotary_dim) {
    const int units = rotary_dim / 8;
    return 16 * (kLanes == 1 ? units | 1 : (units + 7) / 8 * 8);
  }
  static FA3_HD uint32_t offset(int row, int unit, int pitch) {
    return row * pitch + ((unit ^ unit_xor(row)) << 4);
  }

  FA3_DEVICE float4 read(int unit, uint32_t table) const {
    if (kLanes == 1) return lds_float4(cos + table + (unit << 4));
    return lds_float4((cos ^ ((unit & 7) << 4)) + table + ((unit >> 3) << 7));
  }
  template <int kPairs>
  FA3_DEVICE Angles<kPairs> angles(int pair) const {
    Angles<kPairs> a;
#pragma unroll
    for (int u = 0; u < kPairs / 4; ++u) {
      const float4 c = read(pair / 4 + u, 0), s = read(pair / 4 + u, to_sin);
      a.c[4 * u] = c.x, a.c[4 * u + 1] = c.y, a.c[4 * u + 2] = c.z, a.c[4 * u + 3] = c.w;
      a.s[4 * u] = s.x, a.s[4 * u + 1] = s.y, a.s[4 * u + 2] = s.z, a.s[4 * u + 3] = s.w;
    }
    return a;
  }
};

// (a, b) <- (c a - s b, c b + s a); kBack rotates by the opposite angle.
template <bool kBack>
FA3_DEVICE void rotate(float& a, float& b, float c, float s) {
  const float x = a, y = b;
  a = fmaf(kBack ? s : -s, y, c * x);
  b = fmaf(kBack ? -s : s, x, c * y);
}

// Pairs (2i, 2i+1) of one chunk.
template <bool kBack>
FA3_DEVICE void rotate_neighbours(float* chunk, const Angles<4>& a) {
#pragma unroll
  for (int i = 0; i < 4; ++i) rotate<kBack>(chunk[2 * i], chunk[2 * i + 1], a.c[i], a.s[i]);
}

// Pairs between two chunks.
template <bool kBack>
FA3_DEVICE void rotate_chunks(float* low, float* high, const Angles<8>& a) {
#pragma unroll
  for (int i = 0; i < 8; ++i) rotate<kBack>(low[i], high[i], a.c[i], a.s[i]);
}

// NeoX over the first rotary_dim < D elements: the partner is rotary_dim / 2 further on. Registers
// have no run-time index, hence one unrolled rotation per possible distance (in chunks of this
// lane).
template <class Shape, bool kBack, int kDistance = 1>
FA3_DEVICE void rotate_partial_neox(float (&v)[Shape::kValues],
                                    const TableRow<Shape::kLanes>& table, int part, int distance) {
  if constexpr (2 * kDistance < Shape::kChunks) {
    if (distance == kDistance) {
#pragma unroll
      for (int c = 0; c < kDistance; ++c)
        rotate_chunks<kBack>(v + 8 * c, v + 8 * (c + kDistance),
                             table.template angles<8>(8 * (c * Shape::kLanes + part)));
    } else {
      rotate_partial_neox<Shape, kBack, kDistance + 1>(v, table, part, distance);
    }
  }
}

// Unnormalised Hadamard transform of every kOrder elements, except its last step over neighbours
// (element bit 0): whoever consumes a pair (a, b) forms a + b and a - b, and can do so while
// scaling.
template <class Shape>
FA3_DEVICE void hadamard_but_neighbours(float (&v)[Shape::kValues], int part) {
#pragma unroll
  for (int m = Shape::kRun / 2; m >= 2; m /= 2) {
#pragma unroll
    for (int i = 0; i < Shape::kValues; ++i) {
      if (i & m) continue;
      const float a = v[i], b = v[i + m];
      v[i] = a + b;
      v[i + m] = a - b;
    }
  }
  if constexpr (Shape::kLanes == 2) {
    const float mine = part ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < Shape::kValues; ++i)
      v[i] = fmaf(mine, v[i], __shfl_xor_sync(0xffffffffu, v[i], 1));
  }
}

// The last step and the scale: (a, b) <- ((a + b) scale, (a - b) scale).
FA3_DEVICE void finish_pair(float& a, float& b, float scale) {
  const float x = a * scale, y = b;
  a = fmaf(y, scale, x);
  b = fmaf(y, -scale, x);
}

// Largest magnitude of a lane's values as the bits of a non-negative float or NaN, which order like
// integers. `pending`: the last Hadamard step is still to come: max(|a + b|, |a - b|) = |a| + |b|.
template <int kValues>
FA3_DEVICE uint32_t magnitude_bits(const float (&v)[kValues], bool pending) {
  float m[4] = {0.f, 0.f, 0.f, 0.f};
  if (pending) {
#pragma unroll
    for (int i = 0; i < kValues; i += 2)
      m[i / 2 % 4] = max_or_nan(m[i / 2 % 4], fabsf(v[i]) + fabsf(v[i + 1]));
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) m[i % 4] = max_or_nan(m[i % 4], fabsf(v[i]));
  }
  return __float_as_uint(max_or_nan(max_or_nan(m[0], m[1]), max_or_nan(m[2], m[3])));
}

// The scale of a block from the bits of its largest magnitude. `descale` multiplies codes back,
// `inverse` divides values that still lack the factor `pending`.
//   - descale = amax / 448, rounded up to 4 significant bits. A code has 4 as well, so code x
//   descale has at most 8 and
//     is exact in bf16: a 16-bit backward sees the very numbers of the FP8 forward. Codes lose
//     nothing, being floats.
//   - All zero: 1. Below the smallest normal number codes lose precision, never finiteness.
//   - Not finite: NaN, and so is every code of the block.
struct BlockScale {
  float descale, inverse;
};
FA3_DEVICE BlockScale block_scale(uint32_t bits, float pending) {
  constexpr uint32_t kInfinity = 0x7f800000u,
                     kKept = 0xfff00000u;  // sign, exponent, 3 bits of the mantissa
  constexpr float kSmallest = 1.17549435e-38f, kLargestCode = 448.f;
  if (bits == 0) return {1.f, 1.f};
  const float exact = __uint_as_float(bits) * (pending / kLargestCode);
  const float rounded = __uint_as_float((__float_as_uint(exact) + ~kKept) & kKept);
  const float descale =
      bits >= kInfinity ? __uint_as_float(0x7fffffffu) : fmaxf(rounded, kSmallest);
  return {descale, pending * reciprocal_approx(descale)};
}

}  // namespace fa3::prep

// A row between shared memory and registers: swizzled reads, signs, rotation while loading,
// conversion while writing.
//
// A warp's tile lies in shared memory as TMA leaves it: [slab][row][128 bytes], 16-byte units XORed
// with the row. A lane reads and writes its own row only (RowShape), so a warp needs no more than
// __syncwarp() around TMA.
//
// Signs multiply x while it is packed (one XOR for two elements); the product of the signs of a
// pair goes into sin when the table is filled, so that rotating signed elements gives the signed
// rotated ones.
#pragma once
#include "prep/params.h"
#include "prep/row_math.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"

namespace fa3::prep {

constexpr int kSlabBytes = 128;  // swizzle width

// Sign bits of the row: by element, and as XOR masks of chunks of eight packed elements.
template <int D>
struct SignTable {
  uint32_t bits[8];
  uint4 masks[2][D / 8];  // [0]: no signs, [1]: the signs

  // By all warps of the block; a barrier follows.
  FA3_DEVICE void fill(const float* signs, int warp, int warps, int lane) {
    for (int word = warp; word < D / 32; word += warps) {  // one element a lane
      const uint32_t ballot =
          __ballot_sync(0xffffffffu, signs != nullptr && signbit(signs[word * 32 + lane]));
      if (lane == 0) bits[word] = ballot;
      if (lane < 4) {
        const uint32_t b = ballot >> (8 * lane);
        masks[0][4 * word + lane] = make_uint4(0, 0, 0, 0);
        masks[1][4 * word + lane] = make_uint4(pair(b), pair(b >> 2), pair(b >> 4), pair(b >> 6));
      }
    }
  }
  static FA3_DEVICE uint32_t pair(uint32_t b) { return ((b & 1) << 15) | ((b & 2) << 30); }
  FA3_DEVICE uint32_t element(int i) const { return bits[i >> 5] >> (i & 31); }
  // Four sines, from pair `first` on, with the signs of their pairs.
  FA3_DEVICE uint4 fix(uint4 sines, int first, int rotary_dim, bool interleaved) const {
    auto one = [&](uint32_t sine, int pair) {
      const int a = interleaved ? 2 * pair : pair, b = interleaved ? a + 1 : a + rotary_dim / 2;
      return sine ^ ((element(a) ^ element(b)) << 31);
    };
    return make_uint4(one(sines.x, first), one(sines.y, first + 1), one(sines.z, first + 2),
                      one(sines.w, first + 3));
  }
};

// Where the angles of a token are in the tables: its own id, else its place in the sequence. -1:
// outside.
FA3_DEVICE int checked_position(int position, int positions) {
  return unsigned(position) < unsigned(positions) ? position : -1;
}

// One 16-byte unit of cos and of sin -> shared memory; NaN for a position outside of the tables,
// which must show.
FA3_DEVICE void copy_angles(uint32_t cos_at, uint32_t sin_at, const float* cos, const float* sin,
                            int position, int half, int unit) {
  if (position >= 0) {
    const int64_t src = int64_t(position) * half + unit * 4;
    cp_async_16(cos_at, cos + src);
    cp_async_16(sin_at, sin + src);
  } else {
    const uint4 nan = make_uint4(0x7fffffffu, 0x7fffffffu, 0x7fffffffu, 0x7fffffffu);
    sts128(cos_at, nan);
    sts128(sin_at, nan);
  }
}

// One lane's view of its row in the input buffer of the warp.
template <class Shape>
struct RowReader {
  uint32_t base;  // row start with the swizzle of this row in bits 4..6
  int part;

  FA3_DEVICE RowReader(uint32_t stage, int row, int part)
      : base(stage + row * kSlabBytes + ((row & 7) << 4)), part(part) {}
  // 16-byte unit `unit` of the row.
  FA3_DEVICE uint32_t unit(int unit) const {
    return (base ^ ((unit & 7) << 4)) + (unit >> 3) * (Shape::kRows * kSlabBytes);
  }
  FA3_DEVICE int chunk(int c) const { return Shape::kLanes == 1 ? c : 2 * c + part; }
};

template <class Elem>
FA3_DEVICE void unpack_chunk(float* v, uint4 x, uint4 mask) {
  const uint32_t w[4] = {x.x ^ mask.x, x.y ^ mask.y, x.z ^ mask.z, x.w ^ mask.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = unpack2<Elem>(w[i]);
    v[2 * i] = f.x, v[2 * i + 1] = f.y;
  }
}

// Input rows -> values, signed and rotated.
template <class Shape, class Elem>
FA3_DEVICE void load_forward(float (&v)[Shape::kValues], const Rotation& p,
                             const RowReader<Shape>& in, const TableRow<Shape::kLanes>& table,
                             const uint4* masks, bool rope) {
  constexpr int kChunks = Shape::kChunks;
  if (rope && !p.interleaved && !p.partial_neox) {
#pragma unroll
    for (int c = 0; c < kChunks / 2; ++c) {
      const int low = in.chunk(c), high = in.chunk(c + kChunks / 2);
      unpack_chunk<Elem>(v + 8 * c, lds128(in.unit(low)), masks[low]);
      unpack_chunk<Elem>(v + 8 * (c + kChunks / 2), lds128(in.unit(high)), masks[high]);
      rotate_chunks<false>(v + 8 * c, v + 8 * (c + kChunks / 2), table.template angles<8>(8 * low));
    }
    return;
  }
  const int rotated = rope && p.interleaved ? p.rotary_dim / 8 : 0;  // chunks
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = in.chunk(c);
    unpack_chunk<Elem>(v + 8 * c, lds128(in.unit(chunk)), masks[chunk]);
    if (chunk < rotated) rotate_neighbours<false>(v + 8 * c, table.template angles<4>(4 * chunk));
  }
}

// Gradient rows -> values, as they are.
template <class Shape, class Elem>
FA3_DEVICE void load_gradient(float (&v)[Shape::kValues], const RowReader<Shape>& in, bool fp32) {
#pragma unroll
  for (int c = 0; c < Shape::kChunks; ++c) {
    const int chunk = in.chunk(c);
    if (fp32) {
      const float4 a = lds_float4(in.unit(2 * chunk)), b = lds_float4(in.unit(2 * chunk + 1));
      v[8 * c] = a.x, v[8 * c + 1] = a.y, v[8 * c + 2] = a.z, v[8 * c + 3] = a.w;
      v[8 * c + 4] = b.x, v[8 * c + 5] = b.y, v[8 * c + 6] = b.z, v[8 * c + 7] = b.w;
    } else {
      unpack_chunk<Elem>(v + 8 * c, lds128(in.unit(chunk)), make_uint4(0, 0, 0, 0));
    }
  }
}

// One chunk -> 16-bit, in the output buffer.
template <class Elem>
FA3_DEVICE void write_chunk(const float* f, uint32_t address, uint4 mask) {
  sts128(address, make_uint4(pack2<Elem>(f[0], f[1]) ^ mask.x, pack2<Elem>(f[2], f[3]) ^ mask.y,
                             pack2<Elem>(f[4], f[5]) ^ mask.z, pack2<Elem>(f[6], f[7]) ^ mask.w));
}

// Values -> 16-bit rows; of a gradient, after the rotation back. Rotation and write share a loop,
// so that few values are alive where the branches meet.
template <class Shape, class Elem, bool kInverse>
FA3_DEVICE void write_16bit(float (&v)[Shape::kValues], const Rotation& p,
                            const RowReader<Shape>& out, const TableRow<Shape::kLanes>& table,
                            const uint4* masks, bool rope) {
  constexpr int kChunks = Shape::kChunks;
  if (kInverse && rope && !p.interleaved && !p.partial_neox) {
#pragma unroll
    for (int c = 0; c < kChunks / 2; ++c) {
      const int low = out.chunk(c), high = out.chunk(c + kChunks / 2);
      rotate_chunks<true>(v + 8 * c, v + 8 * (c + kChunks / 2), table.template angles<8>(8 * low));
      write_chunk<Elem>(v + 8 * c, out.unit(low), masks[low]);
      write_chunk<Elem>(v + 8 * (c + kChunks / 2), out.unit(high), masks[high]);
    }
    return;
  }
  const int rotated = kInverse && rope && p.interleaved ? p.rotary_dim / 8 : 0;  // chunks
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = out.chunk(c);
    if (kInverse && chunk < rotated)
      rotate_neighbours<true>(v + 8 * c, table.template angles<4>(4 * chunk));
    write_chunk<Elem>(v + 8 * c, out.unit(chunk), masks[chunk]);
  }
}

// Values / scale -> e4m3 rows in the output buffer.
template <class Shape>
FA3_DEVICE void write_e4m3(float (&v)[Shape::kValues], const RowReader<Shape>& out, float inverse,
                           bool pending) {
  // A chunk is 8 bytes. With one lane a row two of them make a 16-byte unit, which is free of bank
  // conflicts.
  constexpr int kTogether = Shape::kLanes == 1 ? 2 : 1;
#pragma unroll
  for (int c = 0; c < Shape::kChunks; c += kTogether) {
    uint32_t w[2 * kTogether];
#pragma unroll
    for (int h = 0; h < 2 * kTogether; ++h) {
      float* f = v + 8 * c + 4 * h;
      if (pending) {
        finish_pair(f[0], f[1], inverse);
        finish_pair(f[2], f[3], inverse);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) f[i] *= inverse;
      }
      w[h] = pack4_e4m3(f[0], f[1], f[2], f[3]);
    }
    const int chunk = out.chunk(c);
    if constexpr (kTogether == 2)
      sts128(out.unit(chunk / 2), make_uint4(w[0], w[1], w[2], w[3]));
    else
      sts64(out.unit(chunk / 2) + (chunk & 1) * 8, w[0], w[1]);
  }
}

}  // namespace fa3::prep

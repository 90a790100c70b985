// 16-bit results at the speed of a copy, for head dims 64 and 128: rotation, Hadamard, both, and
// their gradients.
//
//   forward  x -> [rotation] -> [signs, Hadamard] -> 16-bit
//   inverse  gradient -> [Hadamard, signs] -> [rotation by the opposite angle] -> 16-bit
//
// Without a block maximum every row (token, head) stands alone, so a tile is 64 rows that lie
// together in memory: all heads of a few tokens. A warpgroup takes tiles in turn, each through a
// ring of buffers in shared memory: TMA brings x and the angles of the tile's tokens, the results
// overwrite x in place, and TMA stores them. Warpgroups share the matrices and nothing else.
//
// The transform is that of transform.cuh.
#pragma once
#include "prep/row_io.cuh"
#include "prep/tile_order.cuh"
#include "prep/transform.cuh"

namespace fa3::prep {

template <int D>
struct TileTraits {
  static_assert(D == 64 || D == 128, "one or two parts");
  static constexpr int kParts = D / 64;
  static constexpr int kThreads = 512;
  static constexpr int kWarpgroups = kThreads / kWarpgroupThreads;
  static constexpr int kRowsLog2 = 6;
  static constexpr int kMaxStages = 4;
  static constexpr int kTileBytes = kWarpgroupRows * D * 2;
  static constexpr int kAngleBytes = D * 4;  // cos and sin of a token
  // Signs cost nothing where they are part of the matrices. Those of a gradient come after the
  // product, which is then the same for both parts.
  static FA3_HD constexpr int matrix_bytes(bool inverse) {
    return (inverse ? 1 : kParts) * kMatrixBytes;
  }
};

template <int D>
struct TileControl {
  using Traits = TileTraits<D>;
  uint64_t full[Traits::kWarpgroups][Traits::kMaxStages];
  Tile tiles[Traits::kWarpgroups][Traits::kMaxStages];
  alignas(16) uint32_t signs[D];  // the sign bit of each element
  SignTable<D> table;
};

// A row of angles for positions outside of the tables: NaN, which must show.
#define FA3_NAN8                                                                             \
  0x7fffffffu, 0x7fffffffu, 0x7fffffffu, 0x7fffffffu, 0x7fffffffu, 0x7fffffffu, 0x7fffffffu, \
      0x7fffffffu
namespace {
__device__ __align__(16) uint32_t kNoAngles[64] = {FA3_NAN8, FA3_NAN8, FA3_NAN8, FA3_NAN8,
                                                   FA3_NAN8, FA3_NAN8, FA3_NAN8, FA3_NAN8};
}
#undef FA3_NAN8

// Angles of a token in shared memory: D / 2 cosines, then the sines.
template <int D>
struct TokenAngles {
  uint32_t at[2];  // of the thread's rows; the thread's place in a quad included
  bool interleaved;

  // Four pairs: elements 4 s .. of block b and of its partner.
  FA3_DEVICE void neox(int h, int b, int s, float4& c, float4& sn) const {
    const uint32_t a = at[h] + 128 * b + 16 * s;
    c = lds_float4(a), sn = lds_float4(a + 2 * D);
  }
  // Two pairs: elements 4 s .. of block b.
  FA3_DEVICE void neighbours(int h, int b, int s, float2& c, float2& sn) const {
    const uint32_t a = at[h] + 64 * b + 8 * s;
    c = lds_float2(a), sn = lds_float2(a + 2 * D);
  }
};

FA3_DEVICE void flip(float& x, uint32_t sign) {
  x = __uint_as_float(__float_as_uint(x) ^ sign);
}

// low, high: elements 4 s .. of block b and of its partner, of the thread's row h.
template <int D, bool kBack>
FA3_DEVICE void rotate_step(float* low, float* high, const TokenAngles<D>& angles, int h, int b,
                            int s) {
  if (angles.interleaved) {
    float2 c, sn;
    angles.neighbours(h, b, s, c, sn);
    rotate<kBack>(low[0], low[1], c.x, sn.x);
    rotate<kBack>(low[2], low[3], c.y, sn.y);
    angles.neighbours(h, b + D / 64, s, c, sn);
    rotate<kBack>(high[0], high[1], c.x, sn.x);
    rotate<kBack>(high[2], high[3], c.y, sn.y);
  } else {
    float4 c, sn;
    angles.neox(h, b, s, c, sn);
    rotate<kBack>(low[0], high[0], c.x, sn.x);
    rotate<kBack>(low[1], high[1], c.y, sn.y);
    rotate<kBack>(low[2], high[2], c.z, sn.z);
    rotate<kBack>(low[3], high[3], c.w, sn.w);
  }
}

template <int D, class Elem, bool kRotate, bool kHadamard, bool kInverse>
__global__ void __launch_bounds__(TileTraits<D>::kThreads, 1)
    tile_kernel(const __grid_constant__ TileParams p) {
  using Traits = TileTraits<D>;
  constexpr int kParts = Traits::kParts;
  constexpr int kFurther = D / 64;
  constexpr bool kFirst = kRotate && kHadamard && !kInverse;  // rotation before the product
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& control = *reinterpret_cast<TileControl<D>*>(shared + p.control_offset);
  const int thread = threadIdx.x, lane = thread % 32, warp = uniform(thread / 32);
  const int wg = warp / kWarpgroupWarps, wg_warp = warp % kWarpgroupWarps;
  const int g = lane / 4, q = lane % 4;
  const uint32_t base = smem_addr(shared) + wg * p.stages * p.stage_bytes;
  const uint32_t matrices = smem_addr(shared) + p.matrix_offset;
  const uint32_t full = smem_addr(&control.full[wg][0]);
  Tile* tiles = control.tiles[wg];

  if (thread == 0) {
#pragma unroll 1
    for (int i = 0; i < Traits::kWarpgroups * Traits::kMaxStages; ++i)
      mbar_init(smem_addr(&control.full[0][0]) + 8 * i, 1);
    mbar_init_fence();
  }
  if (thread < p.num_tensors) tma_prefetch_map(&p.in[thread]);
  if constexpr (kHadamard) {
    control.table.fill(p.signs, warp, Traits::kThreads / 32, lane);
    if (kInverse && thread < D)
      control.signs[thread] = p.signs != nullptr && signbit(p.signs[thread]) ? 0x80000000u : 0u;
  }
  __syncthreads();

  // By warp 0 of the warpgroup: lane 0 brings the rows, a lane per token brings the angles.
  auto request = [&](int index, int stage) {
    const Tile tile = locate_tile(p, Traits::kRowsLog2, index);
    const uint32_t bar = full + 8 * stage, to = base + stage * p.stage_bytes;
    const int tokens = kRotate ? kWarpgroupRows >> p.tensors[tile.tensor].heads_log2 : 0;
    if (lane == 0) {
      tiles[stage] = tile;
      mbar_arrive_expect_tx(bar, Traits::kTileBytes + tokens * Traits::kAngleBytes);
#pragma unroll
      for (int s = 0; s < kParts; ++s)
        tma_load_4d(to + s * kWarpgroupRows * kSlabBytes, &p.in[tile.tensor], bar, kL2EvictNormal,
                    s * kSlabBytes / 2, tile.head, tile.token, tile.batch);
    }
    if constexpr (kRotate) {
      __syncwarp();
      if (lane < tokens) {
        // A position outside of the tables takes the row of NaN behind them.
        const int position = position_of(p, tile.batch, tile.token + lane);
        const uint32_t at = to + Traits::kTileBytes + lane * Traits::kAngleBytes;
        const int64_t first = int64_t(position) * (D / 2);
        const void* cos =
            position < 0 ? static_cast<const void*>(kNoAngles) : p.rotation.cos + first;
        const void* sin =
            position < 0 ? static_cast<const void*>(kNoAngles) : p.rotation.sin + first;
        bulk_load(at, cos, 2 * D, bar);
        bulk_load(at + 2 * D, sin, 2 * D, bar);
      }
    }
  };

  const int stride = gridDim.x * Traits::kWarpgroups;
  const int begin = blockIdx.x * Traits::kWarpgroups + wg;
  if (wg_warp == 0)
    for (int s = 0; s < p.stages; ++s)
      if (begin + s * stride < p.tiles) request(begin + s * stride, s);
  if constexpr (kHadamard) {
#pragma unroll 1
    for (int part = 0; part < (kInverse ? 1 : kParts); ++part) {
      unsigned char* matrix = shared + p.matrix_offset + part * kMatrixBytes;
      const uint32_t* signs = kInverse ? nullptr : control.table.bits + part * (kPart / 32);
      if constexpr (kFirst)
        build_matrix<bf16>(matrix, signs, true);
      else
        build_matrix<Elem>(matrix, signs, false);
    }
    fence_proxy_async_shared();
  }
  __syncthreads();

  const int row = wg_warp * 16 + fragment_row(g, kFirst || !kHadamard);
  int stage = 0, turn = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int index = begin; index < p.tiles; index += stride, ++turn) {
    const uint32_t x = base + stage * p.stage_bytes;
    mbar_wait(full + 8 * stage, parity);
    // 16-byte unit 4 (b % 2) + q of slab b / 2, of the thread's rows.
    const uint32_t mine = x + row * kSlabBytes + ((q ^ (row & 7)) << 4);
    auto unit = [&](int b, int h) {
      return (mine ^ ((b % 2) << 6)) + (b / 2 * kWarpgroupRows + h * 8) * kSlabBytes;
    };
    TokenAngles<D> angles;
    if constexpr (kRotate) {
      const int heads_log2 = p.tensors[tiles[stage].tensor].heads_log2;
      angles.interleaved = p.rotation.interleaved != 0;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        angles.at[h] = x + Traits::kTileBytes +
                       ((row + 8 * h) >> heads_log2) * Traits::kAngleBytes +
                       (angles.interleaved ? 16 : 32) * q;
    }

    float acc[kParts][32];
    if constexpr (kHadamard && !kFirst) {
      multiply_rows<Elem>(acc, x, matrices, kInverse ? 0 : kMatrixBytes);
      named_sync(1 + wg, kWarpgroupThreads);  // all have read x: results take its place
    }
    if constexpr (kFirst || !kHadamard) {
      const uint64_t b_form = descriptor_at(descriptor_form<128>(16), matrices);
      Operand operand;
#pragma unroll
      for (int b = 0; b < kFurther; ++b) {
        uint4 raw[2][2];  // [row half][partner]
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int w = 0; w < 2; ++w) raw[h][w] = lds128(unit(b + w * kFurther, h));
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          Step step;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int w = 0; w < 2; ++w) unpack_step<Elem>(step[w][h], raw[h][w], s);
            rotate_step<D, kInverse>(step[0][h], step[1][h], angles, h, b, s);
          }
          if constexpr (!kHadamard) {
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int w = 0; w < 2; ++w) {
                const float* e = step[w][h];
                (s ? raw[h][w].z : raw[h][w].x) = pack2<Elem>(e[0], e[1]);
                (s ? raw[h][w].w : raw[h][w].y) = pack2<Elem>(e[2], e[3]);
              }
          } else {
            if (b + s > 0) {  // the products of the step before have read their registers
              wgmma_wait<0>();
              operand.keep();
            }
            operand.split(step);
            multiply_step<D>(acc, operand, b_form, kMatrixBytes, b, s);
          }
        }
        if constexpr (!kHadamard) {
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int w = 0; w < 2; ++w) sts128(unit(b + w * kFurther, h), raw[h][w]);
        }
      }
      if constexpr (kHadamard) {
        wgmma_wait<0>();
#pragma unroll
        for (int part = 0; part < kParts; ++part) pin(acc[part]);
        operand.keep();
      }
    }

    if constexpr (kHadamard) {
      constexpr float kScale = hadamard_scale<D>();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int b = 0; b < kFurther; ++b) {
          float f[2][8];  // of block b and of its partner
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const int r = 4 * (4 * (b % 2) + e / 2) + 2 * h + e % 2;
            if constexpr (kParts == 2) {  // the butterfly between the parts
              f[0][e] = acc[0][r], f[1][e] = acc[1][r];
              finish_pair(f[0][e], f[1][e], kScale);
            } else {
              f[0][e] = acc[0][r] * kScale, f[1][e] = acc[0][r + 16] * kScale;
            }
          }
          if constexpr (kInverse && kRotate) {
#pragma unroll
            for (int s = 0; s < 2; ++s) {
#pragma unroll
              for (int w = 0; w < 2; ++w) {
                const uint4 sign =
                    lds128(smem_addr(control.signs) + 128 * (b + w * kFurther) + 32 * q + 16 * s);
                float* e = f[w] + 4 * s;
                flip(e[0], sign.x), flip(e[1], sign.y), flip(e[2], sign.z), flip(e[3], sign.w);
              }
              rotate_step<D, true>(f[0] + 4 * s, f[1] + 4 * s, angles, h, b, s);
            }
          }
#pragma unroll
          for (int w = 0; w < 2; ++w) {
            const float* e = f[w];
            uint4 words = make_uint4(pack2<Elem>(e[0], e[1]), pack2<Elem>(e[2], e[3]),
                                     pack2<Elem>(e[4], e[5]), pack2<Elem>(e[6], e[7]));
            if constexpr (kInverse && !kRotate) {
              const uint4 mask = control.table.masks[1][4 * (b + w * kFurther) + q];
              words.x ^= mask.x, words.y ^= mask.y, words.z ^= mask.z, words.w ^= mask.w;
            }
            sts128(unit(b + w * kFurther, h), words);
          }
        }
      }
    }

    // ---- store; the buffer before this one is free once its store has read it
    fence_proxy_async_shared();
    named_sync(1 + wg, kWarpgroupThreads);
    if (wg_warp == 0) {
      if (lane == 0) {
        const Tile tile = tiles[stage];
#pragma unroll
        for (int s = 0; s < kParts; ++s)
          tma_store_4d(&p.out[tile.tensor], x + s * kWarpgroupRows * kSlabBytes, s * kSlabBytes / 2,
                       tile.head, tile.token, tile.batch);
        bulk_commit();
        bulk_wait_read<1>();
      }
      __syncwarp();
      const int next = index + (p.stages - 1) * stride;
      if (turn > 0 && next < p.tiles) request(next, stage == 0 ? p.stages - 1 : stage - 1);
    }
    if (++stage == p.stages) stage = 0, parity ^= 1;
  }
  if (wg_warp == 0 && lane == 0) bulk_wait_read<0>();
}

template <int D, class Elem>
const void* tile_kernel_address(bool rotate, bool hadamard, bool inverse) {
  const void* table[2][2][2] = {
      {{nullptr, nullptr},
       {reinterpret_cast<const void*>(&tile_kernel<D, Elem, false, true, false>),
        reinterpret_cast<const void*>(&tile_kernel<D, Elem, false, true, true>)}},
      {{reinterpret_cast<const void*>(&tile_kernel<D, Elem, true, false, false>),
        reinterpret_cast<const void*>(&tile_kernel<D, Elem, true, false, true>)},
       {reinterpret_cast<const void*>(&tile_kernel<D, Elem, true, true, false>),
        reinterpret_cast<const void*>(&tile_kernel<D, Elem, true, true, true>)}}};
  return table[rotate][hadamard][inverse];
}

}  // namespace fa3::prep

// The block kernel's and the token kernel's work on tensor cores, for head dims 64 and 128.
//
//   forward  x 16-bit -> [rotation] -> [signs, Hadamard] -> e4m3 + descale per 128 tokens, or 16-bit
//   inverse  gradient 16-bit -> Hadamard, signs -> [rotation by the opposite angle] -> 16-bit
//
// A warpgroup owns 64 rows (tokens of one head). The transform of 64 neighbouring elements is a product with a 64 x 64
// matrix of +-1 in shared memory that holds the signs too; 128 is two of those and one butterfly between their results.
// Where nothing precedes the transform, wgmma reads x straight from the TMA buffer, and no element passes through a
// register before it is an FP32 sum. A tensor without transform multiplies by the identity: V costs nothing extra.
//
// Rotated elements come from registers, as high and low bf16 parts: 16 bits, enough for one e4m3 step. The matrix
// absorbs all orders: its rows follow the order in which a thread's eight neighbouring elements fill the A fragment,
// its columns the order that puts 16 (e4m3) or 8 (16-bit) neighbouring results into a thread. So x, cos and sin are
// read and results written 16 bytes at a time.
//
// Work items, cos and sin in shared memory, and the block maximum are as in blocks.cuh; a group is two warpgroups.
#pragma once
#include "prep/items.cuh"
#include "prep/row_io.cuh"
#include "ptx/wgmma.cuh"
#include "tile/layout.cuh"

namespace fa3::prep {

template <int D>
struct MmaTraits {
  static_assert(D == 64 || D == 128, "one or two parts");
  static constexpr int kParts = D / 64;
  static constexpr int kBlocks = D / 32;     // pieces whose rotation partner is kBlocks / 2 further on
  static constexpr int kThreads = 512;       // 128 registers: 64 sums, 16 parts of A
  static constexpr int kWarpgroups = kThreads / kWarpgroupThreads;
  static constexpr int kGroups = kWarpgroups / 2;
  static constexpr int kStages = 2;
  static constexpr int kTokens = 128;
  static constexpr int kStageBytes = kWarpgroupRows * D * 2;
  static constexpr int kMatrixBytes = 64 * 64 * 2;
  static constexpr int kTableBytes = kTokens * D / 2 * 8;
  static constexpr float kScale = D == 64 ? 0.125f : 0.08838834764831845f;  // 1 / sqrt(D)
};

template <int D>
struct MmaControl {
  uint64_t full[MmaTraits<D>::kWarpgroups][MmaTraits<D>::kStages];
  Item items[2];
  alignas(16) uint32_t amax[2][MmaTraits<D>::kThreads / 32];  // of each warp
};

// Which element of a part sits in k-slot k of the A fragment: thread q of a quad holds elements 8q .. 8q + 7 and
// 32 + 8q .. of a row, four per k-step.
FA3_HD int slot_element(int k) {
  const int step = k / 16, inside = k % 16;
  return (step / 2) * 32 + (inside % 8 / 2) * 8 + (step % 2) * 4 + inside / 8 * 2 + inside % 2;
}
// Which element of a part column n of the accumulator is: 16 neighbours a thread for e4m3, 8 for 16 bits.
FA3_HD int column_element(int n, bool e4m3_out) {
  const int j = n / 8, q = n % 8 / 2, e = n % 2;
  return e4m3_out ? 16 * q + 2 * j + e : 32 * (j / 4) + 8 * q + 2 * (j % 4) + e;
}
// Row of the warp's 16 that lane group g holds as its first (the second is 8 further on). Rotated tensors: neighbours
// in a shared-memory phase differ in bit 2, so that their swizzled units are disjoint.
FA3_HD int fragment_row(int g, bool permuted) { return permuted ? ((g & 1) << 2) | (g >> 1) : g; }

// A 64 x 64 matrix as the K-major B operand: row n, column k. By all threads.
//   value = sign * (-1)^popcount(k & n) or, without a transform, the identity; `negative`: another factor -1
template <int D, class Elem>
FA3_DEVICE void build_matrix(unsigned char* matrix, const MmaParams& p, bool hadamard, bool slots, bool inverse,
                             int part_k, int part_n) {
  const bool negative = inverse && hadamard && (part_k & part_n);
  for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) {
    const int n = i / 64, k = i % 64;
    const int from = slots ? slot_element(k) : k, to = column_element(n, p.quantize != 0);
    float value = from == to ? 1.f : 0.f;
    if (hadamard) {
      value = (__popc(from & to) & 1) ^ int(negative) ? -1.f : 1.f;
      if (p.signs && signbit(p.signs[inverse ? part_n * 64 + to : part_k * 64 + from])) value = -value;
    }
    *reinterpret_cast<Elem*>(matrix + tile_offset<128, 2>(64, n, k)) = Elem(value);
  }
}

// cos and sin of the item's tokens -> shared memory, in fragment order: [16 rows][row half][block][unit][lane].
template <int D>
FA3_DEVICE void fill_fragments(const MmaParams& p, const Item& it, uint32_t table, bool permuted) {
  using Traits = MmaTraits<D>;
  constexpr int kUnits = D / 8;  // 16-byte units of a row of cos
  const Rotation& rotation = p.rotation;
#pragma unroll 2
  for (int i = threadIdx.x; i < Traits::kTokens * kUnits; i += Traits::kThreads) {
    const int row = i / kUnits, unit = i % kUnits;
    const int token = min(row, it.tokens - 1);
    const int position =
        rotation.position_ids ? rotation.position_ids[it.position_row + token] : it.position0 + token;
    const int r = row % 8, g = permuted ? ((r & 3) << 1) | (r >> 2) : r;  // inverse of fragment_row
    // NeoX: eight pairs a lane and block, cos in units 0, 1, sin in 2, 3. Interleaved: four pairs, units 0 and 1.
    const int block = rotation.interleaved ? unit / 4 : unit / 8;
    const int q = rotation.interleaved ? unit % 4 : unit % 8 / 2;
    const int first = rotation.interleaved ? 2 * block : 4 * block + unit % 2;
    const int step = rotation.interleaved ? 1 : 2;
    const uint32_t at = table + (((row / 8) * (4 * Traits::kBlocks / 2) + first) * 32 + g * 4 + q) * 16;
    copy_angles(at, at + step * 512, rotation.cos, rotation.sin, checked_position(position, rotation.positions), D / 2,
                unit);
  }
  cp_async_wait_all();
}

// cos and sin of a lane, kPairs of each, one row of the fragment-ordered table.
template <int kPairs>
FA3_DEVICE Angles<kPairs> fragment_angles(uint32_t at) {
  Angles<kPairs> a;
#pragma unroll
  for (int u = 0; u < kPairs / 4; ++u) {
    const float4 c = lds_float4(at + u * 512), s = lds_float4(at + (kPairs / 4 + u) * 512);
    a.c[4 * u] = c.x, a.c[4 * u + 1] = c.y, a.c[4 * u + 2] = c.z, a.c[4 * u + 3] = c.w;
    a.s[4 * u] = s.x, a.s[4 * u + 1] = s.y, a.s[4 * u + 2] = s.z, a.s[4 * u + 3] = s.w;
  }
  return a;
}

// Two values -> bf16 high parts and bf16 rests.
FA3_DEVICE void split(float a, float b, uint32_t& high, uint32_t& low) {
  high = pack2<bf16>(a, b);
  const float2 h = unpack2<bf16>(high);
  low = pack2<bf16>(a - h.x, b - h.y);
}

// acc = rotated rows times the matrices. `x`: the warpgroup's rows as TMA left them. A step is four elements of two
// blocks that rotate into each other (interleaved: any two); its products run while the next step is rotated.
template <int D, class Elem>
FA3_DEVICE void rotate_and_multiply(float (&acc)[D / 64][32], uint32_t x, uint32_t table, uint32_t row_half,
                                    uint32_t matrices, int g, int q, int warp, bool interleaved) {
  constexpr int kFurther = D / 64;  // blocks between partners
  using Product = Wgmma<bf16, 64>;
  const int rho = fragment_row(g, true);
  const uint32_t base = x + (warp * 16 + rho) * kSlabBytes + ((q ^ rho) << 4);
  const uint64_t b_form = descriptor_at(descriptor_form<128>(16), matrices);
  uint32_t high[2][4], low[2][4];
#pragma unroll
  for (int b = 0; b < kFurther; ++b) {
    uint4 raw[2][2];  // [row half][partner]
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const int block = b + w * kFurther;
        raw[h][w] = lds128((base ^ ((block % 2) << 6)) + block / 2 * kWarpgroupRows * kSlabBytes + h * 8 * kSlabBytes);
      }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      float v[2][2][4];  // [row half][partner][element]
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const uint4& r = raw[h][w];
          const float2 a = unpack2<Elem>(s ? r.z : r.x), c = unpack2<Elem>(s ? r.w : r.y);
          v[h][w][0] = a.x, v[h][w][1] = a.y, v[h][w][2] = c.x, v[h][w][3] = c.y;
        }
        const uint32_t at = table + h * row_half;
        if (interleaved) {
#pragma unroll
          for (int w = 0; w < 2; ++w) {
            const int block = b + w * kFurther;
            const float4 c = lds_float4(at + 2 * block * 512), sn = lds_float4(at + (2 * block + 1) * 512);
            rotate<false>(v[h][w][0], v[h][w][1], s ? c.z : c.x, s ? sn.z : sn.x);
            rotate<false>(v[h][w][2], v[h][w][3], s ? c.w : c.y, s ? sn.w : sn.y);
          }
        } else {
          const float4 c = lds_float4(at + (4 * b + s) * 512), sn = lds_float4(at + (4 * b + 2 + s) * 512);
          rotate<false>(v[h][0][0], v[h][1][0], c.x, sn.x);
          rotate<false>(v[h][0][1], v[h][1][1], c.y, sn.y);
          rotate<false>(v[h][0][2], v[h][1][2], c.z, sn.z);
          rotate<false>(v[h][0][3], v[h][1][3], c.w, sn.w);
        }
      }
      if (b + s > 0) {  // the products of the step before have read their registers
        wgmma_wait<0>();
#pragma unroll
        for (int w = 0; w < 2; ++w) pin(high[w]), pin(low[w]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          split(v[h][w][0], v[h][w][1], high[w][h], low[w][h]);
          split(v[h][w][2], v[h][w][3], high[w][2 + h], low[w][2 + h]);
        }
      wgmma_fence();
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const int block = b + w * kFurther, part = block / 2;
        const uint64_t bs = descriptor_step(b_form, part * MmaTraits<D>::kMatrixBytes + (block % 2 * 2 + s) * 32);
        const uint32_t* a = high[w];
        if (block % 2 == 0 && s == 0) Product::template rs_zero<0>(acc[part], a[0], a[1], a[2], a[3], bs);
        else Product::template rs<0>(acc[part], a[0], a[1], a[2], a[3], bs);
        a = low[w];
        Product::template rs<0>(acc[part], a[0], a[1], a[2], a[3], bs);
      }
      wgmma_commit();
    }
  }
  wgmma_wait<0>();
#pragma unroll
  for (int part = 0; part < D / 64; ++part) pin(acc[part]);
#pragma unroll
  for (int w = 0; w < 2; ++w) pin(high[w]), pin(low[w]);
}

template <int D, class Elem, bool kInverse>
__global__ void __launch_bounds__(MmaTraits<D>::kThreads, 1) mma_kernel(const __grid_constant__ MmaParams p) {
  using Traits = MmaTraits<D>;
  constexpr int kParts = Traits::kParts, kBlocks = Traits::kBlocks, kStages = Traits::kStages;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& control = *reinterpret_cast<MmaControl<D>*>(shared + p.control_offset);
  const int thread = threadIdx.x, lane = thread % 32, warp = uniform(thread / 32);
  const int wg = warp / kWarpgroupWarps, group = wg / 2, half = wg % 2;
  const int g = lane / 4, q = lane % 4;

  const uint32_t stages = smem_addr(shared) + wg * kStages * Traits::kStageBytes;
  const uint32_t matrices = smem_addr(shared) + p.matrix_offset;
  const uint32_t table_base = smem_addr(shared) + p.table_offset;
  const uint32_t full = smem_addr(&control.full[wg][0]);

  // ---- set-up: barriers, matrices, the first item
  if (thread == 0) {
#pragma unroll 1
    for (int i = 0; i < Traits::kWarpgroups * kStages; ++i) mbar_init(smem_addr(&control.full[0][0]) + 8 * i, 1);
    mbar_init_fence();
    control.items[0] = decode_item(p, blockIdx.x);
  }
  if constexpr (kInverse) {
#pragma unroll 1
    for (int m = 0; m < kParts * kParts; ++m)
      build_matrix<D, Elem>(shared + p.matrix_offset + m * Traits::kMatrixBytes, p, true, false, true, m / kParts,
                            m % kParts);
  } else {
#pragma unroll 1
    for (int m = 0; m < kParts; ++m) {
      const int at = m * Traits::kMatrixBytes;
      if (p.turned)
        build_matrix<D, bf16>(shared + p.matrix_offset + at, p, p.turned_hadamard, true, false, m, m);
      if (p.straight)
        build_matrix<D, Elem>(shared + p.straight_offset + at, p, p.straight_hadamard, false, false, m, m);
    }
  }
  fence_proxy_async_shared();  // wgmma reads the matrices
  if (thread < p.num_tensors) tma_prefetch_map(&p.in[thread]);
  __syncthreads();

  auto tensor_of = [&](int head) { return (head >= p.first_tile[1]) + (head >= p.first_tile[2]); };

  // ---- loads: up to kStages tiles ahead, by warp 0 of the warpgroup; the cursor stops where the next item is unknown
  int cursor = group, requested = 0, consumed = 0;
  bool cursor_in_next = false;
  auto request_more = [&](const Item& it, const Item& next) {
    if (warp % kWarpgroupWarps != 0) return;
    while (requested - consumed < kStages) {
      if (!cursor_in_next && (it.tokens == 0 || cursor >= it.count)) {
        cursor = group;
        cursor_in_next = true;
      }
      if (cursor_in_next && (next.tokens == 0 || cursor >= next.count)) return;
      const Item& from = cursor_in_next ? next : it;
      const int any_head = uniform(from.phase) + cursor * p.phases;
      const int t = tensor_of(any_head), head = any_head - p.first_tile[t];
      const int token = uniform(from.token0) + half * kWarpgroupRows, batch = uniform(from.batch);
      const int stage = requested % kStages;
      if (elect_one()) {
        mbar_arrive_expect_tx(full + 8 * stage, Traits::kStageBytes);
#pragma unroll
        for (int s = 0; s < kParts; ++s)
          tma_load_4d(stages + stage * Traits::kStageBytes + s * kWarpgroupRows * kSlabBytes, &p.in[t],
                      full + 8 * stage, kL2EvictNormal, s * kSlabBytes / 2, head, token, batch);
      }
      __syncwarp();
      ++requested;
      cursor += Traits::kGroups;
    }
  };

  int buffer = 0, turn = 0;
  for (int index = blockIdx.x; index < p.items; index += gridDim.x, turn ^= 1) {
    if (index != blockIdx.x) __syncthreads();  // everybody is done with the table and the other item
    const Item& it = control.items[turn];
    const Item& next = control.items[turn ^ 1];
    if (thread == 0) control.items[turn ^ 1] = decode_item(p, index + gridDim.x);
    if (it.tokens == 0 && p.quantize) {  // a slot that no sequence needs: keep its scale harmless
      for (int i = thread; i < it.count; i += Traits::kThreads) {
        const int any_head = it.phase + i * p.phases, t = tensor_of(any_head);
        const MmaTensor& tensor = p.tensors[t];
        tensor.descale[(int64_t(it.batch_out) * tensor.heads + any_head - p.first_tile[t]) * p.blocks + it.block] = 1.f;
      }
    }
    if (it.tokens > 0 && p.rotation.cos != nullptr) fill_fragments<D>(p, it, table_base, !kInverse);
    __syncthreads();
    if (!cursor_in_next) cursor = group;  // else it keeps its place in what has become the current item
    cursor_in_next = false;
    request_more(it, next);
    if (it.tokens == 0) continue;

#pragma unroll 1
    for (int i = group; i < it.count; i += Traits::kGroups) {
      const int any_head = it.phase + i * p.phases;
      const int t = tensor_of(any_head), head = any_head - p.first_tile[t];
      const MmaTensor& tensor = p.tensors[t];
      const bool turned = !kInverse && tensor.rope != 0;
      const bool hadamard = kInverse || (turned ? p.turned_hadamard : p.straight_hadamard) != 0;
      const int stage = consumed % kStages;
      const uint32_t x = stages + stage * Traits::kStageBytes;
      const int row = half * kWarpgroupRows + warp % kWarpgroupWarps * 16 + fragment_row(g, turned);
      const uint32_t table = table_base + (row / 16 * 2 * (4 * kBlocks / 2) * 32 + lane) * 16;
      constexpr uint32_t kRowHalf = 4 * kBlocks / 2 * 32 * 16;

      // ---- product
      float acc[kParts][32];
      mbar_wait(full + 8 * stage, consumed / kStages & 1);
      if (turned) {
        rotate_and_multiply<D, Elem>(acc, x, table, kRowHalf, matrices, g, q, warp % kWarpgroupWarps,
                                     p.rotation.interleaved != 0);
      } else {
        const uint64_t a = descriptor_at(descriptor_form<128>(16), x);
        const uint32_t set = kInverse ? matrices : smem_addr(shared) + p.straight_offset;
        const uint64_t b = descriptor_at(descriptor_form<128>(16), set);
        using Product = Wgmma<Elem, 64>;
        wgmma_fence();
#pragma unroll
        for (int to = 0; to < kParts; ++to) {
#pragma unroll
          for (int from = kInverse ? 0 : to; from <= (kInverse ? kParts - 1 : to); ++from) {
            const int m = kInverse ? from * kParts + to : to;
#pragma unroll
            for (int s = 0; s < 4; ++s) {
              const uint64_t as = descriptor_step(a, from * kWarpgroupRows * kSlabBytes + s * 32);
              const uint64_t bs = descriptor_step(b, m * Traits::kMatrixBytes + s * 32);
              if (s == 0 && from == (kInverse ? 0 : to)) Product::template ss_zero<0, 0>(acc[to], as, bs);
              else Product::template ss<0, 0>(acc[to], as, bs);
            }
          }
        }
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int part = 0; part < kParts; ++part) pin(acc[part]);
      }
      ++consumed;

      // ---- block maximum; the barrier also says that the input has been read
      const bool there[2] = {row < it.tokens, row + 8 < it.tokens};
      const bool pending = kParts == 2 && hadamard && !kInverse;
      float scale = hadamard ? Traits::kScale : 1.f;
      if (!kInverse && p.quantize) {
        float top[2] = {0.f, 0.f};
#pragma unroll
        for (int r = 0; r < 32; ++r) {
          float& m = top[(r >> 1) & 1];
          if (pending) {
            m = max_or_nan(m, fabsf(acc[0][r]) + fabsf(acc[kParts - 1][r]));
          } else {
#pragma unroll
            for (int part = 0; part < kParts; ++part) m = max_or_nan(m, fabsf(acc[part][r]));
          }
        }
        const float mine = max_or_nan(there[0] ? top[0] : 0.f, there[1] ? top[1] : 0.f);
        const uint32_t warp_top = warp_max(__float_as_uint(mine));
        if (lane == 0) control.amax[buffer][warp] = warp_top;
        named_sync(1 + group, 2 * kWarpgroupThreads);
        const uint4 low = lds128(smem_addr(&control.amax[buffer][group * 8]));
        const uint4 high = lds128(smem_addr(&control.amax[buffer][group * 8 + 4]));
        const uint32_t bits =
            max(max(max(low.x, low.y), max(low.z, low.w)), max(max(high.x, high.y), max(high.z, high.w)));
        buffer ^= 1;
        const BlockScale block = block_scale(bits, scale);
        scale = block.inverse;
        if (thread % (2 * kWarpgroupThreads) == 0)
          tensor.descale[(int64_t(it.batch_out) * tensor.heads + head) * p.blocks + it.block] = block.descale;
      } else {
        named_sync(1 + wg, kWarpgroupThreads);
      }
      request_more(it, next);

      // ---- scale, last butterfly or rotation back, conversion, store
      char* out = tensor.out + it.batch * tensor.out_batch + int64_t(it.token0 + row) * tensor.out_token +
                  int64_t(head) * tensor.out_head;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float f[kParts][16];
#pragma unroll
        for (int e = 0; e < 16; ++e) {
          const int r = 4 * (e / 2) + 2 * h + e % 2;
          if (pending) {
            f[0][e] = acc[0][r], f[kParts - 1][e] = acc[kParts - 1][r];
            finish_pair(f[0][e], f[kParts - 1][e], scale);
          } else {
#pragma unroll
            for (int part = 0; part < kParts; ++part) f[part][e] = acc[part][r] * scale;
          }
        }
        char* dst = out + h * 8 * tensor.out_token;
        if (!kInverse && p.quantize) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const float* v = f[part];
            const uint4 codes =
                make_uint4(pack4_e4m3(v[0], v[1], v[2], v[3]), pack4_e4m3(v[4], v[5], v[6], v[7]),
                           pack4_e4m3(v[8], v[9], v[10], v[11]), pack4_e4m3(v[12], v[13], v[14], v[15]));
            if (there[h]) *reinterpret_cast<uint4*>(dst + part * 64 + q * 16) = codes;
          }
        } else {
          if (kInverse && tensor.rope) {
            // Block b of the row is f[b / 2] from 8 (b % 2) on.
            const uint32_t angles = table + h * kRowHalf;
            if (p.rotation.interleaved) {
#pragma unroll
              for (int b = 0; b < kBlocks; ++b)
                rotate_neighbours<true>(&f[b / 2][8 * (b % 2)], fragment_angles<4>(angles + 2 * b * 512));
            } else {
#pragma unroll
              for (int b = 0; b < kBlocks / 2; ++b) {
                constexpr int kFurther = kBlocks / 2;
                rotate_chunks<true>(&f[b / 2][8 * (b % 2)], &f[(b + kFurther) / 2][8 * ((b + kFurther) % 2)],
                                    fragment_angles<8>(angles + 4 * b * 512));
              }
            }
          }
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            const float* v = &f[b / 2][8 * (b % 2)];
            const uint4 words = make_uint4(pack2<Elem>(v[0], v[1]), pack2<Elem>(v[2], v[3]), pack2<Elem>(v[4], v[5]),
                                           pack2<Elem>(v[6], v[7]));
            if (there[h]) *reinterpret_cast<uint4*>(dst + b * 64 + q * 16) = words;
          }
        }
      }
    }
  }
}

template <int D, class Elem, bool kInverse>
const void* mma_kernel_address() {
  return reinterpret_cast<const void*>(&mma_kernel<D, Elem, kInverse>);
}

}  // namespace fa3::prep

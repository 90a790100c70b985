// FP8 forward, warpgroup 0: warp 0 (one thread) feeds TMA and publishes descales, warps 1 - 3
// transpose V.
#pragma once
#include <cmath>

#include "attn/fp8_schedule.cuh"
#include "ptx/barrier.cuh"
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"
#include "ptx/tma.cuh"
#include "tile/fp8_order.cuh"
#include "tile/pipeline.cuh"

namespace fa3 {

// A descale is a magnitude: anything negative or not finite becomes NaN, which reaches every row
// that uses the block. A negative one would turn maxima into minima, an infinite one can meet -inf:
// both would end in a plausible number.
FA3_DEVICE float checked_descale(float x) {
  return x >= 0.f && x < INFINITY ? x : NAN;
}

// All slabs of a tile whose slabs are `slab_bytes` apart.
template <class T>
FA3_DEVICE void load_tile(uint32_t dst, int slab_bytes, const CUtensorMap* map, uint32_t bar,
                          uint64_t policy, int token, int head, int batch) {
#pragma unroll
  for (int i = 0; i < T::kSlabs; ++i)
    tma_load_4d(dst + i * slab_bytes, map, bar, policy, i * T::kWidth, token, head, batch);
}

// In registers that the compiler knows to be the same in the whole warp.
FA3_DEVICE Fp8Work load_work(uint32_t at) {
  const uint4 a = lds128(at), b = lds128(at + 16), c = lds128(at + 32);
  return {uniform(a.x), uniform(a.y), uniform(a.z), uniform(a.w), uniform(b.x), uniform(b.y),
          uniform(b.z), uniform(b.w), uniform(c.x), uniform(c.y), uniform(c.z), uniform(c.w)};
}

// ---- TMA: one thread -------------------------------------------------------------------------
template <class T>
FA3_DEVICE void feed(const Fp8FwdKernelParams& p, uint32_t smem) {
  using Shared = Fp8Shared<T>;
  Ring<T::kKStages> k;
  Ring<T::kRawStages> raw;
  Ring<1> q;
  Ring<kFp8WorkSlots> slot;
  int index = blockIdx.x;
  for (;;) {
    mbar_wait(smem + offsetof(Shared, work_empty) + 8 * slot.stage, slot.phase ^ 1);
    // The tile lives in shared memory for this thread as well: it has 24 registers where the
    // consumers have 240.
    const uint32_t work = smem + offsetof(Shared, work) + sizeof(Fp8Work) * slot.stage;
    const auto field = [&](size_t offset) {
      return static_cast<int>(lds32(work + uint32_t(offset)));
    };
    const bool found = locate_work<T>(p, index, work);
    mbar_arrive(smem + offsetof(Shared, work_full) + 8 * slot.stage);
    slot.advance();
    if (!found) break;
    // The next index is asked for before the last loads of this tile, so that a CTA with a long
    // tile does not hold two.
    const auto draw = [&] {
      index = p.next_work != nullptr ? atomicAdd(p.next_work, 1) + int(gridDim.x)
                                     : index + int(gridDim.x);
    };
    int n = field(offsetof(Fp8Work, block_end)) - 1;
    if (n < field(offsetof(Fp8Work, block_begin))) draw();
#pragma unroll 1
    for (; n >= field(offsetof(Fp8Work, block_begin)); --n) {
      const int block_scale = field(offsetof(Fp8Work, scale_k)) + n;
      const float k_scale = checked_descale(__ldg(p.k_descale + block_scale));
      const float v_scale = checked_descale(__ldg(p.v_descale + block_scale));
      // log2 of a zero descale (a block of zeros) must stay finite: the keys of the block still
      // count in the row sum.
      constexpr float kSmallest = 1e-30f;
      const float bias = log2_approx(v_scale < kSmallest ? kSmallest : v_scale);
      mbar_wait(smem + offsetof(Shared, k_empty) + 8 * k.stage, k.phase ^ 1);
      const uint32_t k_full = smem + offsetof(Shared, k_full) + 8 * k.stage;
      sts128(smem + offsetof(Shared, scale) +
                 sizeof(Fp8BlockScale) * k.stage,  // published by the arrival below
             make_uint4(__float_as_uint(k_scale), __float_as_uint(bias),
                        __float_as_uint(exp2_approx(-bias)), 0));
      mbar_arrive_expect_tx(k_full, T::kKBytes);
      load_tile<T>(smem + offsetof(Shared, k) + T::kKBytes * k.stage, T::kBlockN * T::kWidth, &p.k,
                   k_full, kL2EvictLast, field(offsetof(Fp8Work, token_k)) + n * T::kBlockN,
                   field(offsetof(Fp8Work, head_k)), field(offsetof(Fp8Work, batch)));
      k.advance();
      if (n == field(offsetof(Fp8Work, block_end)) - 1) {
#pragma unroll 1
        for (int g = 0; g < T::kWarpgroups; ++g) {
          const uint32_t q_full = smem + offsetof(Shared, q_full) + 8 * g;
          mbar_wait(smem + offsetof(Shared, q_empty) + 8 * g, q.phase ^ 1);
          mbar_arrive_expect_tx(q_full, T::kQBytes);
          load_tile<T>(smem + offsetof(Shared, q) + T::kQBytes * g, kWarpgroupRows * T::kWidth,
                       &p.q, q_full, kL2EvictFirst,
                       field(offsetof(Fp8Work, token_q)) + field(offsetof(Fp8Work, row0)) +
                           g * kWarpgroupRows,
                       field(offsetof(Fp8Work, head)), field(offsetof(Fp8Work, batch)));
        }
        q.advance();
      }
      if (n == field(offsetof(Fp8Work, block_begin))) draw();
#pragma unroll 1
      for (int half = 0; half < T::kBlockN / kFp8RawKeys; ++half) {
        const uint32_t raw_full = smem + offsetof(Shared, raw_full) + 8 * raw.stage;
        mbar_wait(smem + offsetof(Shared, raw_empty) + 8 * raw.stage, raw.phase ^ 1);
        mbar_arrive_expect_tx(raw_full, T::kRawBytes);
        load_tile<T>(smem + offsetof(Shared, raw) + T::kRawBytes * raw.stage,
                     kFp8RawKeys * T::kWidth, &p.v, raw_full, kL2EvictLast,
                     field(offsetof(Fp8Work, token_k)) + n * T::kBlockN + half * kFp8RawKeys,
                     field(offsetof(Fp8Work, head_k)), field(offsetof(Fp8Work, batch)));
        raw.advance();
      }
    }
  }
}

// ---- transposers: three warps ----------------------------------------------------------------
// Keys past the end of a packed sequence belong to its neighbour. Their scores are masked, but 0 *
// NaN is NaN.
template <class T>
FA3_DEVICE void clear_foreign_keys(uint32_t raw, int keys, int thread) {
  constexpr int kThreads = T::kTransposers * kWarpThreads;
  const int bytes = (kFp8RawKeys - keys) * T::kWidth;  // the end of every slab
#pragma unroll 1
  for (int slab = 0; slab < T::kSlabs; ++slab) {
    const uint32_t at = raw + (slab * kFp8RawKeys + keys) * T::kWidth;
#pragma unroll 1
    for (int i = 16 * thread; i < bytes; i += 16 * kThreads) sts128(at + i, make_uint4(0, 0, 0, 0));
  }
  named_sync(kFp8BarTransposers, kThreads);
}

template <class T>
FA3_DEVICE void transpose_values(const Fp8FwdKernelParams& p, uint32_t smem, int warp) {
  using Shared = Fp8Shared<T>;
  const int lane = threadIdx.x % kWarpThreads;
  Ring<T::kRawStages> raw;
  Ring<T::kVStages> vt;
  Ring<kFp8WorkSlots> slot;
  // Source: 16 bytes of key `lane`; the swizzle of its row is folded into an XOR with the byte
  // inside the row.
  constexpr int kColumnGroups = T::kHeadDim / 16, kKeyGroups = kFp8RawKeys / 32;
  constexpr int kGroupsPerSlab = T::kWidth / 16;
  const uint32_t source_row = smem + offsetof(Shared, raw) + lane * T::kWidth;
  const uint32_t source_xor = swizzle<T::kWidth>(lane * T::kWidth) ^ (lane * T::kWidth);
  const int row = transposer_row(lane);
  const uint32_t target_row = smem + offsetof(Shared, vt) + row * T::kBlockN;
  const uint32_t target_byte = transposer_byte(lane) ^ ((row & 7) << 4);
  int j = warp;  // next group of 16 columns; runs on from one stage to the next, so that the warps
                 // stay level
  for (;;) {
    mbar_wait(smem + offsetof(Shared, work_full) + 8 * slot.stage, slot.phase);
    const uint32_t at = smem + offsetof(Shared, work) + sizeof(Fp8Work) * slot.stage;
    const int row0 = uniform(lds32(at + offsetof(Fp8Work, row0)));
    const int len_k = uniform(lds32(at + offsetof(Fp8Work, len_k)));
    const int begin = uniform(lds32(at + offsetof(Fp8Work, block_begin)));
    const int end = uniform(lds32(at + offsetof(Fp8Work, block_end)));
    __syncwarp();
    if (row0 < 0) break;
    if (lane == 0) mbar_arrive(smem + offsetof(Shared, work_empty) + 8 * slot.stage);
    slot.advance();
    for (int n = end - 1; n >= begin; --n) {
      mbar_wait(smem + offsetof(Shared, vt_empty) + 8 * vt.stage, vt.phase ^ 1);
#pragma unroll 1
      for (int half = 0; half < T::kBlockN / kFp8RawKeys; ++half) {
        mbar_wait(smem + offsetof(Shared, raw_full) + 8 * raw.stage, raw.phase);
        const int keys = len_k - n * T::kBlockN - half * kFp8RawKeys;
        if (p.cu_q != nullptr && keys < kFp8RawKeys)
          clear_foreign_keys<T>(smem + offsetof(Shared, raw) + T::kRawBytes * raw.stage,
                                max(keys, 0), warp * kWarpThreads + lane);
        const uint32_t source = source_row + T::kRawBytes * raw.stage;
        const uint32_t target = target_row + T::kVtBytes * vt.stage;
        // Work items are (16 columns) x (64 keys): two matrix loads in flight hide each other's
        // latency.
#pragma unroll 1
        for (; j < kColumnGroups; j += T::kTransposers) {
          const uint32_t from = source + (j / kGroupsPerSlab) * (kFp8RawKeys * T::kWidth) +
                                (((j % kGroupsPerSlab) << 4) ^ source_xor);
          const uint32_t to = target + j * (16 * T::kBlockN);
          uint4 x[kKeyGroups];
#pragma unroll
          for (int g = 0; g < kKeyGroups; ++g)
            x[g] = ldmatrix_x4_trans(from + g * (32 * T::kWidth));
#pragma unroll
          for (int g = 0; g < kKeyGroups; ++g)
            stmatrix_x4(to + ((half * kFp8RawKeys + 32 * g) ^ target_byte),
                        prmt(x[g].x, x[g].y, kEvenBytes), prmt(x[g].x, x[g].y, kOddBytes),
                        prmt(x[g].z, x[g].w, kEvenBytes), prmt(x[g].z, x[g].w, kOddBytes));
        }
        j -= kColumnGroups;
        __syncwarp();
        if (lane == 0) mbar_arrive(smem + offsetof(Shared, raw_empty) + 8 * raw.stage);
        raw.advance();
      }
      fence_proxy_async_shared();
      __syncwarp();
      if (lane == 0) mbar_arrive(smem + offsetof(Shared, vt_full) + 8 * vt.stage);
      vt.advance();
    }
  }
}

}  // namespace fa3

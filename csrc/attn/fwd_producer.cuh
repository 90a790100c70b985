// Forward attention, the two single warps of a thread block: the scheduler decides which query tile
// comes next and publishes it in shared memory; the producer turns it into TMA copies of Q, K and
// V.
#pragma once
#include "attn/fwd_traits.cuh"
#include "attn/fwd_varlen.cuh"
#include "ptx/barrier.cuh"
#include "ptx/memory.cuh"
#include "ptx/tma.cuh"
#include "tile/pipeline.cuh"
#include "tile/scheduler.cuh"

namespace fa3 {

// ---- tiles -----------------------------------------------------------------------------------
template <class T>
FA3_DEVICE void write_tile(uint32_t addr, const typename T::Tile& t) {
  sts128(addr, make_uint4(t.m, t.head, t.batch, t.seqlen_q));
  sts128(addr + 16, make_uint4(t.seqlen_k, t.start_q, t.start_k, 0));
  sts128(addr + 32,
         make_uint4(t.blocks.begin, t.blocks.end, uint32_t(t.lse_row), uint32_t(t.lse_row >> 32)));
}
template <class T>
FA3_DEVICE typename T::Tile read_tile(uint32_t addr) {
  const uint4 a = lds128(addr), b = lds128(addr + 16), c = lds128(addr + 32);
  return {int(a.x),
          int(a.y),
          int(a.z),
          int(a.w),
          int(b.x),
          int(b.y),
          int(b.z),
          0,
          {int(c.x), int(c.y)},
          int64_t(uint64_t(c.w) << 32 | c.z)};
}
template <class T>
FA3_DEVICE MaskBounds mask_bounds(const FwdParams& p, const typename T::Tile& t) {
  return {t.seqlen_q, t.seqlen_k, p.window_left, p.window_right};
}

// ---- scheduler warp --------------------------------------------------------------------------
template <class T>
FA3_DEVICE typename T::Tile locate_tile(const FwdParams& p, int index, int lane) {
  typename T::Tile t{-1, 0, 0, p.seqlen_q, p.seqlen_k, 0, 0, 0, {0, 0}, 0};
  TilePosition at;
  if (p.cu_seqlens_q == nullptr) {
    if (index >= p.num_tiles) return t;
    at = longest_first(index, p.tiles_per_head, p.heads_q * p.batch, p.section);
    t.batch = at.head / p.heads_q;
    t.head = at.head - t.batch * p.heads_q;
    t.lse_row = int64_t(at.head) * p.seqlen_q;
  } else {
    const VarlenOrder order{p.varlen_order, p.batch};
    if (index >= order.num_tiles()) return t;
    const int rank = order.rank_of(index, lane);
    t.batch = order.sequence(rank);
    t.start_q = p.cu_seqlens_q[t.batch];
    t.start_k = p.cu_seqlens_k[t.batch];
    t.seqlen_q = p.cu_seqlens_q[t.batch + 1] - t.start_q;
    t.seqlen_k = p.cu_seqlens_k[t.batch + 1] - t.start_k;
    const int section =
        heads_per_section(int64_t(t.seqlen_k) * (T::kDimQK + T::kDimV) * 2, p.group, p.l2_bytes);
    at = longest_first(index - order.first_tile(rank), ceil_div(t.seqlen_q, T::BLOCK_M), p.heads_q,
                       section);
    t.head = at.head;
    t.lse_row = int64_t(t.head) * p.total_q + t.start_q;
  }
  t.m = at.m;
  t.blocks =
      visited_blocks<T::kMask>(mask_bounds<T>(p, t), t.m * T::BLOCK_M, T::BLOCK_M, T::BLOCK_N);
  return t;
}

template <class T>
FA3_DEVICE void schedule(const FwdParams& p, typename T::Shared& shared, int lane) {
  static_assert(T::kTileRing == 2, "slot and phases below follow from the round");
  for (int round = 0;; ++round) {
    int index = blockIdx.x;
    if (p.tile_counter == nullptr) {
      index = snake(round, blockIdx.x, gridDim.x);
    } else if (round > 0) {
      if (lane == 0) index = atomicAdd(p.tile_counter, 1) + gridDim.x;
      index = __shfl_sync(kFullWarp, index, 0);
    }
    const typename T::Tile t = locate_tile<T>(p, index, lane);
    const int slot = round & 1;
    mbar_wait(smem_addr(&shared.tile_empty[slot]), (round >> 1 & 1) ^ 1);
    if (lane == 0) {
      write_tile<T>(smem_addr(&shared.tiles[slot]), t);
      mbar_arrive(smem_addr(&shared.tile_full[slot]));
    }
    if (t.m < 0) return;
    // Not earlier: a block that still has a long tile before it must not hold back the next one.
    mbar_wait(smem_addr(&shared.draw), round & 1);
  }
}

// ---- producer thread -------------------------------------------------------------------------
// A tile of rows x kSlabs * 64 columns: one copy per 128-byte slab.
template <int kSlabs>
FA3_DEVICE void load_slabs(uint32_t dst, int slab_bytes, const CUtensorMap* map, uint32_t bar,
                           uint64_t policy, int row, int head, int batch) {
#pragma unroll
  for (int s = 0; s < kSlabs; ++s)
    tma_load_4d(dst + s * slab_bytes, map, bar, policy, 64 * s, row, head, batch);
}

template <class T>
struct Loader {
  const FwdParams& p;
  typename T::Shared& shared;

  // Each waits until the stage is free; `row` counts tokens of the whole tensor.
  FA3_DEVICE void k(const Ring<T::kStages>& at, int row, int head, int batch) {
    const uint32_t full = smem_addr(&shared.k_full[at.stage]);
    mbar_wait(smem_addr(&shared.k_empty[at.stage]), at.phase ^ 1);
    mbar_arrive_expect_tx(full, T::kKBytes);
    load_slabs<T::kSlabsQK>(smem_addr(shared.k[at.stage]), T::BLOCK_N * 128, &p.k, full,
                            kL2EvictLast, row, head, batch);
  }
  FA3_DEVICE void v(const Ring<T::kStages>& at, int row, int head, int batch) {
    const uint32_t full = smem_addr(&shared.v_full[at.stage]);
    mbar_wait(smem_addr(&shared.v_empty[at.stage]), at.phase ^ 1);
    mbar_arrive_expect_tx(full, T::kVBytes);
    load_slabs<T::kSlabsV>(smem_addr(shared.v[at.stage]), T::BLOCK_N * 128, &p.v, full,
                           kL2EvictLast, row, head, batch);
  }
  FA3_DEVICE void q(const Ring<1>& at, int row, int head, int batch) {
#pragma unroll 1  // registers: the producer has 24
    for (int w = 0; w < T::kConsumers; ++w) {
      const uint32_t full = smem_addr(&shared.q_full[w]);
      mbar_wait(smem_addr(&shared.q_empty[w]), at.phase ^ 1);
      mbar_arrive_expect_tx(full, T::kQBytes);
      load_slabs<T::kSlabsQK>(smem_addr(shared.q[w]), kWarpgroupRows * 128, &p.q, full,
                              kL2EvictFirst, row + w * kWarpgroupRows, head, batch);
    }
  }
};

template <class T>
FA3_DEVICE void produce(const FwdParams& p, typename T::Shared& shared) {
  Loader<T> load{p, shared};
  Ring<T::kStages> k;  // V has as many stages and runs one block behind
  Ring<1> q;
  Ring<T::kTileRing> ring;
  for (;;) {
    mbar_wait(smem_addr(&shared.tile_full[ring.stage]), ring.phase);
    const typename T::Tile t = read_tile<T>(smem_addr(&shared.tiles[ring.stage]));
    mbar_arrive(smem_addr(&shared.tile_empty[ring.stage]));
    ring.advance();
    if (t.m < 0) return;
    const int batch = p.cu_seqlens_q == nullptr ? t.batch : 0;
    if (!t.blocks.empty()) {
      load.k(k, t.start_k + (t.blocks.end - 1) * T::BLOCK_N, t.head / p.group, batch);
      load.q(q, t.start_q + t.m * T::BLOCK_M, t.head, batch);
      q.advance();
    }
    const int kv_head = t.head / p.group;
    int row = t.start_k +
              (t.blocks.end - 1) * T::BLOCK_N;  // of the block whose K is loaded and whose V is not
    for (int left = t.blocks.end - t.blocks.begin - 1; left > 0; --left) {
      const Ring<T::kStages> v = k;
      k.advance();
      load.k(k, row - T::BLOCK_N, kv_head, batch);
      load.v(v, row, kv_head, batch);
      row -= T::BLOCK_N;
    }
    mbar_arrive(smem_addr(
        &shared.draw));  // before the last copy, which waits for a free stage: hides the draw
    if (!t.blocks.empty()) {
      load.v(k, row, kv_head, batch);
      k.advance();
    }
  }
}

}  // namespace fa3

// What the first warpgroup of bwd_fused does, a thread or a warp for each part.
#pragma once
#include "attn/bwd_dq.cuh"
#include "tile/pipeline.cuh"

namespace fa3 {

FA3_DEVICE uint32_t bar(const uint64_t& b) {
  return smem_addr(&b);
}

// Deterministic sums: how many key tiles add to query block m before tile t does.
template <int BLOCK_M, int BLOCK_N>
FA3_DEVICE int rank_of_tile(const BwdKernelParams& p, const KeyTile& t, int m) {
  const Mask mask{t.seqlen_k - t.seqlen_q, p.shape.window_left, p.shape.window_right};
  const BlockRange keys =
      key_blocks({BLOCK_M, BLOCK_N}, mask, m, ceil_div(t.seqlen_k, BLOCK_N));
  return p.order.descending ? keys.end - 1 - t.key_block : t.key_block - keys.begin;
}

// Loads Q, K and LSE (kQueries), dO, V and delta (kValues). Who loads Q also draws the tiles and
// hands them to everybody else. One thread.
template <class T, bool kQueries, bool kValues>
FA3_DEVICE void load_inputs(const BwdKernelParams& p, typename T::SharedPlan& plan) {
  constexpr int BLOCK_M = T::BLOCK_M, BLOCK_N = T::BLOCK_N;
  const auto load_tile = [&](uint8_t* dst, const CUtensorMap& map, uint64_t& full, int rows,
                             int row, int head, int batch, uint64_t policy) {
#pragma unroll
    for (int c = 0; c < T::kSlabs; ++c)
      tma_load_4d(smem_addr(dst) + c * rows * kSlabBytes, &map, bar(full), policy, c * kSlabCols,
                  row, head, batch);
  };
  Ring<T::kStagesQ> q_ring;
  PairRing do_ring, tiles;
  uint32_t key_phase = 1;
  bool prepared = false;  // bwd_prepare has ended: its outputs and the tile counter may be read
  const auto await_prepare = [&] {
    if (!prepared) grid_dependency_wait(), prepared = true;
  };
  // The first tile needs no draw; when tiles wait for one another it must not be taken before it
  // can run.
  int next = blockIdx.x;
  if (kQueries && p.deterministic) {
    await_prepare();
    next = atomicAdd(p.work.tile_counter, 1);
  }
  for (;;) {
    KeyTile& t = plan.tile[tiles.stage()];
    if (kQueries) {
      mbar_wait(bar(plan.tile_empty[tiles.stage()]), tiles.phase() ^ 1);
      find_key_tile<BLOCK_M, BLOCK_N, T::kPacked>(p, next, t);
      mbar_arrive(bar(plan.tile_full[tiles.stage()]));
    } else {
      mbar_wait(bar(plan.tile_full[tiles.stage()]), tiles.phase());
    }
    if (t.key_block < 0) break;
    QueryWalk walk(p.shape, t);
    bool first = true;
    for (; walk.left > 0; walk.advance()) {
      const int row = (T::kPacked ? t.query_row : 0) + walk.m * BLOCK_M;
      if (kQueries) {
        const int i = q_ring.stage;
        mbar_wait(bar(plan.q_empty[i]), q_ring.phase ^ 1);
        mbar_arrive_expect_tx(bar(plan.q_full[i]), T::kQueryTileBytes + BLOCK_M * 4);
        load_tile(plan.q[i], p.q, plan.q_full[i], BLOCK_M, row, walk.head, t.batch, kL2EvictLast);
        await_prepare();
        bulk_load(smem_addr(plan.neg_lse[i]), p.work.neg_lse + int64_t(walk.row_block) * BLOCK_M,
                  BLOCK_M * 4, bar(plan.q_full[i]));
        if (first) {
          mbar_wait(bar(plan.k_empty), key_phase);
          mbar_arrive_expect_tx(bar(plan.k_full), T::kKeyTileBytes);
          load_tile(plan.k, p.k, plan.k_full, BLOCK_N, t.key_row + t.key_block * BLOCK_N, t.head_k,
                    t.batch, kL2EvictNormal);
        }
        q_ring.advance();
      }
      if (kValues) {
        const int j = do_ring.stage();
        mbar_wait(bar(plan.do_empty[j]), do_ring.phase() ^ 1);
        mbar_arrive_expect_tx(bar(plan.do_full[j]), T::kQueryTileBytes + BLOCK_M * 4);
        load_tile(plan.dout[j], p.dout, plan.do_full[j], BLOCK_M, row, walk.head, t.batch,
                  kL2EvictLast);
        await_prepare();
        bulk_load(smem_addr(plan.neg_delta[j]),
                  p.work.neg_delta + int64_t(walk.row_block) * BLOCK_M, BLOCK_M * 4,
                  bar(plan.do_full[j]));
        if (first) {
          mbar_wait(bar(plan.v_empty), key_phase);
          mbar_arrive_expect_tx(bar(plan.v_full), T::kKeyTileBytes);
          load_tile(plan.v, p.v, plan.v_full, BLOCK_N, t.key_row + t.key_block * BLOCK_N, t.head_k,
                    t.batch, kL2EvictNormal);
        }
        do_ring.advance();
      }
      if (first) first = false, key_phase ^= 1;
    }
    if (kQueries) {
      await_prepare();
      next = atomicAdd(p.work.tile_counter, 1) + (p.deterministic ? 0 : gridDim.x);
    } else {
      mbar_arrive(bar(plan.tile_empty[tiles.stage()]));
    }
    tiles.advance();
  }
}

// Sends dQ of every step, and at the end of a tile dV and dK, from shared to global memory. kTurns:
// stores or adds as keep_turns says, and tells it what has been added; else adds to zeros. One
// thread.
template <class T, bool kTurns>
FA3_DEVICE void send_gradients(const BwdKernelParams& p, typename T::SharedPlan& plan) {
  constexpr int BLOCK_M = T::BLOCK_M, BLOCK_N = T::BLOCK_N;
  PairRing tiles, turns;
  uint32_t dq_phase = 0;
  grid_dependency_wait();  // the sums are zero
  for (;;) {
    const KeyTile& t = plan.tile[tiles.stage()];
    mbar_wait(bar(plan.tile_full[tiles.stage()]), tiles.phase());
    if (t.key_block < 0) break;
    QueryWalk walk(p.shape, t);
    for (; walk.left > 0; walk.advance(), turns.advance()) {
      const int row_block = walk.row_block;
      float* const dst = p.work.dq + int64_t(row_block) * T::kDqBlockFloats;
      bool stores = false;
      if (kTurns) {
        mbar_wait(bar(plan.turn_full[turns.stage()]), turns.phase());
        stores = plan.turn_stores[turns.stage()];
        fence_proxy_async_global();  // the sums before us were made by their async proxy
      }
#pragma unroll
      for (int g = 0; g < T::kConsumers; ++g) {
        mbar_wait(bar(plan.dq_full[g]), dq_phase);
        if (!kTurns && g == 0 && p.deterministic) {
          const uint32_t turn = rank_of_tile<BLOCK_M, BLOCK_N>(p, t, walk.m);
          while (DqState::arrivals(load_acquire(p.work.dq_state + row_block)) != turn)
            __nanosleep(64);
          fence_proxy_async_global();
        }
        fence_proxy_async_shared();  // here and not in the math warps, whose time is dearer
        if (stores)
          bulk_store(dst + g * (T::kDqBytes / 4), smem_addr(plan.dq[g]), T::dq_bytes(g),
                     kL2EvictLast);
        else
          bulk_reduce_add_f32(dst + g * (T::kDqBytes / 4), smem_addr(plan.dq[g]), T::dq_bytes(g),
                              kL2EvictLast);
        bulk_commit();
      }
      dq_phase ^= 1;
      bulk_wait_read<1>();
      mbar_arrive(bar(plan.dq_empty[0]));
      bulk_wait_read<0>();
      mbar_arrive(bar(plan.dq_empty[1]));
      if (kTurns) {
        bulk_wait<0>();  // added, not just read
        mbar_arrive(bar(plan.dq_landed[turns.stage()]));
      } else if (p.deterministic) {
        bulk_wait<0>();
        fence_proxy_async_global();
        fetch_add_release(p.work.dq_state + row_block, DqState::kArrival);
      }
    }
    if (t.staged) {  // dV, then dK, through the same buffers
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        for (int g = 0; g < T::kConsumers; ++g) {
          mbar_wait(bar(plan.dq_full[g]), dq_phase);
          fence_proxy_async_shared();
          for (int c = 0; c < T::kSlabs; ++c)
            tma_store_4d(i == 0 ? &p.dv_map : &p.dk_map,
                         smem_addr(plan.dq[g]) + c * 64 * kSlabBytes, c * kSlabCols,
                         t.key_row + t.key_block * BLOCK_N + g * 64, t.head_k, t.batch);
          bulk_commit();
        }
        dq_phase ^= 1;
        bulk_wait_read<1>();
        mbar_arrive(bar(plan.dq_empty[0]));
        bulk_wait_read<0>();
        mbar_arrive(bar(plan.dq_empty[1]));
      }
    }
    mbar_arrive(bar(plan.tile_empty[tiles.stage()]));
    tiles.advance();
  }
  bulk_wait<0>();
}

// Tells the sender when it may add its dQ and counts what it has added (bwd_dq.cuh). One thread,
// and not the sender's own: atomics and the fence before them take longer than the sender has.
template <class T>
FA3_DEVICE void keep_turns(const BwdKernelParams& p, typename T::SharedPlan& plan) {
  constexpr int BLOCK_M = T::BLOCK_M, BLOCK_N = T::BLOCK_N;
  PairRing tiles, turns, landed;
  int sent = -1;  // the row block of the step before
  const auto count_sent = [&] {
    if (sent < 0) return;
    mbar_wait(bar(plan.dq_landed[landed.stage()]), landed.phase());
    landed.advance();
    count_arrival(p.work.dq_state + sent, sent, plan.finish_queue);
    sent = -1;
  };
  grid_dependency_wait();  // the states are those of this call
  for (;;) {
    const KeyTile& t = plan.tile[tiles.stage()];
    mbar_wait(bar(plan.tile_full[tiles.stage()]), tiles.phase());
    if (t.key_block < 0) break;
    QueryWalk walk(p.shape, t);
    for (; walk.left > 0; walk.advance(), turns.advance()) {
      uint64_t* const state = p.work.dq_state + walk.row_block;
      uint32_t turn;
      uint64_t seen;
      if (p.deterministic) {
        turn = rank_of_tile<BLOCK_M, BLOCK_N>(p, t, walk.m);
        seen = load_acquire(state);
      } else {
        seen = fetch_add_acquire(state, DqState::kTicket);
        turn = DqState::tickets(seen) == 0 ? 0 : 1;
      }
      if (DqState::arrivals(seen) < turn) {
        count_sent();  // others may wait for that
        while (DqState::arrivals(load_acquire(state)) < turn) {
        }
      }
      plan.turn_stores[turns.stage()] = turn == 0;
      mbar_arrive(bar(plan.turn_full[turns.stage()]));
      count_sent();
      sent = walk.row_block;
    }
    mbar_arrive(bar(plan.tile_empty[tiles.stage()]));
    tiles.advance();
  }
  count_sent();
  plan.finish_queue.close();
}

}  // namespace fa3

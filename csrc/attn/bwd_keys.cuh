// First of the two passes of the backward for head dims above 128: dK and dV.
//
// dK and dV of 64 keys fill the registers of one warpgroup each at head dim 256, so the work
// divides by gradient:
//   warpgroup 1 (values):  S^T = K Q^T, P^T = exp2(S^T c - LSE log2e), dV += P^T dO; passes P on
//   warpgroup 2 (keys):    dP^T = V dO^T, dS^T = P^T o (dP^T - delta), dK += dS^T Q
// Both tiles have the same fragment layout, so that thread t passes its P to thread t, packed, in
// register order: no transposition, no bank conflict. P and dS are A operands from registers. dQ is
// the other pass (bwd_queries.cuh): computing S and dP twice is 7 matrix products instead of 5, and
// in exchange nothing is summed in global memory, dQ needs no accumulator, and all gradients are
// the same bits every time.
//
// Warpgroup 0: warp 0 draws tiles, loads K, Q, LSE; warp 2 loads V, dO, delta.
#pragma once
#include "attn/bwd_tile.cuh"
#include "tile/pipeline.cuh"

namespace fa3 {

template <int kDimQK_, int kDimV_, class Elem_, BwdMode kMode>
struct BwdKeysTraits {
  using Elem = Elem_;
  static constexpr int kDimQK = kDimQK_, kDimV = kDimV_;
  static constexpr bool kRightBound = kMode >= kBwdCausal, kLeftBound = kMode >= kBwdWindow;
  static constexpr bool kPacked = kMode >= kBwdPacked, kSoftcap = kMode == kBwdSoftcap;
  // Three stages of Q and dO beside K and V. A block of queries is in use for two steps (S runs
  // ahead, dK comes last); with two stages of 64 the next one came too late.
  static constexpr int BLOCK_M = kDimQK == 256 ? 48 : kDimV == 192 ? 64 : 80, BLOCK_N = 64;
  static constexpr int kThreads = 384, kRegsProducer = 24, kRegsConsumer = 240;
  static constexpr int kStages = 3;
  static constexpr int kSlabsQK = kDimQK / kSlabCols, kSlabsV = kDimV / kSlabCols;
  static constexpr int kScoreRegs = BLOCK_M / 2;
  static constexpr int kQBytes = BLOCK_M * kSlabsQK * kSlabBytes,
                       kDoBytes = BLOCK_M * kSlabsV * kSlabBytes;
  static constexpr int kKBytes = BLOCK_N * kSlabsQK * kSlabBytes,
                       kVBytes = BLOCK_N * kSlabsV * kSlabBytes;
  static constexpr int kPassVectors = kScoreRegs / 8;  // 16-byte vectors of packed P per thread

  struct SharedPlan {
    alignas(1024) uint8_t k[kKBytes];
    uint8_t v[kVBytes];
    uint8_t q[kStages][kQBytes];
    uint8_t dout[kStages][kDoBytes];
    uint8_t p[kPassVectors][128][16];
    float neg_lse[kStages][BLOCK_M];
    float neg_delta[kStages][BLOCK_M];
    KeyTile tile[2];
    uint64_t k_full, k_empty, v_full, v_empty, p_full, p_empty;
    uint64_t q_full[kStages], q_empty[kStages], do_full[kStages], do_empty[kStages];
    uint64_t tile_full[2], tile_empty[2];
  };
  static constexpr int kSharedBytes = sizeof(SharedPlan);
  static_assert(kSharedBytes <= kSharedBytesPerBlock, "shared memory of one block");
};

enum BwdKeysBarrier : int { kBarGroupCleared = 1 };  // + warpgroup - 1

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    bwd_keys(const __grid_constant__ BwdKernelParams p) {
  using Elem = typename T::Elem;
  using Plan = typename T::SharedPlan;
  constexpr int BLOCK_M = T::BLOCK_M, BLOCK_N = T::BLOCK_N;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Plan& plan = *reinterpret_cast<Plan*>(shared_bytes);
  const auto bar = [](const uint64_t& b) { return smem_addr(&b); };
  const int warp = uniform(threadIdx.x / 32), warpgroup = warp / 4;
  constexpr int kMathWarps = 8;

  if (threadIdx.x == 0) {
    mbar_init(bar(plan.k_full), 1), mbar_init(bar(plan.k_empty), 4);  // K: warpgroup 1 alone
    mbar_init(bar(plan.v_full), 1), mbar_init(bar(plan.v_empty), 4);  // V: warpgroup 2 alone
    mbar_init(bar(plan.p_full), 4), mbar_init(bar(plan.p_empty), 4);
    for (int i = 0; i < T::kStages; ++i) {
      mbar_init(bar(plan.q_full[i]), 1), mbar_init(bar(plan.q_empty[i]), kMathWarps);
      mbar_init(bar(plan.do_full[i]), 1), mbar_init(bar(plan.do_empty[i]), kMathWarps);
    }
    for (int i = 0; i < 2; ++i)
      mbar_init(bar(plan.tile_full[i]), 1), mbar_init(bar(plan.tile_empty[i]), kMathWarps + 1);
    mbar_init_fence();
  }
  __syncthreads();

  // ---------------------------------------------------------------------------------------- loads
  if (warpgroup == 0) {
    registers_release<T::kRegsProducer>();
    const auto load_tile = [&](uint8_t* dst, const CUtensorMap& map, uint64_t& full, int slabs,
                               int rows, int row, int head, int batch, uint64_t policy) {
      for (int c = 0; c < slabs; ++c)
        tma_load_4d(smem_addr(dst) + c * rows * kSlabBytes, &map, bar(full), policy, c * kSlabCols,
                    row, head, batch);
    };
    if (warp == 0 && elect_one()) {
      grid_dependency_wait();
      // bwd_queries reads what bwd_prepare wrote: not before the wait above
      grid_launch_dependents();
      Ring<T::kStages> ring;
      Ring<2> tiles;
      uint32_t key_phase = 0;
      for (;;) {
        KeyTile& t = plan.tile[tiles.stage];
        mbar_wait(bar(plan.tile_empty[tiles.stage]), tiles.phase ^ 1);
        find_key_tile<BLOCK_M, BLOCK_N, T::kPacked>(p, atomicAdd(p.work.tile_counter, 1), t);
        mbar_arrive(bar(plan.tile_full[tiles.stage]));
        tiles.advance();
        if (t.key_block < 0) break;
        QueryWalk walk(p.shape, t);
        const int query_row = T::kPacked ? t.query_row : 0, batch = t.batch;
        bool first = true;
        for (; walk.left > 0; ring.advance(), walk.advance()) {
          const int i = ring.stage;
          mbar_wait(bar(plan.q_empty[i]), ring.phase ^ 1);
          mbar_arrive_expect_tx(bar(plan.q_full[i]), T::kQBytes + BLOCK_M * 4);
          load_tile(plan.q[i], p.q, plan.q_full[i], T::kSlabsQK, BLOCK_M,
                    query_row + walk.m * BLOCK_M, walk.head, batch, kL2EvictLast);
          bulk_load(smem_addr(plan.neg_lse[i]), p.work.neg_lse + int64_t(walk.row_block) * BLOCK_M,
                    BLOCK_M * 4, bar(plan.q_full[i]));
          if (first) {
            first = false;
            mbar_wait(bar(plan.k_empty), key_phase ^ 1);
            key_phase ^= 1;
            mbar_arrive_expect_tx(bar(plan.k_full), T::kKBytes);
            load_tile(plan.k, p.k, plan.k_full, T::kSlabsQK, BLOCK_N,
                      t.key_row + t.key_block * BLOCK_N, t.head_k, t.batch, kL2EvictNormal);
          }
        }
      }
    } else if (warp == 2 && elect_one()) {
      grid_dependency_wait();
      Ring<T::kStages> ring;
      Ring<2> tiles;
      uint32_t key_phase = 0;
      for (;;) {
        const KeyTile& t = plan.tile[tiles.stage];
        mbar_wait(bar(plan.tile_full[tiles.stage]), tiles.phase);
        if (t.key_block < 0) break;
        QueryWalk walk(p.shape, t);
        const int query_row = T::kPacked ? t.query_row : 0, batch = t.batch;
        bool first = true;
        for (; walk.left > 0; ring.advance(), walk.advance()) {
          const int i = ring.stage;
          mbar_wait(bar(plan.do_empty[i]), ring.phase ^ 1);
          mbar_arrive_expect_tx(bar(plan.do_full[i]), T::kDoBytes + BLOCK_M * 4);
          load_tile(plan.dout[i], p.dout, plan.do_full[i], T::kSlabsV, BLOCK_M,
                    query_row + walk.m * BLOCK_M, walk.head, batch, kL2EvictLast);
          bulk_load(smem_addr(plan.neg_delta[i]),
                    p.work.neg_delta + int64_t(walk.row_block) * BLOCK_M, BLOCK_M * 4,
                    bar(plan.do_full[i]));
          if (first) {
            first = false;
            mbar_wait(bar(plan.v_empty), key_phase ^ 1);
            key_phase ^= 1;
            mbar_arrive_expect_tx(bar(plan.v_full), T::kVBytes);
            load_tile(plan.v, p.v, plan.v_full, T::kSlabsV, BLOCK_N,
                      t.key_row + t.key_block * BLOCK_N, t.head_k, t.batch, kL2EvictNormal);
          }
        }
        mbar_arrive(bar(plan.tile_empty[tiles.stage]));
        tiles.advance();
      }
    }
    return;
  }

  // ---------------------------------------------------------------------------------------- math
  registers_claim<T::kRegsConsumer>();
  const int g = warpgroup - 1, thread = threadIdx.x & 127, lane = threadIdx.x & 31;
  const auto arrive = [&](const uint64_t& b) {
    __syncwarp();
    if (lane == 0) mbar_arrive(bar(b));
  };
  constexpr uint64_t kFormK = descriptor_form<128>(16),
                     kFormT = descriptor_form<128>(BLOCK_M * kSlabBytes);
  constexpr bool kPacked = T::kPacked;
  // Rows past the end of a packed sequence, before this warpgroup's first use of the tile. Both
  // warpgroups may clear the same rows: both write zeros, and each waits for its own.
  const auto clear = [&](uint8_t* tile, int slabs, int rows, int from) {
    clear_rows<128>(smem_addr(tile), slabs, rows, from);
    fence_proxy_async_shared();
    named_sync(kBarGroupCleared + g, 128);
  };
  // x += A B^T over `depth` columns; A: 64 rows of keys, B: a block of queries.
  const auto mma_scores = [&](float (&x)[T::kScoreRegs], uint64_t a, uint64_t b, auto depth) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < decltype(depth)::value / 16; ++k)
      Wgmma<Elem, BLOCK_M>::template ss<0, 0>(
          x, descriptor_step(a, k / 4 * BLOCK_N * kSlabBytes + k % 4 * kStepKMajor),
          descriptor_step(b, k / 4 * BLOCK_M * kSlabBytes + k % 4 * kStepKMajor));
    wgmma_commit();
  };
  const auto mma_grad = [&](auto& x, const uint32_t (&a)[T::kScoreRegs / 2], uint64_t b) {
    constexpr int kColumns = 2 * sizeof(x) / sizeof(float);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < BLOCK_M / 16; ++k)
      Wgmma<Elem, kColumns>::template rs<1>(x, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3],
                                            descriptor_step(b, k * kStepMNMajor));
    wgmma_commit();
  };

  PairRing tiles;
  Ring<T::kStages> q_ring, do_ring;
  uint32_t key_phase = 0, pass_phase = 0;

  if (g == 0) {  // ------------------------------------------------------------------------ values
    float dv[T::kDimV / 2];
    const uint64_t k_rows = descriptor_at(kFormK, smem_addr(plan.k));
    const uint64_t q_tile = descriptor_at(kFormK, smem_addr(plan.q));
    const uint64_t do_cols = descriptor_at(kFormT, smem_addr(plan.dout));
#pragma unroll 1
    for (;;) {
      mbar_wait(bar(plan.tile_full[tiles.stage()]), tiles.phase());
      const KeyTile& t = plan.tile[tiles.stage()];
      const int key_block = uniform(t.key_block);
      if (key_block < 0) break;
      const int steps = uniform(t.steps), query_begin = uniform(t.query_begin),
                query_end = uniform(t.query_end);
      const int seqlen_q = uniform(t.seqlen_q), seqlen_k = uniform(t.seqlen_k),
                key0 = key_block * BLOCK_N;
      const int cut_block = kPacked && seqlen_q % BLOCK_M ? seqlen_q / BLOCK_M : -1;
#pragma unroll
      for (int i = 0; i < T::kDimV / 2; ++i) dv[i] = 0.f;
      if (steps > 0) {
        float s[T::kScoreRegs];
        uint32_t p16[T::kScoreRegs / 2];
        int m = query_begin, done = 0, do_stage = 0;
        // Q of block m has arrived: start its scores.
        const auto scores = [&] {
          mbar_wait(bar(plan.q_full[q_ring.stage]), q_ring.phase);
          if (kPacked && m == cut_block)
            clear(plan.q[q_ring.stage], T::kSlabsQK, BLOCK_M, seqlen_q % BLOCK_M);
          if constexpr (T::kSoftcap) {
#pragma unroll
            for (int i = 0; i < T::kScoreRegs; ++i) s[i] = 0.f;
          } else {
            start_at_columns(s, smem_addr(plan.neg_lse[q_ring.stage]));
          }
          pin(s);
          mma_scores(s, k_rows, descriptor_step(q_tile, q_ring.stage * T::kQBytes),
                     Number<T::kDimQK>{});
        };
        // Scores to P in s; with softcap also P (1 - x^2), the factor of dP, which is what is then
        // passed on.
        float factor[T::kSoftcap ? T::kScoreRegs : 1];
        const auto softmax = [&] {
          const Mask mask{seqlen_k - seqlen_q, p.shape.window_left, p.shape.window_right};
          if constexpr (T::kSoftcap) {
#pragma unroll
            for (int i = 0; i < T::kScoreRegs; ++i)
              s[i] = tanh_approx(s[i] * p.shape.softcap_input);
            mask_transposed<BLOCK_M, T::kRightBound, T::kLeftBound>(s, -1e18f, mask, key0, seqlen_k,
                                                                    m);
#pragma unroll
            for (int k = 0; k < T::kScoreRegs / 8; ++k) {
              float4 neg_lse[1];
              load_columns<8>(neg_lse, smem_addr(plan.neg_lse[q_ring.stage]) + k * 64);
#pragma unroll
              for (int i = 8 * k; i < 8 * k + 8; ++i) {
                const float x = s[i];
                s[i] = exp2_approx(fmaf(x, p.shape.scale_log2, column_of(neg_lse[0], i - 8 * k)));
                factor[i] = s[i] * fmaf(-x, x, 1.f);
              }
            }
          } else {
            mask_transposed<BLOCK_M, T::kRightBound, T::kLeftBound>(s, -INFINITY, mask, key0,
                                                                    seqlen_k, m);
#pragma unroll
            for (int i = 0; i < T::kScoreRegs; ++i) s[i] = exp2_approx(s[i] * p.shape.scale_log2);
          }
        };
        mbar_wait(bar(plan.k_full), key_phase);
        key_phase ^= 1;
        if (kPacked && seqlen_k - key0 < BLOCK_N)
          clear(plan.k, T::kSlabsQK, BLOCK_N, seqlen_k - key0);
        scores();
        wgmma_wait<0>(), pin(s);
        softmax();
        pin(s);
        // On entry: P of block m in s, dV of the block before in flight. The next scores run under
        // this block's dV.
        const auto step = [&](auto is_last) {
          wgmma_wait<0>(), pin(dv);
          if (done > 0) arrive(plan.do_empty[do_stage]);
          pack_all<Elem>(s, p16);
          mbar_wait(bar(plan.p_empty), pass_phase ^ 1);
          pass_phase ^= 1;
          if constexpr (T::kSoftcap) {
#pragma unroll
            for (int i = 0; i < T::kPassVectors; ++i)
              sts128(smem_addr(plan.p[i][thread]),
                     make_uint4(pack2<Elem>(factor[8 * i], factor[8 * i + 1]),
                                pack2<Elem>(factor[8 * i + 2], factor[8 * i + 3]),
                                pack2<Elem>(factor[8 * i + 4], factor[8 * i + 5]),
                                pack2<Elem>(factor[8 * i + 6], factor[8 * i + 7])));
          } else {
#pragma unroll
            for (int i = 0; i < T::kPassVectors; ++i)
              sts128(smem_addr(plan.p[i][thread]),
                     make_uint4(p16[4 * i], p16[4 * i + 1], p16[4 * i + 2], p16[4 * i + 3]));
          }
          arrive(plan.p_full);
          arrive(
              plan.q_empty[q_ring.stage]);  // with softcap, LSE was read after the scores were done
          do_stage = do_ring.stage;
          const bool cut = kPacked && m == cut_block;
          q_ring.advance();
          if (++m == query_end) m = query_begin;
          if constexpr (!decltype(is_last)::value)
            scores();
          else
            arrive(plan.k_empty);
          mbar_wait(bar(plan.do_full[do_stage]), do_ring.phase);
          if (cut) clear(plan.dout[do_stage], T::kSlabsV, BLOCK_M, seqlen_q % BLOCK_M);
          do_ring.advance();
          mma_grad(dv, p16, descriptor_step(do_cols, do_stage * T::kDoBytes));
          if constexpr (decltype(is_last)::value) {
            wgmma_wait<0>(), pin(dv);
            arrive(plan.do_empty[do_stage]);
          } else {
            wgmma_wait<1>(), pin(s);
            softmax();
            pin(s);
          }
        };
#pragma unroll 1
        for (; done < steps - 1; ++done) step(Constant<false>{});
        step(Constant<true>{});
      }
      emit_gradient<Elem, T::kDimV>(dv, 1.f, p.dv, p.dv_share, p.emit_dkv, t, key0, seqlen_k - key0,
                                    p.shape.head_dim_v);
      arrive(plan.tile_empty[tiles.stage()]);
      tiles.advance();
    }
  } else {  // ----------------------------------------------------------------------------- keys
    float dk[T::kDimQK / 2];
    const uint64_t v_rows = descriptor_at(kFormK, smem_addr(plan.v));
    const uint64_t do_tile = descriptor_at(kFormK, smem_addr(plan.dout));
    const uint64_t q_cols = descriptor_at(kFormT, smem_addr(plan.q));
#pragma unroll 1
    for (;;) {
      mbar_wait(bar(plan.tile_full[tiles.stage()]), tiles.phase());
      const KeyTile& t = plan.tile[tiles.stage()];
      const int key_block = uniform(t.key_block);
      if (key_block < 0) break;
      const int steps = uniform(t.steps), query_begin = uniform(t.query_begin),
                query_end = uniform(t.query_end);
      const int seqlen_q = uniform(t.seqlen_q), seqlen_k = uniform(t.seqlen_k),
                key0 = key_block * BLOCK_N;
      const int cut_block = kPacked && seqlen_q % BLOCK_M ? seqlen_q / BLOCK_M : -1;
#pragma unroll
      for (int i = 0; i < T::kDimQK / 2; ++i) dk[i] = 0.f;
      if (steps > 0) {
        float dp[T::kScoreRegs];
        uint32_t ds16[T::kScoreRegs / 2];
        int m = query_begin, done = 0;
        const auto scores = [&] {
          mbar_wait(bar(plan.do_full[do_ring.stage]), do_ring.phase);
          if (kPacked && m == cut_block)
            clear(plan.dout[do_ring.stage], T::kSlabsV, BLOCK_M, seqlen_q % BLOCK_M);
          start_at_columns(dp, smem_addr(plan.neg_delta[do_ring.stage]));
          pin(dp);
          mma_scores(dp, v_rows, descriptor_step(do_tile, do_ring.stage * T::kDoBytes),
                     Number<T::kDimV>{});
        };
        mbar_wait(bar(plan.v_full), key_phase);
        key_phase ^= 1;
        if (kPacked && seqlen_k - key0 < BLOCK_N)
          clear(plan.v, T::kSlabsV, BLOCK_N, seqlen_k - key0);
        scores();
        // On entry: dP of block m done or queued before the dK of the block before it.
        wgmma_wait<0>(), pin(dp);
        const auto step = [&](auto is_last) {
          arrive(plan.do_empty[do_ring.stage]);
          do_ring.advance();
          mbar_wait(bar(plan.p_full), pass_phase);
          pass_phase ^= 1;
#pragma unroll
          for (int i = 0; i < T::kPassVectors; ++i) {
            const uint4 probs = lds128(smem_addr(plan.p[i][thread]));
            const uint32_t words[4] = {probs.x, probs.y, probs.z, probs.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const float2 prob = unpack2<Elem>(words[j]);
              dp[8 * i + 2 * j] *= prob.x;
              dp[8 * i + 2 * j + 1] *= prob.y;
            }
          }
          arrive(plan.p_empty);
          wgmma_wait<0>(), pin(dk);  // dK of the block before: its dS may go
          if (done > 0) {
            arrive(plan.q_empty[q_ring.stage]);
            q_ring.advance();
          }
          pack_all<Elem>(dp, ds16);
          const int q_stage = q_ring.stage;
          mbar_wait(bar(plan.q_full[q_stage]),
                    q_ring.phase);  // P came, so it is there, and cleared where it must be
          if (++m == query_end) m = query_begin;
          if constexpr (!decltype(is_last)::value)
            scores();
          else
            arrive(plan.v_empty);
          mma_grad(dk, ds16, descriptor_step(q_cols, q_stage * T::kQBytes));
          if constexpr (decltype(is_last)::value) {
            wgmma_wait<0>(), pin(dk);
            arrive(plan.q_empty[q_stage]);
            q_ring.advance();
          } else {
            wgmma_wait<1>(), pin(dp);
          }
        };
#pragma unroll 1
        for (; done < steps - 1; ++done) step(Constant<false>{});
        step(Constant<true>{});
      }
      emit_gradient<Elem, T::kDimQK>(dk, p.shape.softmax_scale, p.dk, p.dk_share, p.emit_dkv, t,
                                     key0, seqlen_k - key0, p.shape.head_dim_qk);
      arrive(plan.tile_empty[tiles.stage()]);
      tiles.advance();
    }
  }
}

}  // namespace fa3

// Second of the two passes of the backward for head dims above 128: dQ.
//
// The forward's shape: Q and dO of 128 queries stay in shared memory, dQ in registers (64 queries
// per warpgroup), key blocks stream by.
//   S = Q K^T, P = exp2(S c - LSE log2e), dP = dO V^T, dS = P o (dP - delta), dQ += dS K (A from
// registers) Rows are queries here: LSE and delta are two registers each. dQ is scaled, rounded and
// stored at once.
//
// May run beside the end of bwd_keys, from which it needs nothing; it only must not end before it.
//
// Warpgroup 0: warp 0 draws tiles, loads Q, K; warp 2 loads dO, V.
#pragma once
#include <type_traits>

#include "attn/bwd_tile.cuh"
#include "tile/pipeline.cuh"

namespace fa3 {

template <int kDimQK_, int kDimV_, int kStatRows_, class Elem_, BwdMode kMode>
struct BwdQueriesTraits {
  using Elem = Elem_;
  static constexpr int kDimQK = kDimQK_, kDimV = kDimV_;
  static constexpr bool kRightBound = kMode >= kBwdCausal, kLeftBound = kMode >= kBwdWindow;
  static constexpr bool kPacked = kMode >= kBwdPacked, kSoftcap = kMode == kBwdSoftcap;
  static constexpr int kStatRows = kStatRows_;  // rows of a block of statistics, that of bwd_keys
  // S, dP and dS beside dQ: 208 registers.
  static constexpr int BLOCK_M = 128, BLOCK_N = kDimQK == 256 ? 64 : 80;
  static constexpr int kThreads = 384, kRegsProducer = 24, kRegsConsumer = 240;
  // K serves S and, a step later, dQ. V's only use ends early in a step, so that one stage is
  // enough.
  static constexpr int kStagesK = 2, kStagesV = kDimQK + kDimV > 400 ? 1 : 2;
  static constexpr int kSlabsQK = kDimQK / kSlabCols, kSlabsV = kDimV / kSlabCols;
  static constexpr int kScoreRegs = BLOCK_N / 2;
  static constexpr int kQBytes = BLOCK_M * kSlabsQK * kSlabBytes,
                       kDoBytes = BLOCK_M * kSlabsV * kSlabBytes;
  static constexpr int kKBytes = BLOCK_N * kSlabsQK * kSlabBytes,
                       kVBytes = BLOCK_N * kSlabsV * kSlabBytes;

  struct SharedPlan {
    alignas(1024) uint8_t q[kQBytes];
    uint8_t dout[kDoBytes];
    uint8_t k[kStagesK][kKBytes];
    uint8_t v[kStagesV][kVBytes];
    QueryTile tile[2];
    uint64_t q_full, q_empty, do_full, do_empty;
    uint64_t k_full[kStagesK], k_empty[kStagesK], v_full[kStagesV], v_empty[kStagesV];
    uint64_t tile_full[2], tile_empty[2];
  };
  static constexpr int kSharedBytes = sizeof(SharedPlan);
  static_assert(kSharedBytes <= kSharedBytesPerBlock, "shared memory of one block");
};

// Keys [.., seqlen_k) and the window, for a tile of 64 queries x BLOCK_N keys.
template <int BLOCK_N, bool kRight, bool kLeft>
FA3_DEVICE void mask_rows(float (&s)[BLOCK_N / 2], float hidden, Mask mask, int query0, int key0,
                          int seqlen_k) {
  const int quad2 = 2 * (threadIdx.x & 3), query = query0 + acc_row(threadIdx.x & 127, 0);
  const bool tail = key0 + BLOCK_N > seqlen_k;
  if (tail || (kRight && key0 + BLOCK_N - 1 > query0 + mask.shift + mask.right)) {
    const int end = seqlen_k - 1 - key0 - quad2;
    const int reach = kRight ? query + mask.shift + mask.right - key0 - quad2 : end;
    const int hi0 = reach < end ? reach : end, hi1 = kRight && reach + 8 < end ? reach + 8 : end;
#pragma unroll
    for (int i = 0; i < BLOCK_N / 8; ++i) {
      if (8 * i + 0 > hi0) s[4 * i + 0] = hidden;
      if (8 * i + 1 > hi0) s[4 * i + 1] = hidden;
      if (8 * i + 0 > hi1) s[4 * i + 2] = hidden;
      if (8 * i + 1 > hi1) s[4 * i + 3] = hidden;
    }
  }
  if (kLeft && key0 < query0 + kWarpgroupRows - 1 + mask.shift - mask.left) {
    const int lo0 = query + mask.shift - mask.left - key0 - quad2, lo1 = lo0 + 8;
#pragma unroll
    for (int i = 0; i < BLOCK_N / 8; ++i) {
      if (8 * i + 0 < lo0) s[4 * i + 0] = hidden;
      if (8 * i + 1 < lo0) s[4 * i + 1] = hidden;
      if (8 * i + 0 < lo1) s[4 * i + 2] = hidden;
      if (8 * i + 1 < lo1) s[4 * i + 3] = hidden;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    bwd_queries(const __grid_constant__ BwdKernelParams p) {
  using Elem = typename T::Elem;
  using Plan = typename T::SharedPlan;
  constexpr int BLOCK_M = T::BLOCK_M, BLOCK_N = T::BLOCK_N;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Plan& plan = *reinterpret_cast<Plan*>(shared_bytes);
  const auto bar = [](const uint64_t& b) { return smem_addr(&b); };
  const int warp = uniform(threadIdx.x / 32), warpgroup = warp / 4;
  constexpr int kMathWarps = 8;

  if (threadIdx.x == 0) {
    mbar_init(bar(plan.q_full), 1), mbar_init(bar(plan.q_empty), kMathWarps);
    mbar_init(bar(plan.do_full), 1), mbar_init(bar(plan.do_empty), kMathWarps);
    for (int i = 0; i < T::kStagesK; ++i)
      mbar_init(bar(plan.k_full[i]), 1), mbar_init(bar(plan.k_empty[i]), kMathWarps);
    for (int i = 0; i < T::kStagesV; ++i)
      mbar_init(bar(plan.v_full[i]), 1), mbar_init(bar(plan.v_empty[i]), kMathWarps);
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
      Ring<T::kStagesK> ring;
      Ring<2> tiles;
      uint32_t query_phase = 0;
      for (;;) {
        QueryTile& t = plan.tile[tiles.stage];
        mbar_wait(bar(plan.tile_empty[tiles.stage]), tiles.phase ^ 1);
        find_query_tile<T::kStatRows, BLOCK_M, BLOCK_N, T::kPacked>(
            p, atomicAdd(p.work.tile_counter + 1, 1), t);
        mbar_arrive(bar(plan.tile_full[tiles.stage]));
        tiles.advance();
        if (t.query_block < 0) break;
        const int begin = t.key_begin, end = t.key_end, key_row = t.key_row, head = t.head_k,
                  batch = t.batch;
        for (int n = begin; n < end; ++n, ring.advance()) {
          const int i = ring.stage;
          mbar_wait(bar(plan.k_empty[i]), ring.phase ^ 1);
          mbar_arrive_expect_tx(bar(plan.k_full[i]), T::kKBytes);
          load_tile(plan.k[i], p.k, plan.k_full[i], T::kSlabsQK, BLOCK_N, key_row + n * BLOCK_N,
                    head, batch, kL2EvictLast);
          if (n == begin) {
            mbar_wait(bar(plan.q_empty), query_phase ^ 1);
            query_phase ^= 1;
            mbar_arrive_expect_tx(bar(plan.q_full), T::kQBytes);
            load_tile(plan.q, p.q, plan.q_full, T::kSlabsQK, BLOCK_M,
                      t.query_row + t.query_block * BLOCK_M, t.head_q, t.batch, kL2EvictFirst);
          }
        }
      }
      grid_dependency_wait();  // bwd_keys has ended: what follows this kernel may rely on it
    } else if (warp == 2 && elect_one()) {
      Ring<T::kStagesV> ring;
      Ring<2> tiles;
      uint32_t query_phase = 0;
      for (;;) {
        const QueryTile& t = plan.tile[tiles.stage];
        mbar_wait(bar(plan.tile_full[tiles.stage]), tiles.phase);
        if (t.query_block < 0) break;
        const int begin = t.key_begin, end = t.key_end, key_row = t.key_row, head = t.head_k,
                  batch = t.batch;
        for (int n = begin; n < end; ++n, ring.advance()) {
          const int i = ring.stage;
          mbar_wait(bar(plan.v_empty[i]), ring.phase ^ 1);
          mbar_arrive_expect_tx(bar(plan.v_full[i]), T::kVBytes);
          load_tile(plan.v[i], p.v, plan.v_full[i], T::kSlabsV, BLOCK_N, key_row + n * BLOCK_N,
                    head, batch, kL2EvictLast);
          if (n == begin) {
            mbar_wait(bar(plan.do_empty), query_phase ^ 1);
            query_phase ^= 1;
            mbar_arrive_expect_tx(bar(plan.do_full), T::kDoBytes);
            load_tile(plan.dout, p.dout, plan.do_full, T::kSlabsV, BLOCK_M,
                      t.query_row + t.query_block * BLOCK_M, t.head_q, t.batch, kL2EvictFirst);
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
  constexpr int kBarRowsCleared = 1;
  constexpr uint64_t kFormK = descriptor_form<128>(16),
                     kFormT = descriptor_form<128>(BLOCK_N * kSlabBytes);
  const uint64_t q_rows = descriptor_at(kFormK, smem_addr(plan.q) + g * 64 * kSlabBytes);
  const uint64_t do_rows = descriptor_at(kFormK, smem_addr(plan.dout) + g * 64 * kSlabBytes);
  const uint64_t k_tile = descriptor_at(kFormK, smem_addr(plan.k)),
                 v_tile = descriptor_at(kFormK, smem_addr(plan.v));
  const uint64_t k_cols = descriptor_at(kFormT, smem_addr(plan.k));
  const auto mma_scores = [&](float (&x)[T::kScoreRegs], uint64_t a, uint64_t b, auto depth) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < decltype(depth)::value / 16; ++k) {
      const uint64_t a_step =
          descriptor_step(a, k / 4 * BLOCK_M * kSlabBytes + k % 4 * kStepKMajor);
      const uint64_t b_step =
          descriptor_step(b, k / 4 * BLOCK_N * kSlabBytes + k % 4 * kStepKMajor);
      if (k == 0)
        Wgmma<Elem, BLOCK_N>::template ss_zero<0, 0>(x, a_step, b_step);
      else
        Wgmma<Elem, BLOCK_N>::template ss<0, 0>(x, a_step, b_step);
    }
    wgmma_commit();
  };
  constexpr bool kPacked = T::kPacked;
  // K and V rows past the end of a packed sequence meet P = dS = 0, but 0 * NaN is NaN.
  const auto clear = [&](uint8_t* tile, int slabs, int rows, int from) {
    clear_rows<256>(smem_addr(tile), slabs, rows, from);
    fence_proxy_async_shared();
    named_sync(kBarRowsCleared, 256);
  };

  static_assert(T::kStagesK == 2 && T::kStagesV <= 2, "the math warpgroups' rings");
  PairRing tiles, k_ring;
  std::conditional_t<T::kStagesV == 2, PairRing, SingleRing> v_ring;
  uint32_t query_phase = 0;
  float dq[T::kDimQK / 2];
#pragma unroll 1
  for (;;) {
    mbar_wait(bar(plan.tile_full[tiles.stage()]), tiles.phase());
    const QueryTile& t = plan.tile[tiles.stage()];
    const int query_block = uniform(t.query_block);
    if (query_block < 0) break;
    const int key_end = uniform(t.key_end), seqlen_q = uniform(t.seqlen_q),
              seqlen_k = uniform(t.seqlen_k);
    int n = uniform(t.key_begin);
    const int query0 = query_block * BLOCK_M + 64 * g;
    const Mask mask{seqlen_k - seqlen_q, p.shape.window_left, p.shape.window_right};
    const int cut_block = kPacked && seqlen_k % BLOCK_N ? seqlen_k / BLOCK_N : -1;
#pragma unroll
    for (int i = 0; i < T::kDimQK / 2; ++i) dq[i] = 0.f;
    if (n < key_end) {
      // Statistics of this thread's two rows; rows that do not exist have no P.
      float neg_lse[2], neg_delta[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = query0 + acc_row(thread, 2 * i);
        const int64_t at =
            (int64_t(t.head_q) * p.shape.row_blocks + t.row_block + row / T::kStatRows) *
                T::kStatRows +
            statistics_slot(row % T::kStatRows);
        neg_lse[i] = row < seqlen_q ? p.work.neg_lse[at] * (T::kSoftcap ? 1.f : p.shape.scale_log2)
                                    : -INFINITY;
        neg_delta[i] = row < seqlen_q ? p.work.neg_delta[at] : 0.f;
      }
      float s[T::kScoreRegs], dp[T::kScoreRegs];
      uint32_t ds16[T::kScoreRegs / 2];
      const auto scores = [&] {
        mbar_wait(bar(plan.k_full[k_ring.stage()]), k_ring.phase());
        if (kPacked && n == cut_block)
          clear(plan.k[k_ring.stage()], T::kSlabsQK, BLOCK_N, seqlen_k % BLOCK_N);
        mma_scores(s, q_rows, descriptor_step(k_tile, k_ring.stage() * T::kKBytes),
                   Number<T::kDimQK>{});
        mbar_wait(bar(plan.v_full[v_ring.stage()]), v_ring.phase());
        if (kPacked && n == cut_block)
          clear(plan.v[v_ring.stage()], T::kSlabsV, BLOCK_N, seqlen_k % BLOCK_N);
        mma_scores(dp, do_rows, descriptor_step(v_tile, v_ring.stage() * T::kVBytes),
                   Number<T::kDimV>{});
      };
      // Scores to P, or with softcap to P (1 - x^2): the factor of dP - delta.
      const auto softmax = [&] {
        if constexpr (T::kSoftcap) {
#pragma unroll
          for (int i = 0; i < T::kScoreRegs; ++i) s[i] = tanh_approx(s[i] * p.shape.softcap_input);
        }
        mask_rows<BLOCK_N, T::kRightBound, T::kLeftBound>(s, T::kSoftcap ? -1e18f : -INFINITY, mask,
                                                          query0, n * BLOCK_N, seqlen_k);
#pragma unroll
        for (int i = 0; i < T::kScoreRegs; ++i) {
          const float x = s[i];
          s[i] = exp2_approx(fmaf(x, p.shape.scale_log2, neg_lse[(i >> 1) & 1]));
          if constexpr (T::kSoftcap) s[i] *= fmaf(-x, x, 1.f);
        }
      };
      mbar_wait(bar(plan.q_full), query_phase);
      mbar_wait(bar(plan.do_full), query_phase);
      query_phase ^= 1;
      scores();
      wgmma_wait<1>(), pin(s);
      softmax();
      pin(s);
      // On entry: P in s, dP in flight. The next S and dP queue behind this step's dQ.
      const auto step = [&](auto is_last) {
        wgmma_wait<0>(), pin(dp);
        arrive(plan.v_empty[v_ring.stage()]);
        v_ring.advance();
#pragma unroll
        for (int i = 0; i < T::kScoreRegs; ++i) dp[i] = s[i] * (dp[i] + neg_delta[(i >> 1) & 1]);
        pack_all<Elem>(dp, ds16);
        const int k_stage = k_ring.stage();
        const uint64_t keys = descriptor_step(k_cols, k_stage * T::kKBytes);
        k_ring.advance();
        ++n;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < BLOCK_N / 16; ++k)
          Wgmma<Elem, T::kDimQK>::template rs<1>(dq, ds16[4 * k], ds16[4 * k + 1], ds16[4 * k + 2],
                                                 ds16[4 * k + 3],
                                                 descriptor_step(keys, k * kStepMNMajor));
        wgmma_commit();
        if constexpr (decltype(is_last)::value) {
          arrive(plan.q_empty);
          arrive(plan.do_empty);
          wgmma_wait<0>(), pin(dq);
          arrive(plan.k_empty[k_stage]);
        } else {
          scores();
          wgmma_wait<1>(), pin(s);  // dQ and S
          arrive(plan.k_empty[k_stage]);
          softmax();
          pin(s);
        }
      };
#pragma unroll 1
      while (n < key_end - 1) step(Constant<false>{});
      step(Constant<true>{});
    }
    const int rows = seqlen_q - query0;
    const int64_t at = t.batch * p.dq.stride_batch +
                       int64_t(t.query_row + query0) * p.dq.stride_token +
                       t.head_q * p.dq.stride_head;
    const float scale = p.shape.softmax_scale;
    if (p.dq_fp32)
      add_rows<T::kDimQK>(dq, scale, static_cast<float*>(p.dq.ptr) + at, p.dq.stride_token, rows,
                          p.shape.head_dim_qk);
    else
      store_rows<Elem, T::kDimQK>(dq, scale, static_cast<Elem*>(p.dq.ptr) + at, p.dq.stride_token,
                                  rows, p.shape.head_dim_qk);
    arrive(plan.tile_empty[tiles.stage()]);
    tiles.advance();
  }
}

}  // namespace fa3

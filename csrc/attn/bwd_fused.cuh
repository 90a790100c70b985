// Backward in one pass over the scores: head dims up to 128, bf16 and fp16 (FlashAttention-2,
// algorithm 2, with the warp specialisation of FlashAttention-3, section 3.1; kernel design and
// numbers in docs/backward.md).
//
//   S = Q K^T, P = exp2(S c - LSE log2e), dP = dO V^T, dS = P o (dP - delta)
//   dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K
//
// A thread block takes tiles of 128 keys from a queue. K and V stay in shared memory, dK and dV in
// registers, and the query blocks of all query heads of the tile stream by. S and dP are computed
// transposed (64 keys of one warpgroup x block of queries), because their accumulators then already
// are the A operands of dV += P^T dO and dK += dS^T Q; only dS goes through shared memory, for dQ.
// dQ is summed over key tiles in global FP32 memory in fragment order, by bulk reductions from
// shared memory. Rounded it is here, row block by row block (bwd_dq.cuh), where tiles are short; a
// kernel of its own, bwd_finish_dq, does it where they are long (finish_inside, bwd_plan.cu).
//
// Warpgroup 0, finishing inside: warp 0 draws tiles and loads, warp 1 sends dQ, warp 2 keeps turns,
// warp 3 finishes. Else: warp 0 draws tiles, loads K, Q, LSE; warp 1 sends dQ; warp 2 loads V, dO,
// delta. Warpgroups 1 and 2: math, 64 keys each. All rings run on from tile to tile, so that the
// next tile's loads are under way during the last steps and the epilogue of this one.
#pragma once
#include "attn/bwd_roles.cuh"

namespace fa3 {

template <int kHeadDim_, class Elem_, BwdMode kMode>
struct BwdFusedTraits {
  using Elem = Elem_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kRightBound = kMode >= kBwdCausal, kLeftBound = kMode >= kBwdWindow;
  static constexpr bool kPacked = kMode >= kBwdPacked, kSoftcap = kMode == kBwdSoftcap;
  // Scores are computed 64 queries at a time: S, dP and their packed copies are 96 registers beside
  // dK and dV. At head dim 64 a step takes two such halves, so that dQ has 64 rows for each
  // warpgroup.
  static constexpr int kHalves = kHeadDim == 64 ? 2 : 1;
  static constexpr int BLOCK_M = 64 * kHalves, BLOCK_N = kBwdKeyTile;
  static constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
  static constexpr int kRegsProducer = 24, kRegsConsumer = 240;
  // Q has a third stage: dK of one step runs on into the next, and holds its Q until then.
  static constexpr int kStagesQ = 3, kStagesDO = 2, kStagesDS = 2;
  static constexpr int kSlabs = ceil_div(kHeadDim, kSlabCols);
  static constexpr int kScoreRegs = 32, kGradRegs = kHeadDim / 2;
  // dQ of a step is 64 x 64 per warpgroup: rows 64 g at head dim 64, else columns 64 g. At head dim
  // 96 the second half has 32 columns; it is computed in full (K's slab is padded with zeros) and
  // sent in part.
  static constexpr bool kSplitDqRows = kHalves == 2;
  static constexpr int kDqRegs = 32, kDqBytes = 64 * 64 * 4;
  static constexpr int kDqBlockFloats = BLOCK_M * kHeadDim;
  static FA3_HD constexpr int dq_bytes(int g) {
    return g == 0 || kHeadDim % 64 == 0 ? kDqBytes : kDqBytes * (kHeadDim % 64) / 64;
  }

  static constexpr int kQueryTileBytes = BLOCK_M * kSlabs * kSlabBytes;
  static constexpr int kKeyTileBytes = BLOCK_N * kSlabs * kSlabBytes;
  static constexpr int kDsBytes = BLOCK_M * BLOCK_N * 2;

  struct SharedPlan {
    alignas(1024) uint8_t k[kKeyTileBytes];
    uint8_t v[kKeyTileBytes];
    uint8_t q[kStagesQ][kQueryTileBytes];
    uint8_t dout[kStagesDO][kQueryTileBytes];
    uint8_t ds[kStagesDS][kDsBytes];  // [BLOCK_N / 64 slabs][BLOCK_M queries][64 keys]
    uint8_t dq[kConsumers][kDqBytes];
    uint8_t finish[2][kFinishChunkBytes];
    float neg_lse[kStagesQ][BLOCK_M];
    float neg_delta[kStagesDO][BLOCK_M];
    KeyTile tile[2];
    uint64_t k_full, k_empty, v_full, v_empty;
    uint64_t q_full[kStagesQ], q_empty[kStagesQ];
    uint64_t do_full[kStagesDO], do_empty[kStagesDO];
    uint64_t dq_full[kConsumers], dq_empty[kConsumers];
    uint64_t tile_full[2], tile_empty[2];
    uint64_t finish_full[2];
    uint64_t turn_full[2], dq_landed[2];
    int turn_stores[2];
    FinishQueue finish_queue;
  };
  static constexpr int kSharedBytes = sizeof(SharedPlan);
  static_assert(kSharedBytes <= kSharedBytesPerBlock, "shared memory of one block");
  static_assert(64 * kSlabs * kSlabBytes <= kDqBytes, "the dQ buffers also stage dV and dK");
  static_assert(kRegsProducer + kConsumers * kRegsConsumer <= 65536 / 128, "registers of one SM");
};

// Named barriers of the math warpgroups (0 is __syncthreads).
enum BwdBarrier : int {
  kBarDsWritten = 1,    // both halves of dS are in shared memory
  kBarRowsCleared = 2,  // rows past the end of a packed sequence are zero
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    bwd_fused(const __grid_constant__ BwdKernelParams p) {
  using Elem = typename T::Elem;
  using Plan = typename T::SharedPlan;
  constexpr int BLOCK_M = T::BLOCK_M, BLOCK_N = T::BLOCK_N;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Plan& plan = *reinterpret_cast<Plan*>(shared_bytes);
  constexpr int kMathWarps = 4 * T::kConsumers;

  if (threadIdx.x == 0) {
    mbar_init(bar(plan.k_full), 1), mbar_init(bar(plan.k_empty), kMathWarps);
    mbar_init(bar(plan.v_full), 1), mbar_init(bar(plan.v_empty), kMathWarps);
    for (int i = 0; i < T::kStagesQ; ++i)
      mbar_init(bar(plan.q_full[i]), 1), mbar_init(bar(plan.q_empty[i]), kMathWarps);
    for (int i = 0; i < T::kStagesDO; ++i)
      mbar_init(bar(plan.do_full[i]), 1), mbar_init(bar(plan.do_empty[i]), kMathWarps);
    for (int i = 0; i < T::kConsumers; ++i)
      mbar_init(bar(plan.dq_full[i]), 4), mbar_init(bar(plan.dq_empty[i]), 1);
    for (int i = 0; i < 2; ++i)  // readers: the math warps and warps 1 and 2
      mbar_init(bar(plan.tile_full[i]), 1), mbar_init(bar(plan.tile_empty[i]), kMathWarps + 2);
    mbar_init(bar(plan.finish_full[0]), 1), mbar_init(bar(plan.finish_full[1]), 1);
    for (int i = 0; i < 2; ++i)
      mbar_init(bar(plan.turn_full[i]), 1), mbar_init(bar(plan.dq_landed[i]), 1);
    plan.finish_queue.clear();
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) grid_launch_dependents();

  // ---------------------------------------------------------------------------------- loads, sends
  if (uniform(threadIdx.x / kWarpgroupThreads) == 0) {
    registers_release<T::kRegsProducer>();
    const int warp = uniform(current_thread_index() / 32);
    if (p.finish_inside) {
      if (warp == 0) {
        if (elect_one()) load_inputs<T, true, true>(p, plan);
      } else if (warp == 1) {
        if (elect_one()) send_gradients<T, true>(p, plan);
      } else if (warp == 2) {
        if (elect_one()) keep_turns<T>(p, plan);
      } else {
        grid_dependency_wait();
        finish_row_blocks<T>(p, smem_addr(plan.finish), bar(plan.finish_full[0]),
                             plan.finish_queue);
      }
    } else if (elect_one()) {
      if (warp == 0)
        load_inputs<T, true, false>(p, plan);
      else if (warp == 1)
        send_gradients<T, false>(p, plan);
      else if (warp == 2)
        load_inputs<T, false, true>(p, plan);
    }
    return;
  }

  // ---------------------------------------------------------------------------------------- math
  registers_claim<T::kRegsConsumer>();
  // Keys 64 g .. 64 g + 63 of the tile.
  const int g = uniform(current_thread_index() / kWarpgroupThreads) - 1;
  const int thread = threadIdx.x & 127, lane = threadIdx.x & 31;
  float dk[T::kGradRegs], dv[T::kGradRegs];

  constexpr uint64_t kFormK = descriptor_form<128>(16);  // K-major
  constexpr uint64_t kFormQueryT = descriptor_form<128>(BLOCK_M * kSlabBytes),
                     kFormKeyT = descriptor_form<128>(BLOCK_N * kSlabBytes);
  const uint64_t k_rows = descriptor_at(kFormK, smem_addr(plan.k) + g * 64 * kSlabBytes);
  const uint64_t v_rows = descriptor_at(kFormK, smem_addr(plan.v) + g * 64 * kSlabBytes);
  const uint64_t q_tile = descriptor_at(kFormK, smem_addr(plan.q)),
                 do_tile = descriptor_at(kFormK, smem_addr(plan.dout));
  const uint64_t q_cols = descriptor_at(kFormQueryT, smem_addr(plan.q));
  const uint64_t do_cols = descriptor_at(kFormQueryT, smem_addr(plan.dout));
  const uint64_t ds_rows =
      descriptor_at(kFormK, smem_addr(plan.ds) + (T::kSplitDqRows ? g * 64 * kSlabBytes : 0));
  const uint64_t k_cols = descriptor_at(
      kFormKeyT, smem_addr(plan.k) + (T::kSplitDqRows ? 0 : g * BLOCK_N * kSlabBytes));

  // x += A B^T over the head dim: S^T = K Q^T, dP^T = V dO^T.
  const auto mma_scores = [&](float (&x)[T::kScoreRegs], uint64_t a, uint64_t b) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < T::kHeadDim / 16; ++k)
      Wgmma<Elem, 64>::template ss<0, 0>(
          x, descriptor_step(a, k / 4 * BLOCK_N * kSlabBytes + k % 4 * kStepKMajor),
          descriptor_step(b, k / 4 * BLOCK_M * kSlabBytes + k % 4 * kStepKMajor));
    wgmma_commit();
  };
  // x += A B over 64 queries: dV = P^T dO, dK = dS^T Q.
  const auto mma_grad = [&](float (&x)[T::kGradRegs], const uint32_t (&a)[T::kScoreRegs / 2],
                            uint64_t b) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      Wgmma<Elem, T::kHeadDim>::template rs<1>(x, a[4 * k], a[4 * k + 1], a[4 * k + 2],
                                               a[4 * k + 3], descriptor_step(b, k * kStepMNMajor));
    wgmma_commit();
  };
  // This warpgroup's half of dQ = dS K over the keys of the tile.
  const auto mma_dq = [&](float (&x)[T::kDqRegs], uint64_t a) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < BLOCK_N / 16; ++k) {
      const uint64_t ds_step =
          descriptor_step(a, k / 4 * BLOCK_M * kSlabBytes + k % 4 * kStepKMajor);
      const uint64_t k_step = descriptor_step(k_cols, k * kStepMNMajor);
      if (k == 0)
        Wgmma<Elem, 64>::template ss_zero<0, 1>(x, ds_step, k_step);
      else
        Wgmma<Elem, 64>::template ss<0, 1>(x, ds_step, k_step);
    }
    wgmma_commit();
  };

  // dS^T fragments (16 queries a time) to the K-major [query][key] tile. 8 x 8 matrix i of the
  // four: queries 8 (i / 2) .. + 7, keys 8 (i % 2) .. + 7 of this warp's 16; .trans turns rows
  // (keys) into columns.
  const int warp16 = thread / 32;
  const uint32_t ds_lane = smem_addr(plan.ds) + g * BLOCK_M * kSlabBytes +
                           (8 * (lane >> 4) + (lane & 7)) * kSlabBytes +
                           (((2 * warp16 + ((lane >> 3) & 1)) ^ (lane & 7)) << 4);
  const auto store_ds = [&](const uint32_t (&a)[T::kScoreRegs / 2], int stage, int half) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      stmatrix_x4_trans(ds_lane + stage * T::kDsBytes + (4 * half + k) * 16 * kSlabBytes, a[4 * k],
                        a[4 * k + 1], a[4 * k + 2], a[4 * k + 3]);
  };
  uint32_t dq_phase = 1;
  const auto await_dq_buffer = [&] {
    mbar_wait(bar(plan.dq_empty[g]), dq_phase);
    dq_phase ^= 1;
  };
  const auto store_dq =
      [&](const float (&x)[T::kDqRegs]) {  // vector i of all threads, then i + 1: no conflicts
        constexpr int kVectors = T::kDqRegs / 4;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
          if (T::kHeadDim % 64 == 0 || g == 0 || i < T::dq_bytes(1) / 2048)
            sts_float4(smem_addr(plan.dq[g]) + thread * 16 + i * 2048, x[4 * i], x[4 * i + 1],
                       x[4 * i + 2], x[4 * i + 3]);
      };
  const auto arrive = [&](const uint64_t& b) {
    __syncwarp();
    if (lane == 0) mbar_arrive(bar(b));
  };
  const auto send_dq = [&] {
    arrive(plan.dq_full[g]);
  };

  // Scores start at -LSE / scale and dP at -delta, which saves their subtraction; with softcap tanh
  // comes between.
  constexpr int kHalfTile = 64 * kSlabBytes,
                kHalfRows = 64 * 4;  // bytes from one half to the next: tiles, statistics
  using Columns = float4[T::kScoreRegs / 8];
  const auto load_lse = [&](Columns& columns, int stage, int half) {
    if constexpr (!T::kSoftcap)
      load_columns<T::kScoreRegs>(columns, smem_addr(plan.neg_lse[stage]) + half * kHalfRows);
  };
  const auto load_delta = [&](Columns& columns, int stage, int half) {
    load_columns<T::kScoreRegs>(columns, smem_addr(plan.neg_delta[stage]) + half * kHalfRows);
  };
  const auto start_scores = [&](float (&s)[T::kScoreRegs], const Columns& columns) {
    if constexpr (T::kSoftcap) {
#pragma unroll
      for (int i = 0; i < T::kScoreRegs; ++i) s[i] = 0.f;
    } else {
      spread_columns(s, columns);
    }
  };
  // Finite with softcap, where 1 - x^2 must stay finite too; far enough for exp2 to give 0.
  constexpr float kHidden = T::kSoftcap ? -1e18f : -INFINITY;
  // Scores to P, or with softcap to x = tanh(score / cap), from which P and the derivative both
  // follow later.
  const auto softmax = [&](float (&s)[T::kScoreRegs], int shift, int key0, int seqlen_k, int m,
                           int half) {
    const Mask mask{shift, p.shape.window_left, p.shape.window_right};
    if constexpr (T::kSoftcap) {
#pragma unroll
      for (int i = 0; i < T::kScoreRegs; ++i) s[i] = tanh_approx(s[i] * p.shape.softcap_input);
    }
    mask_transposed<64, T::kRightBound, T::kLeftBound>(s, kHidden, mask, key0, seqlen_k,
                                                       T::kHalves * m + half);
    if constexpr (!T::kSoftcap) {
#pragma unroll
      for (int i = 0; i < T::kScoreRegs; ++i) s[i] = exp2_approx(s[i] * p.shape.scale_log2);
    }
  };
  // dP - delta to dS, and with softcap x to P; both packed.
  const auto softmax_backward = [&](float (&s)[T::kScoreRegs], float (&dp)[T::kScoreRegs],
                                    uint32_t (&p16)[T::kScoreRegs / 2],
                                    uint32_t (&ds16)[T::kScoreRegs / 2], int q_stage, int half) {
    if constexpr (T::kSoftcap) {
#pragma unroll
      for (int k = 0; k < T::kScoreRegs / 8; ++k) {
        float4 neg_lse[1];
        load_columns<8>(neg_lse, smem_addr(plan.neg_lse[q_stage]) + half * kHalfRows + k * 64);
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          float prob[2], ds[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float x = s[8 * k + i + j];
            prob[j] = exp2_approx(fmaf(x, p.shape.scale_log2, column_of(neg_lse[0], i + j)));
            ds[j] = dp[8 * k + i + j] * (prob[j] * fmaf(-x, x, 1.f));
          }
          p16[4 * k + i / 2] = pack2<Elem>(prob[0], prob[1]);
          ds16[4 * k + i / 2] = pack2<Elem>(ds[0], ds[1]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < T::kScoreRegs; ++i) dp[i] *= s[i];
      pack_all<Elem>(s, p16);
      pack_all<Elem>(dp, ds16);
    }
  };

  static_assert(T::kStagesDO == 2, "the math warpgroups' rings");
  PairRing tiles, do_ring;
  Ring<T::kStagesQ> q_ring;
  uint32_t key_phase = 0, ds_stage = 0;
#pragma unroll 1
  for (;;) {
    mbar_wait(bar(plan.tile_full[tiles.stage()]), tiles.phase());
    const KeyTile& t = plan.tile[tiles.stage()];
    // Through a shuffle the compiler knows these to be uniform, and their loops not to diverge.
    const int key_block = uniform(t.key_block);
    if (key_block < 0) break;
    const int steps = uniform(t.steps), query_begin = uniform(t.query_begin),
              query_end = uniform(t.query_end);
    const int seqlen_q = uniform(t.seqlen_q), seqlen_k = uniform(t.seqlen_k);
    const int shift = seqlen_k - seqlen_q, key0 = key_block * BLOCK_N + g * 64;
#pragma unroll
    for (int i = 0; i < T::kGradRegs; ++i) dk[i] = dv[i] = 0.f;

    // Packed sequences: the last rows of the last query block belong to somebody else.
    constexpr bool kPacked = T::kPacked;
    const auto clear_query_rows = [&](int m) {
      if (!kPacked) return;
      const int rows = (T::kSoftcap ? uniform(t.seqlen_q) : seqlen_q) -
                       m * BLOCK_M;  // softcap: registers are short
      if (rows >= BLOCK_M) return;
      clear_rows<256>(smem_addr(plan.q[q_ring.stage]), T::kSlabs, BLOCK_M, rows);
      clear_rows<256>(smem_addr(plan.dout[do_ring.stage()]), T::kSlabs, BLOCK_M, rows);
      fence_proxy_async_shared();
      named_sync(kBarRowsCleared, 256);
    };

    if (steps > 0) {
      float s[T::kScoreRegs], dp[T::kScoreRegs];
      int m = uniform(t.query_start);
      mbar_wait(bar(plan.k_full), key_phase);
      mbar_wait(bar(plan.v_full), key_phase);
      key_phase ^= 1;
      mbar_wait(bar(plan.q_full[q_ring.stage]), q_ring.phase);
      mbar_wait(bar(plan.do_full[do_ring.stage()]), do_ring.phase());
      const int keys_left = seqlen_k - key_block * BLOCK_N;
      if (kPacked && keys_left < BLOCK_N) {
        clear_rows<256>(smem_addr(plan.k), T::kSlabs, BLOCK_N, keys_left);
        clear_rows<256>(smem_addr(plan.v), T::kSlabs, BLOCK_N, keys_left);
        fence_proxy_async_shared();
        named_sync(kBarRowsCleared, 256);
      }
      clear_query_rows(m);
      const auto issue_s = [&](int half) {
        mma_scores(s, k_rows,
                   descriptor_step(q_tile, q_ring.stage * T::kQueryTileBytes + half * kHalfTile));
      };
      const auto issue_dp = [&](int half) {
        mma_scores(
            dp, v_rows,
            descriptor_step(do_tile, do_ring.stage() * T::kQueryTileBytes + half * kHalfTile));
      };
      // With softcap registers are short: lengths come from the tile again.
      const auto to_probabilities = [&](int half) {
        if constexpr (T::kSoftcap) {
          const int length_k = uniform(t.seqlen_k);
          softmax(s, length_k - uniform(t.seqlen_q), key0, length_k, m, half);
        } else {
          softmax(s, shift, key0, seqlen_k, m, half);
        }
      };
      const auto next_block = [&] {
        q_ring.advance(), do_ring.advance();
        if (++m == query_end) m = T::kSoftcap ? uniform(t.query_begin) : query_begin;
      };
      const auto await_block = [&] {
        mbar_wait(bar(plan.q_full[q_ring.stage]), q_ring.phase);
        mbar_wait(bar(plan.do_full[do_ring.stage()]), do_ring.phase());
        clear_query_rows(m);
      };
      uint32_t p16[T::kScoreRegs / 2], ds16[T::kScoreRegs / 2];
      float dq[T::kDqRegs];
      Columns lse_columns, delta_columns;

      load_lse(lse_columns, q_ring.stage, 0);
      load_delta(delta_columns, do_ring.stage(), 0);
      start_scores(s, lse_columns), pin(s);
      spread_columns(dp, delta_columns), pin(dp);
      issue_s(0);
      issue_dp(0);
      wgmma_wait<1>(), pin(s);
      to_probabilities(0);
      pin(s);

      // One step. On entry: P of its (first half) block in s, dP on its way. Before leaving it
      // queues S and dP of the next block behind its own dK, so that the tensor cores never see the
      // softmax. What is read from shared memory is read before S and dP are issued: such reads
      // queue behind wgmma that have shared-memory operands.
      const auto step = [&](auto is_last) {
        constexpr bool kLast = decltype(is_last)::value;
        const int q_stage = q_ring.stage, do_stage = do_ring.stage();
        wgmma_wait<0>(), pin(dp);
        if constexpr (kLast) arrive(plan.v_empty);
        softmax_backward(s, dp, p16, ds16, q_stage, 0);
        store_ds(ds16, ds_stage, 0);
        mma_grad(dv, p16, descriptor_step(do_cols, do_stage * T::kQueryTileBytes));
        next_block();
        fence_proxy_async_shared();
        named_sync(kBarDsWritten, 256);
        mma_dq(dq, descriptor_step(ds_rows, ds_stage * T::kDsBytes));
        ds_stage ^= 1;
        wgmma_wait<1>();  // dV
        arrive(plan.do_empty[do_stage]);
        mma_grad(dk, ds16, descriptor_step(q_cols, q_stage * T::kQueryTileBytes));
        if constexpr (!kLast) await_block();
        await_dq_buffer();
        if constexpr (kLast) {
          wgmma_wait<1>(), pin(dq);
          store_dq(dq);
          send_dq();
          wgmma_wait<0>();
          arrive(plan.q_empty[q_stage]);
          arrive(plan.k_empty);
        } else {
          load_delta(delta_columns, do_ring.stage(), 0);
          spread_columns(dp, delta_columns), pin(dp);
          wgmma_wait<1>(), pin(dq);
          store_dq(dq);
          load_lse(lse_columns, q_ring.stage, 0);
          start_scores(s, lse_columns), pin(s);
          issue_s(0);
          issue_dp(0);
          send_dq();                // its proxy fence takes a while: under the MMAs
          wgmma_wait<1>(), pin(s);  // dK and S
          arrive(plan.q_empty[q_stage]);
          to_probabilities(0);
          pin(s);
        }
      };
      // Two halves make a step at head dim 64. S of the next half goes first, and its softmax runs
      // under this half's dK and the next dP; dQ of the whole block runs under the next half's work
      // and is sent after that. An iteration is the second half of a block and the first of the
      // next: no dQ in flight at its ends (ptxas would serialize).
      const auto issue_half = [&](int half) {
        mma_grad(dv, p16,
                 descriptor_step(do_cols,
                                 do_ring.stage() * T::kQueryTileBytes + half * 4 * kStepMNMajor));
        mma_grad(
            dk, ds16,
            descriptor_step(q_cols, q_ring.stage * T::kQueryTileBytes + half * 4 * kStepMNMajor));
      };
      const auto to_ds = [&](int q_stage, int half) {
        softmax_backward(s, dp, p16, ds16, q_stage, half);
        store_ds(ds16, ds_stage, half);
      };
      const auto send_finished_dq = [&] {
        await_dq_buffer();
        store_dq(dq);
        send_dq();
      };
      // On entry: P of the first half in s, its dP done, dQ of the block before in flight (but for
      // the first block).
      const auto first_half = [&](auto sends) {
        load_lse(lse_columns, q_ring.stage, 1);
        load_delta(delta_columns, do_ring.stage(), 1);
        to_ds(q_ring.stage, 0);
        start_scores(s, lse_columns), pin(s);
        spread_columns(dp, delta_columns), pin(dp);
        issue_s(1);
        issue_half(0);
        issue_dp(1);
        wgmma_wait<3>(), pin(s);  // dQ, S
        if constexpr (decltype(sends)::value) pin(dq);
        to_probabilities(1);
        pin(s);
        if constexpr (decltype(sends)::value) send_finished_dq();
        wgmma_wait<0>(), pin(dp);
      };
      const auto second_half = [&](auto is_last) {
        constexpr bool kLast = decltype(is_last)::value;
        const int q_stage = q_ring.stage, do_stage = do_ring.stage();
        if constexpr (kLast) arrive(plan.v_empty);
        const uint64_t do_half =
            descriptor_step(do_cols, do_stage * T::kQueryTileBytes + 4 * kStepMNMajor);
        const uint64_t q_half =
            descriptor_step(q_cols, q_stage * T::kQueryTileBytes + 4 * kStepMNMajor);
        next_block();
        if constexpr (!kLast) {
          await_block();
          load_lse(lse_columns, q_ring.stage, 0);
          load_delta(delta_columns, do_ring.stage(), 0);
        }
        to_ds(q_stage, 1);
        if constexpr (!kLast) {
          start_scores(s, lse_columns), pin(s);
          spread_columns(dp, delta_columns), pin(dp);
          issue_s(0);
        }
        mma_grad(dv, p16, do_half);
        mma_grad(dk, ds16, q_half);
        if constexpr (!kLast) {
          issue_dp(0);
        }
        if constexpr (!kLast) {
          wgmma_wait<3>(), pin(s);
          to_probabilities(0);
          pin(s);
        }
        fence_proxy_async_shared();
        named_sync(kBarDsWritten, 256);
        mma_dq(dq, descriptor_step(ds_rows, ds_stage * T::kDsBytes));
        ds_stage ^= 1;
        wgmma_wait<1>(), pin(dp);  // all but dQ
        {
        arrive(plan.q_empty[q_stage]);
        arrive(plan.do_empty[do_stage]);
        }
        if constexpr (kLast) {
          wgmma_wait<0>(), pin(dq);
          arrive(plan.k_empty);
          send_finished_dq();
        }
      };
      if constexpr (T::kHalves == 1) {
#pragma unroll 1
        for (int i = 1; i < steps; ++i) step(Constant<false>{});
        step(Constant<true>{});
      } else {
        wgmma_wait<0>(), pin(dp);
        first_half(Constant<false>{});
#pragma unroll 1
        for (int i = 1; i < steps; ++i) {
          second_half(Constant<false>{});
          first_half(Constant<true>{});
        }
        second_half(Constant<true>{});
      }
      pin(dk), pin(dv);
    }

    // A tile that no query sees still has gradients: zeros.
    if (uniform(t.staged)) {
      await_dq_buffer();
      stage_rows<Elem, T::kHeadDim>(dv, 1.f, smem_addr(plan.dq[g]));
      send_dq();
      await_dq_buffer();
      stage_rows<Elem, T::kHeadDim>(dk, p.shape.softmax_scale, smem_addr(plan.dq[g]));
      send_dq();
      arrive(plan.tile_empty[tiles.stage()]);
      tiles.advance();
      continue;
    }
    const int keys = seqlen_k - key0;
    emit_gradient<Elem, T::kHeadDim>(dv, 1.f, p.dv, p.dv_share, p.emit_dkv, t, key0, keys,
                                     p.shape.head_dim_v);
    emit_gradient<Elem, T::kHeadDim>(dk, p.shape.softmax_scale, p.dk, p.dk_share, p.emit_dkv, t,
                                     key0, keys, p.shape.head_dim_qk);
    arrive(plan.tile_empty[tiles.stage()]);
    tiles.advance();
  }
}

}  // namespace fa3

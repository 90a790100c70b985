// FP8 (e4m3) attention forward for Hopper: O = softmax(scale Q K^T) V and its log-sum-exp.
//
//   q (.., Sq, H, D), k, v (.., Sk, Hkv, D) e4m3 with one FP32 descale per 128 tokens and head; out
//   16-bit, lse FP32. Element values are q sq, k sk, v sv. FlashAttention-3 (Shah et al., 2024),
//   section 3.3, with block scales applied inside the kernel and sums of P V that stay exact over
//   any number of keys.
//
// Block scales. With c = scale log2(e) sq sk and b = log2 sv the kernel computes
//     p' = 2^(S c + b - m + kOffset) = p sv,   m = running maximum of S c + b,   l += 2^-b sum(p').
// V's scale is a bias of the scores: P V needs no unit, m follows what a key can contribute to O,
// and only the row sum has to take b back. kOffset puts the largest p' at 2^8 of the 448 that e4m3
// holds.
//
// Two levels. The FP8 tensor core keeps 14 bits of a sum and cuts towards zero, a bias that grows
// with the context (docs/fp8.md). So each block's P V starts from zero in T, and O = O alpha + T is
// done in FP32: alpha is the rescale that the online softmax needs anyway. What bias is left in one
// block, and the mean error of rounding P, is taken out by the row sum: it is one more column of P
// V, over a V of kFp8OnesValue, and suffers the same.
//
// Threads: warpgroup 0 loads and transposes (fp8_produce.cuh). Warpgroups 1.. own 64 query rows
// each and take turns at the tensor cores: a turn is P V of block n, the promotion, and Q K^T of
// block n + 1, whose S takes the registers of T. The softmax of a warpgroup runs during the turns
// of the others.
#pragma once
#include "attn/fp8_produce.cuh"
#include "attn/fp8_softmax.cuh"
#include "ptx/wgmma.cuh"

namespace fa3 {

constexpr float kFp8Offset = 8.f;
constexpr float kFp8OnesValue =
    1.875f;  // four significant bits: its products are cut as those of V are
constexpr float kLn2 = 0.6931471805599453f;

// ---- consumer: one warpgroup -----------------------------------------------------------------
template <class T>
struct Fp8Consumer {
  using Shared = Fp8Shared<T>;
  static constexpr uint64_t kRowForm =
      descriptor_form<T::kWidth>(16);                            // Q, K: rows of kWidth bytes
  static constexpr uint64_t kVtForm = descriptor_form<128>(16);  // Vt: rows of 128 keys
  static constexpr int kStepBytes = 32;                          // one k-step: 32 elements of e4m3
  static constexpr int kStepsPerSlab = T::kWidth / kStepBytes;

  static constexpr float kUnit = T::kSumByProduct ? kFp8OnesValue : 1.f;

  const Fp8FwdKernelParams& p;
  const uint32_t smem;
  const int group, warp, lane;

  float o[T::kValueParts][T::kValueColumns / 2];
  float t[T::kTwoLevel ? T::kLastColumns / 2
                       : 1];  // P V of one block: the last part, with the sum of P
  float t_before[T::kTwoLevel ? T::kValueColumns / 2 : 1];  // the parts before it
  float s[T::kBlockN / 2];
  uint32_t probability[T::kBlockN / 8];
  float m[2], alpha[2];
  float l[2];      // this thread's share of the sum of 2^-b p', times kUnit
  float top_bias;  // largest bias of the tile so far
  float c, bias, unbias, q_scale;

  Ring<T::kKStages> k;
  Ring<T::kVStages> v;
  Ring<1> q;
  Ring<kFp8WorkSlots> slot;

  FA3_DEVICE Fp8Consumer(const Fp8FwdKernelParams& params, uint32_t base, int warpgroup)
      : p(params),
        smem(base),
        group(warpgroup),
        warp(uniform(threadIdx.x % kWarpgroupThreads / kWarpThreads)),
        lane(threadIdx.x % kWarpThreads) {}

  // ---- barriers
  FA3_DEVICE void arrive(uint32_t bar) const {  // once per warp
    if (lane == 0) mbar_arrive(bar);
  }
  FA3_DEVICE void wait_keys() const {
    mbar_wait(smem + offsetof(Shared, k_full) + 8 * k.stage, k.phase);
  }
  FA3_DEVICE void read_scales() {
    const uint4 x = lds128(smem + offsetof(Shared, scale) + sizeof(Fp8BlockScale) * k.stage);
    const float product = q_scale * __uint_as_float(x.x);
    // Zero would turn a masked -inf into NaN; above 1e30 finite scores could become infinite, in
    // either direction.
    c = product < 1e30f ? fmaxf(product, 1e-36f) : NAN;
    bias = __uint_as_float(x.y);
    unbias = __uint_as_float(x.z);
  }
  FA3_DEVICE void release_keys() {
    arrive(smem + offsetof(Shared, k_empty) + 8 * k.stage);
    k.advance();
  }
  FA3_DEVICE void wait_values() const {
    mbar_wait(smem + offsetof(Shared, vt_full) + 8 * v.stage, v.phase);
  }
  FA3_DEVICE void release_values() {
    arrive(smem + offsetof(Shared, vt_empty) + 8 * v.stage);
    v.advance();
  }
  FA3_DEVICE void wait_turn() const { named_sync(kFp8BarTurn + group, 2 * kWarpgroupThreads); }
  FA3_DEVICE void pass_turn() const {
    named_arrive(kFp8BarTurn + (group + 1 == T::kWarpgroups ? 0 : group + 1),
                 2 * kWarpgroupThreads);
  }

  // The tile at hand stays in shared memory: its fields would cost registers in the loop.
  FA3_DEVICE uint32_t work_slot() const {
    return smem + offsetof(Shared, work) + sizeof(Fp8Work) * slot.stage;
  }
  FA3_DEVICE int work(size_t field) const { return uniform(lds32(work_slot() + uint32_t(field))); }

  // ---- products (asynchronous)
  FA3_DEVICE void issue_scores() {
    const uint64_t a =
        descriptor_at(kRowForm, smem + offsetof(Shared, q)) + group * (T::kQBytes >> 4);
    const uint64_t b =
        descriptor_at(kRowForm, smem + offsetof(Shared, k)) + k.stage * (T::kKBytes >> 4);
    using Mma = Wgmma<e4m3, T::kBlockN>;
#pragma unroll
    for (int i = 0; i < T::kHeadDim / kStepBytes; ++i) {
      const int slab = i / kStepsPerSlab, inside = i % kStepsPerSlab * kStepBytes;
      const uint64_t ai = descriptor_step(a, slab * kWarpgroupRows * T::kWidth + inside);
      const uint64_t bi = descriptor_step(b, slab * T::kBlockN * T::kWidth + inside);
      if (i == 0)
        Mma::ss_zero(s, ai, bi);
      else
        Mma::ss(s, ai, bi);
    }
    wgmma_commit();
  }
  template <int kPart>
  FA3_DEVICE void issue_values() {
    const uint64_t b = descriptor_at(kVtForm, smem + offsetof(Shared, vt)) +
                       v.stage * (T::kVtBytes >> 4) + kPart * (T::kValueColumns * T::kBlockN >> 4);
#pragma unroll
    for (int i = 0; i < T::kBlockN / kStepBytes; ++i) {
      const uint32_t* a = probability + 4 * i;
      const uint64_t bi = descriptor_step(b, i * kStepBytes);
      if constexpr (!T::kTwoLevel) {
        Wgmma<e4m3, T::kValueColumns>::rs(o[kPart], a[0], a[1], a[2], a[3], bi);
      } else if constexpr (kPart + 1 < T::kValueParts) {
        using Mma = Wgmma<e4m3, T::kValueColumns>;
        if (i == 0)
          Mma::rs_zero(t_before, a[0], a[1], a[2], a[3], bi);
        else
          Mma::rs(t_before, a[0], a[1], a[2], a[3], bi);
      } else {
        using Mma = Wgmma<e4m3, T::kLastColumns>;
        if (i == 0)
          Mma::rs_zero(t, a[0], a[1], a[2], a[3], bi);
        else
          Mma::rs(t, a[0], a[1], a[2], a[3], bi);
      }
    }
    wgmma_commit();
  }
  template <int kPart>
  FA3_DEVICE void promote() {
    constexpr int kRegisters = T::kValueColumns / 2;
    if constexpr (kPart + 1 < T::kValueParts) {
      pin(t_before);
#pragma unroll
      for (int r = 0; r < kRegisters; ++r)
        o[kPart][r] = fmaf(o[kPart][r], alpha[(r >> 1) & 1], t_before[r]);
    } else {
      pin(t);
#pragma unroll
      for (int r = 0; r < kRegisters; ++r)
        o[kPart][r] = fmaf(o[kPart][r], alpha[(r >> 1) & 1], t[r]);
#pragma unroll
      for (int i = 0; T::kSumByProduct && i < 2; ++i)
        l[i] = fmaf(t[T::kLastColumns / 2 - 4 + 2 * i], unbias, l[i]);
    }
    pin(o[kPart]);
  }

  // A turn at the tensor cores: P V of this block, then (kNext) Q K^T of the next one, whose S
  // takes the registers of T.
  template <bool kNext>
  FA3_DEVICE void turn() {
    wait_turn();
    value_parts<0>();
    if constexpr (kNext) {
      wait_keys();  // a branch: without one ptxas adds T to O after the issue, and S no longer fits
                    // in the place of T
      wgmma_fence();
      issue_scores();
    }
    pass_turn();
  }
  template <int kPart>
  FA3_DEVICE void value_parts() {
    pin(probability);
    if constexpr (!T::kTwoLevel) pin(o[0]);
    if constexpr (kPart > 0) wait_values();  // a branch, as above
    wgmma_fence();
    issue_values<kPart>();
    wgmma_wait<0>();
    if constexpr (!T::kTwoLevel) pin(o[0]);
    pin(probability);
    if constexpr (kPart + 1 == T::kValueParts) release_values();
    if constexpr (T::kTwoLevel) promote<kPart>();
    if constexpr (kPart + 1 < T::kValueParts) value_parts<kPart + 1>();
  }

  // ---- softmax of block n, whose scores are in flight
  FA3_DEVICE void softmax(int n, bool masked) {
    read_scales();
    wgmma_wait<0>();
    pin(s);
    release_keys();
    if (masked) mask(n);
    float top[2];
    row_maxima(top);

    float shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float before = m[i];
      m[i] = max_nan(before, fmaf(quad_max_nan(top[i]), c, bias));  // a NaN stays
      alpha[i] = m[i] == -INFINITY ? 1.f : exp2_approx(before - m[i]);
      // A row without keys so far: 2^(-inf - 0) = 0 instead of 2^(-inf + inf).
      shift[i] = (m[i] == -INFINITY ? 0.f : m[i]) - (kFp8Offset + bias);
    }
    if constexpr (!T::kTwoLevel) {
#pragma unroll
      for (int r = 0; r < T::kValueColumns / 2; ++r) o[0][r] *= alpha[(r >> 1) & 1];
    }
    l[0] *= alpha[0];
    l[1] *= alpha[1];
    // The sum of the rounded p' comes with P V (promote). It must not where the block's V is small
    // beside that of blocks before: such p' lie near the end of e4m3 and do not matter to O, but
    // they do to the row sum.
    if constexpr (T::kSumByProduct) {
      constexpr float kSmallOctaves = 3.f;
      if (!(bias >= top_bias - kSmallOctaves)) {
        add_exp2(s, unshared(c), shift, unbias * kUnit, l);
        unbias = 0.f;  // promote adds nothing
      }
      top_bias = fmaxf(top_bias, bias);
    }
    exp2_pack<!T::kSumByProduct>(s, c, shift, probability, unbias, l);
  }
  // The same value, but not to the compiler: it would compute the exponentials once, in front of
  // the branch, and leave the conversions behind it, where they no longer overlap.
  FA3_DEVICE static float unshared(float x) {
    asm volatile("" : "+f"(x));
    return x;
  }
  FA3_DEVICE void row_maxima(float (&top)[2]) {
    top[0] = __int_as_float(row_max_signed<0>(s));
    top[1] = __int_as_float(row_max_signed<1>(s));
    if (__any_sync(0xffffffffu, __float_as_int(top[0]) < 0 || __float_as_int(top[1]) < 0)) {
      if (__float_as_int(top[0]) < 0) top[0] = row_max_negative<0>(s);
      if (__float_as_int(top[1]) < 0) top[1] = row_max_negative<1>(s);
    }
  }
  FA3_DEVICE void mask(int n) {
    const int row0 = work(offsetof(Fp8Work, row0)), len_q = work(offsetof(Fp8Work, len_q));
    const int len_k = work(offsetof(Fp8Work, len_k));
    const int column0 = n * T::kBlockN + 2 * (lane % 4);
    const int row = row0 + group * kWarpgroupRows + warp * 16 + lane / 4 + len_k - len_q;
    int low[2], high[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      low[i] = row + 8 * i - p.window_left - column0;
      high[i] = min(len_k, row + 8 * i + p.window_right + 1) - column0;
    }
    mask_scores(s, low, high);
  }

  // ---- key blocks that no row of this warpgroup sees: the barriers still count on it
  FA3_DEVICE void skip_blocks(int count) {
    for (; count > 0; --count) {
      mbar_wait(smem + offsetof(Shared, k_full) + 8 * k.stage, k.phase);
      release_keys();
      wait_turn();
      pass_turn();
      wait_values();
      release_values();
    }
  }

  // ---- one tile
  FA3_DEVICE void attend() {
    KeyRange mine, whole;
    {
      const Fp8Work w = load_work(work_slot());
      const int row = w.row0 + group * kWarpgroupRows;
      mine = key_blocks(
          visible_keys(row, kWarpgroupRows, w.len_q, w.len_k, p.window_left, p.window_right));
      whole = unmasked_blocks(row, kWarpgroupRows, w.len_q, w.len_k, p.window_left, p.window_right);
      if (mine.begin < mine.end)
        q_scale =
            p.scale_log2 * checked_descale(__ldg(p.q_descale + w.scale_q + row / kFp8ScaleBlock));
    }
    const int tile_begin = work(offsetof(Fp8Work, block_begin)),
              tile_end = work(offsetof(Fp8Work, block_end));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      m[i] = -INFINITY;
      l[i] = 0.f;
    }
    top_bias = -INFINITY;
#pragma unroll
    for (int h = 0; h < T::kValueParts; ++h)
#pragma unroll
      for (int r = 0; r < T::kValueColumns / 2; ++r) o[h][r] = 0.f;
    if (tile_begin >= tile_end) return;

    mbar_wait(smem + offsetof(Shared, q_full) + 8 * group, q.phase);
    if (mine.begin >= mine.end) {
      release_query();
      skip_blocks(tile_end - tile_begin);
      return;
    }
    skip_blocks(tile_end - mine.end);
    int n = mine.end - 1;
    wait_keys();
    wgmma_fence();
    issue_scores();
    for (;; --n) {
      softmax(n, n < whole.begin || n >= whole.end);
      if (n == mine.begin) break;
      wait_keys();
      wait_values();
      turn<true>();
    }
    release_query();
    wait_values();
    turn<false>();
    skip_blocks(mine.begin - work(offsetof(Fp8Work, block_begin)));
  }
  FA3_DEVICE void release_query() {
    arrive(smem + offsetof(Shared, q_empty) + 8 * group);
    q.advance();
  }

  // ---- O / l and the log-sum-exp to memory
  template <class Out>
  FA3_DEVICE void store() {
    const Fp8Work w = load_work(work_slot());
    const int warp_row = w.row0 + group * kWarpgroupRows + warp * 16;
    if (warp_row >= w.len_q) return;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(l[i]) * (1.f / kUnit);
      const bool empty = m[i] == -INFINITY;  // no key
      inverse[i] = empty ? 0.f : 1.f / sum;
      const int row = warp_row + lane / 4 + 8 * i;
      if (lane % 4 == 0 && row < w.len_q)
        p.lse[(int64_t(w.batch) * p.heads_q + w.head) * p.lse_rows + w.token_q + row] =
            empty ? -INFINITY : fmaf(m[i] - kFp8Offset, kLn2, logf(sum));
    }
    // 64 columns at a time through 2 KB of the warp's own, so that 8 lanes write 128 contiguous
    // bytes.
    const uint32_t buffer =
        smem + offsetof(Shared, out) + T::kOutWarpBytes * (group * kWarpgroupWarps + warp);
    uint8_t* out = p.out + 2 * (w.batch * p.out_stride_batch +
                                int64_t(w.token_q + warp_row) * p.out_stride_token +
                                w.head * p.out_stride_head);
    const int row = lane / 4, quad = lane % 4;
    constexpr int kPerPass = 4;  // groups of 16 columns
#pragma unroll
    for (int pass = 0; pass < T::kOutPasses; ++pass) {
      __syncwarp();
#pragma unroll
      for (int u = 0; u < kPerPass; ++u) {
        const int j = pass * kPerPass + u;
        if (j >= T::kHeadDim / 16) break;
        constexpr int kGroups = T::kValueColumns / 16;
        const float (&x)[T::kValueColumns / 2] = o[j / kGroups];
        const int r0 = 8 * (j % kGroups);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t at =
              buffer + (row + 8 * i) * 128 + (((2 * u + quad / 2) ^ row) << 4) + (quad & 1) * 8;
          sts64(at,
                pack2<Out>(x[r0 + o_register(i, 0)] * inverse[i],
                           x[r0 + o_register(i, 1)] * inverse[i]),
                pack2<Out>(x[r0 + o_register(i, 2)] * inverse[i],
                           x[r0 + o_register(i, 3)] * inverse[i]));
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = 4 * i + lane / 8, chunk = lane % 8, column = pass * 64 + 8 * chunk;
        const uint4 x = lds128(buffer + r * 128 + ((chunk ^ (r & 7)) << 4));
        if (warp_row + r < w.len_q && column < p.head_dim)
          *reinterpret_cast<uint4*>(out + 2 * (r * p.out_stride_token + column)) = x;
      }
    }
  }

  FA3_DEVICE void run() {
    if (group == T::kWarpgroups - 1) pass_turn();  // warpgroup 0 has the first turn
    for (;;) {
      mbar_wait(smem + offsetof(Shared, work_full) + 8 * slot.stage, slot.phase);
      if (work(offsetof(Fp8Work, row0)) < 0) break;
      attend();
      if (p.out_is_fp16)
        store<fp16>();
      else
        store<bf16>();
      arrive(smem + offsetof(Shared, work_empty) + 8 * slot.stage);
      slot.advance();
    }
  }
};

// ---- kernel ----------------------------------------------------------------------------------
template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    fp8_fwd_kernel(const __grid_constant__ Fp8FwdKernelParams p) {
  using Shared = Fp8Shared<T>;
  extern __shared__ __align__(kSharedAlignment) uint8_t shared_bytes[];
  const uint32_t smem = smem_addr(shared_bytes);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = T::kWarpgroups * kWarpgroupWarps;
    const auto init = [&](size_t offset, int stages, int arrivals) {
      for (int i = 0; i < stages; ++i) mbar_init(smem + uint32_t(offset) + 8 * i, arrivals);
    };
    init(offsetof(Shared, q_full), T::kWarpgroups, 1);
    init(offsetof(Shared, q_empty), T::kWarpgroups, kWarpgroupWarps);
    init(offsetof(Shared, k_full), T::kKStages, 1);
    init(offsetof(Shared, k_empty), T::kKStages, kConsumerWarps);
    init(offsetof(Shared, raw_full), T::kRawStages, 1);
    init(offsetof(Shared, raw_empty), T::kRawStages, T::kTransposers);
    init(offsetof(Shared, vt_full), T::kVStages, T::kTransposers);
    init(offsetof(Shared, vt_empty), T::kVStages, kConsumerWarps);
    init(offsetof(Shared, work_full), kFp8WorkSlots, 1);
    init(offsetof(Shared, work_empty), kFp8WorkSlots, kConsumerWarps + T::kTransposers);
    mbar_init_fence();
    tma_prefetch_map(&p.q);
    tma_prefetch_map(&p.k);
    tma_prefetch_map(&p.v);
  }
  if constexpr (T::kSumByProduct) {
    constexpr uint32_t kFour = 0x3F3F3F3F;  // e4m3 of kFp8OnesValue
    constexpr int kChunks = T::kBlockN / 16, kPerStage = T::kOnesRows * kChunks;
    for (int i = threadIdx.x; i < T::kVStages * kPerStage; i += T::kThreads) {
      const uint32_t x = i % kPerStage < kChunks ? kFour : 0;
      const int row = i / kPerStage * T::kVtBytes + T::kHeadDim * T::kBlockN;
      sts128(smem + offsetof(Shared, vt) + row + i % kPerStage * 16, make_uint4(x, x, x, x));
    }
  }
  fence_proxy_async_shared();
  __syncthreads();
  const int warpgroup = uniform(threadIdx.x / kWarpgroupThreads);
  if (warpgroup == 0) {
    registers_release<T::kProducerRegisters>();
    const int warp = uniform(threadIdx.x / kWarpThreads);
    if (warp > 0)
      transpose_values<T>(p, smem, warp - 1);
    else if (elect_one())
      feed<T>(p, smem);
  } else {
    registers_claim<T::kConsumerRegisters>();
    Fp8Consumer<T>(p, smem, warpgroup - 1).run();
  }
}

}  // namespace fa3

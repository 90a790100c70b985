// Attention forward for Hopper: O = softmax(scale Q K^T) V and its log-sum-exp, bf16 or fp16.
//
//   q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv) -> out (B, Sq, H, Dv), lse (B, H, Sq);
//   or varlen.
//
// FlashAttention-3 (arXiv 2407.08608), algorithms 1 and 2. A thread block works off query tiles of
// 128 or 192 rows:
//   warp 0 of warpgroup 0  producer: K, Q, V tiles by TMA into two-stage rings
//   warp 1 of warpgroup 0  scheduler: draws the next tile and publishes it
//   warpgroups 1 ..        consumers: 64 query rows each, every one at its own pace within the
//   rings
// Key blocks run from right to left. In the steady state a consumer queues S(n) = Q K(n) and, right
// behind it, O += P(n+1) V(n+1), and computes the softmax of S(n) while that second product runs;
// the other warpgroup's products fill the tensor cores through the rest of the softmax (turns by
// named barriers). docs/forward.md derives the choices and gives what each of them brings.
#pragma once
#include "attn/fwd_producer.cuh"

namespace fa3 {

// Hardware barriers by number. kTurn + w: warpgroup w waits, the one before it arrives (256
// threads). kStore + w: the 128 threads of warpgroup w among themselves. 0 is __syncthreads.
enum NamedBarrier : int { kTurn = 1, kStore = 4 };

// ---- consumer warpgroups ---------------------------------------------------------------------
template <class T>
struct Consumer {
  using Elem = typename T::Elem;
  static constexpr int kRowBytes = 128;  // bytes of a slab row
  const FwdParams& p;
  typename T::Shared& shared;
  const int wg, tid, warp, lane;
  const uint32_t q_low;  // descriptor of this warpgroup's Q

  // The parts of the tile that the block loop needs; the rest is read where it is used.
  int m, seqlen_q, seqlen_k;
  BlockRange blocks;
  float o[T::kColumnsV / 2], s[T::BLOCK_N / 2];
  uint32_t probs[T::BLOCK_N / 4];  // P, packed as the A operand of P V
  float maximum[2];  // of the scores so far, log2 units; -inf: no key so far
  float alpha[2];    // 2^(maximum before this block - maximum now)
  RowSums<T::kRowSum> sums;
  Ring<T::kStages> k, v;
  Ring<1> q;
  Ring<T::kTileRing> ring;
  Ring<T::kStages> k_load, v_load;  // without a producer warp: this side loads, too
  Ring<1> q_load;

  FA3_DEVICE Consumer(const FwdParams& params, typename T::Shared& sh, int warpgroup)
      : p(params),
        shared(sh),
        wg(warpgroup),
        tid(threadIdx.x % kWarpgroupThreads),
        warp(tid / 32),
        lane(tid % 32),
        q_low(descriptor_low(smem_addr(sh.q[0]), 16) + warpgroup * (T::kQBytes >> 4)) {}

  // ---- barriers ----
  FA3_DEVICE void arrive(uint64_t& bar) {  // one arrival per warp
    if (lane == 0) mbar_arrive(smem_addr(&bar));
  }
  FA3_DEVICE void wait_q() { mbar_wait(smem_addr(&shared.q_full[wg]), q.phase); }
  FA3_DEVICE void wait_k() { mbar_wait(smem_addr(&shared.k_full[k.stage]), k.phase); }
  FA3_DEVICE void wait_v() { mbar_wait(smem_addr(&shared.v_full[v.stage]), v.phase); }
  FA3_DEVICE void release_q() { arrive(shared.q_empty[wg]), q.advance(); }
  FA3_DEVICE void release_k() { arrive(shared.k_empty[k.stage]), k.advance(); }
  FA3_DEVICE void release_v() { arrive(shared.v_empty[v.stage]), v.advance(); }
  FA3_DEVICE void wait_turn() {
    if constexpr (T::kPingPong) named_sync(kTurn + wg, 2 * kWarpgroupThreads);
  }
  FA3_DEVICE void pass_turn() {
    if constexpr (T::kPingPong)
      named_arrive(kTurn + (wg + 1 == T::kConsumers ? 0 : wg + 1), 2 * kWarpgroupThreads);
  }
  FA3_DEVICE void take(const typename T::Tile& t) {
    m = uniform(t.m);
    seqlen_q = uniform(t.seqlen_q);
    seqlen_k = uniform(t.seqlen_k);
    blocks = {uniform(t.blocks.begin), uniform(t.blocks.end)};
  }
  FA3_DEVICE int first_row() const { return m * T::BLOCK_M + wg * kWarpgroupRows; }
  FA3_DEVICE int row(int i) const { return first_row() + acc_row(tid, 2 * i); }
  FA3_DEVICE MaskBounds bounds() const {
    return {seqlen_q, seqlen_k, p.window_left, p.window_right};
  }

  // ---- matrix products, asynchronous ----
  FA3_DEVICE void issue_qk() {
    const uint32_t k_low = descriptor_low(smem_addr(shared.k[0]), 16) + k.stage * (T::kKBytes >> 4);
#pragma unroll
    for (int i = 0; i < T::kDimQK / 16; ++i) {
      const uint64_t a =
          descriptor<128>(q_low, (i / 4) * kWarpgroupRows * kRowBytes + (i % 4) * 32);
      const uint64_t b = descriptor<128>(k_low, (i / 4) * T::BLOCK_N * kRowBytes + (i % 4) * 32);
      if (i == 0)
        Wgmma<Elem, T::BLOCK_N>::template ss_zero<0, 0>(s, a, b);
      else
        Wgmma<Elem, T::BLOCK_N>::template ss<0, 0>(s, a, b);
    }
    wgmma_commit();
  }
  FA3_DEVICE void issue_pv() {
    const uint32_t v_low = descriptor_low(smem_addr(shared.v[0]), T::BLOCK_N * kRowBytes) +
                           v.stage * (T::kVStride >> 4);
#pragma unroll
    for (int j = 0; j < T::BLOCK_N / 16; ++j)
      Wgmma<Elem, T::kColumnsV>::template rs<1>(o, probs[4 * j], probs[4 * j + 1], probs[4 * j + 2],
                                                probs[4 * j + 3],
                                                descriptor<128>(v_low, j * 16 * kRowBytes));
    wgmma_commit();
  }

  // ---- softmax ----
  FA3_DEVICE void cap_scores() {
    if constexpr (T::kSoftcap) {
#pragma unroll
      for (int r = 0; r < T::BLOCK_N / 2; ++r) s[r] = tanh_approx(s[r] * p.softcap_scale);
    }
  }
  FA3_DEVICE void mask_block(int n) {
    const MaskBounds bounds = this->bounds();
    const int origin = n * T::BLOCK_N + acc_col(tid, 0);
    int begin[2], end[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      begin[i] = bounds.template begin_of_row<T::kMask>(row(i)) - origin;
      end[i] = bounds.template end_of_row<T::kMask>(row(i)) - origin;
    }
    mask_scores<T::kMask == Mask::Window>(s, begin, end);
  }
  // What exponents are relative to. A row without keys has exponents of -inf relative to anything
  // but -inf.
  FA3_DEVICE static float finite(float maximum) { return maximum == -INFINITY ? 0.f : maximum; }
  FA3_DEVICE void raise_maximum(int i, float score) {
    const float before = maximum[i];
    maximum[i] = fmaxf(before, score * p.exponent_scale);
    alpha[i] = exp2_approx(before - finite(maximum[i]));
  }
  // Scores of any block -> exponents.
  FA3_DEVICE void exponents() {
    raise_maximum(0, quad_max(row_max<0>(s)));
    raise_maximum(1, quad_max(row_max<1>(s)));
    row_exponents<0>(s, p.exponent_scale, finite(maximum[0]));
    row_exponents<1>(s, p.exponent_scale, finite(maximum[1]));
  }
  // The same without a mask, where all rows have a finite maximum already: P of row 0, exponents of
  // row 1. The exponential unit is what this takes longest from, so it starts at once: the first
  // kHeadStart exponentials of row 0 are relative to the old maximum, and follow it afterwards; the
  // new maxima are found meanwhile. (The largest P is 1 all the same, up to 2^-21: 1 in 16 bits.)
  FA3_DEVICE void exponents_with_head_start() {
    constexpr float kFar = 64.f;  // log2 of how much larger early exponentials may be
    const float c = p.exponent_scale, before = maximum[0];
    float early[T::kHeadStart];
#pragma unroll
    for (int e = 0; e < T::kHeadStart; ++e)
      early[e] = exp2_approx(fmaf(s[row_register<0>(e)], c, -before));
    raise_maximum(0, quad_max(row_max<0>(s)));
    row_exponents<0, T::kHeadStart>(s, c, maximum[0]);
    row_exp2<0, T::kHeadStart>(s);
    raise_maximum(1, quad_max(row_max<1>(s)));
    row_exponents<1>(s, c, maximum[1]);
#pragma unroll
    for (int e = 0; e < T::kHeadStart; ++e) early[e] *= alpha[0];
    if (__any_sync(kFullWarp, maximum[0] - before > kFar)) {
#pragma unroll
      for (int e = 0; e < T::kHeadStart; ++e)
        early[e] = exp2_approx(fmaf(s[row_register<0>(e)], c, -maximum[0]));
    }
#pragma unroll
    for (int e = 0; e < T::kHeadStart; ++e) s[row_register<0>(e)] = early[e];
  }
  // Everything summed so far follows the maxima. With few columns of O the products cost nothing
  // between the exponentials, and a branch would; with many it is the other way round.
  FA3_DEVICE void rescale() {
    if (!T::kTile.always_rescale && !__any_sync(kFullWarp, alpha[0] != 1.f || alpha[1] != 1.f))
      return;
    sums.scale(alpha);
#pragma unroll
    for (int i = 0; i < T::kColumnsV / 2; ++i) o[i] *= alpha[(i >> 1) & 1];
  }
  // Exponents of row 1 and P of row 0 -> P as the operand of P V.
  FA3_DEVICE void finish_softmax() {
    row_exp2<1>(s);
    row_pack<Elem, 0>(s, probs);
    row_pack<Elem, 1>(s, probs);
    sums.add(s);
  }
  FA3_DEVICE void clear_sums() {
    sums.clear();
#pragma unroll
    for (int i = 0; i < T::kColumnsV / 2; ++i) o[i] = 0.f;
    maximum[0] = maximum[1] = -INFINITY;
  }

  // ---- one key block ----
  // The tail of a sequence's last V tile holds rows of the next sequence, or memory nobody
  // initialised. Their P is 0, but 0 * NaN is NaN. Each warpgroup writes the zeros it needs; two
  // writing the same ones do no harm.
  FA3_DEVICE void clear_v_tail(int n) {
    const int valid = seqlen_k - n * T::BLOCK_N;
    if (p.cu_seqlens_k == nullptr || valid >= T::BLOCK_N) return;
    wait_v();
    const uint32_t base = smem_addr(shared.v[0]) + v.stage * T::kVStride;
    for (int chunk = valid * 8 + tid; chunk < T::BLOCK_N * 8; chunk += kWarpgroupThreads)
#pragma unroll
      for (int slab = 0; slab < T::kSlabsV; ++slab)
        sts128(base + slab * T::BLOCK_N * kRowBytes + chunk * 16, make_uint4(0, 0, 0, 0));
    fence_proxy_async_shared();
    named_sync(kStore + wg, kWarpgroupThreads);
  }
  // S of the tile's first block, alone; P and the sums from it.
  FA3_DEVICE void first_block(int n, bool masked, bool last, bool turn) {
    load_ahead(n);
    wait_q();
    wait_k();
    if (turn) wait_turn();
    wgmma_fence();
    issue_qk();
    if (turn) pass_turn();
    wgmma_wait<0>();
    pin(s);
    release_k();
    if (last) release_q();
    cap_scores();
    if (masked) mask_block(n);
    clear_sums();
    exponents();
    row_exp2<0>(s);
    finish_softmax();
    clear_v_tail(n);
  }
  // S(n) with P V of the block before it queued behind. That product is over by the time the
  // exponentials of row 0 are out; rescaling, packing and sums then fill the gaps between those of
  // row 1.
  template <bool kMasked>
  FA3_DEVICE void next_block(int n, bool last) {
    load_ahead(n);
    wait_k();
    wait_turn();
    pin(o), pin(probs);
    wgmma_fence();
    issue_qk();
    wait_v();
    wgmma_fence();  // the loop in wait_v ends what the first fence covers
    issue_pv();
    pass_turn();
    wgmma_wait<1>();
    pin(s);
    release_k();
    if (last) release_q();
    cap_scores();
    if constexpr (kMasked) {
      mask_block(n);
      exponents();
      row_exp2<0>(s);
    } else {
      exponents_with_head_start();
    }
    pin(s);
    wait_v();  // passes at once, but is a branch: ptxas would hoist the wgmma wait to the top of
               // the softmax
    wgmma_wait<0>();
    pin(o), pin(probs), pin(s);
    release_v();
    rescale();
    finish_softmax();
  }
  FA3_DEVICE void last_product() {
    wait_v();
    pin(o), pin(probs);
    wgmma_fence();
    issue_pv();
    wgmma_wait<0>();
    pin(o), pin(probs);
    release_v();
  }

  // ---- ablations: no overlap, no producer warp ----
  // QK, softmax, PV of one block after another. The turn covers PV and the next QK.
  template <bool kFirst>
  FA3_DEVICE void serial_block(int n, bool masked, bool last) {
    load_ahead(n);
    if (kFirst) wait_q();
    wait_k();
    wgmma_fence();
    issue_qk();
    pass_turn();
    wgmma_wait<0>();
    pin(s);
    release_k();
    if (last) release_q();
    cap_scores();
    if (masked) mask_block(n);
    if constexpr (kFirst) clear_sums();
    exponents();
    row_exp2<0>(s);
    if constexpr (kFirst)
      clear_v_tail(n);
    else
      rescale();
    finish_softmax();
    wait_turn();
    last_product();
  }
  FA3_DEVICE void run_blocks_serially() {
    const BlockRange unmasked =
        unmasked_blocks<T::kMask>(bounds(), first_row(), kWarpgroupRows, T::BLOCK_N);
    int n = blocks.end - 1;
    wait_turn();
    serial_block<true>(n, n >= unmasked.end || n < unmasked.begin, n == blocks.begin);
    for (--n; n >= blocks.begin; --n)
      serial_block<false>(n, n >= unmasked.end || n < unmasked.begin, n == blocks.begin);
    pass_turn();
  }
  // Without a producer warp one thread of the first consumer issues the copies: V of this block, K
  // of the next.
  FA3_DEVICE void load_ahead(int n) {
    if constexpr (!T::kWarpSpecialized) {
      if (wg == 0 && warp == 0 && elect_one()) {
        Loader<T> load{p, shared};
        const typename T::Tile t = read_tile<T>(smem_addr(&shared.tiles[0]));
        const int kv_head = t.head / p.group;
        if (n == blocks.end - 1) {
          load.k(k_load, n * T::BLOCK_N, kv_head, t.batch);
          load.q(q_load, m * T::BLOCK_M, t.head, t.batch);
          k_load.advance(), q_load.advance();
        }
        load.v(v_load, n * T::BLOCK_N, kv_head, t.batch);
        v_load.advance();
        if (n > blocks.begin) {
          load.k(k_load, (n - 1) * T::BLOCK_N, kv_head, t.batch);
          k_load.advance();
        }
      }
      __syncwarp();
    }
  }

  // ---- one tile ----
  FA3_DEVICE void run_tile(const typename T::Tile& t) {
    take(t);
    if (m < 0) return;
    if (blocks.empty())
      clear_sums();
    else if constexpr (T::kOverlap)
      run_blocks();
    else
      run_blocks_serially();
  }
  // A block that only the other warpgroups of this tile need: keeps the rings and the turns in
  // step.
  FA3_DEVICE void skip_block(int n) {
    load_ahead(n);
    wait_k();
    if (n != blocks.end - 1) wait_turn(), pass_turn();
    release_k();
    wait_v();
    release_v();
  }
  FA3_DEVICE void run_blocks() {
    BlockRange mine = blocks;
    if (first_row() >= seqlen_q) mine.end = mine.begin;  // rows behind the end of the sequence
    if constexpr (T::kMask != Mask::None) {
      const BlockRange seen =
          visited_blocks<T::kMask>(bounds(), first_row(), kWarpgroupRows, T::BLOCK_N);
      mine = {max(mine.begin, seen.begin), min(mine.end, seen.end)};
    }
    const BlockRange unmasked =
        unmasked_blocks<T::kMask>(bounds(), first_row(), kWarpgroupRows, T::BLOCK_N);
    int n = blocks.end - 1;
    if (mine.empty()) {
      wait_q();
      release_q();
      for (; n >= blocks.begin; --n) skip_block(n);
      clear_sums();
      return;
    }
    for (; n >= mine.end; --n) skip_block(n);
    first_block(n, n >= unmasked.end || n < unmasked.begin, n == mine.begin, n != blocks.end - 1);
    --n;
    for (; n >= max(unmasked.end, mine.begin); --n) next_block<true>(n, n == mine.begin);
    // The head start needs finite maxima: a row that met its first key nowhere yet does so in the
    // next block.
    if constexpr (T::kMask != Mask::None) {
      if (n >= mine.begin &&
          __any_sync(kFullWarp, maximum[0] == -INFINITY || maximum[1] == -INFINITY)) {
        next_block<true>(n, n == mine.begin);
        --n;
      }
    }
    for (; n >= max(unmasked.begin, mine.begin); --n) next_block<false>(n, n == mine.begin);
    if constexpr (T::kMask == Mask::Window)
      for (; n >= mine.begin; --n) next_block<true>(n, n == mine.begin);
    last_product();
    if constexpr (T::kMask == Mask::Window)
      for (; n >= blocks.begin; --n) skip_block(n);
  }

  // ---- epilogue ----
  FA3_DEVICE float row_total(int i) const {
    if constexpr (T::kOnes)
      return o[T::kDimV / 2 + 2 * i];
    else
      return sums.total(i);
  }
  // O / sum and the log-sum-exp. The sink is one more logit in the denominator, without a value.
  FA3_DEVICE void finish(const typename T::Tile& t) {
    constexpr float kLn2 = 0.6931471805599453f, kLog2e = 1.4426950408889634f;
    float sum[2] = {row_total(0), row_total(1)}, inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) inverse[i] = sum[i] == 0.f ? 0.f : reciprocal(sum[i]);
    if (p.sink != nullptr) {
      const float sink = p.sink[t.head] * kLog2e;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float top = fmaxf(maximum[i], sink);
        if (top == -INFINITY) continue;
        const float factor = exp2_approx(maximum[i] - top);
        sum[i] = sum[i] * factor + exp2_approx(sink - top);
        inverse[i] = factor * reciprocal(sum[i]);
        maximum[i] = top;
      }
    }
    if (first_row() >= seqlen_q) return;
    // A box that is stored must end with the tensor (then TMA clips it) or lie inside the sequence.
    if (T::kStageO && (p.cu_seqlens_q == nullptr || first_row() + kWarpgroupRows <= seqlen_q))
      store_by_tma(t, inverse);
    else
      store_directly(t, inverse);
    float* lse = p.lse + t.lse_row + row(0);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (lane % 4 == 0 && row(i) < seqlen_q)
        lse[8 * i] = sum[i] == 0.f ? -INFINITY : fmaf(maximum[i], kLn2, __logf(sum[i]));
  }
  // Through this warpgroup's own buffer: no barrier with the others, and the next tile starts
  // meanwhile.
  FA3_DEVICE void store_by_tma(const typename T::Tile& t, const float (&inverse)[2]) {
    const uint32_t buffer = smem_addr(shared.o[0]) + wg * T::kOBytes;
    if (tid == 0) bulk_wait_read<0>();  // the store before this one has left the buffer
    named_sync(kStore + wg, kWarpgroupThreads);
    // Chunk 2 j + (0 or 1) of the row: j only toggles swizzled address bits 5 and 6, and picks the
    // slab.
    const uint32_t first =
        buffer + tile_offset<128, 2>(kWarpgroupRows, stmatrix_row(tid), 8 * stmatrix_chunk(tid, 0));
#pragma unroll
    for (int j = 0; j < T::kDimV / 16; ++j)
      stmatrix_x4((first ^ (j % 4 * 32)) + j / 4 * kWarpgroupRows * kRowBytes,
                  pack2<Elem>(o[8 * j] * inverse[0], o[8 * j + 1] * inverse[0]),
                  pack2<Elem>(o[8 * j + 2] * inverse[1], o[8 * j + 3] * inverse[1]),
                  pack2<Elem>(o[8 * j + 4] * inverse[0], o[8 * j + 5] * inverse[0]),
                  pack2<Elem>(o[8 * j + 6] * inverse[1], o[8 * j + 7] * inverse[1]));
    fence_proxy_async_shared();
    named_sync(kStore + wg, kWarpgroupThreads);
    if (tid == 0) {
      const int batch = p.cu_seqlens_q == nullptr ? t.batch : 0;
#pragma unroll
      for (int slab = 0; slab < T::kSlabsV; ++slab)
        if (slab * T::kSlab < p.dim_v)
          tma_store_4d(&p.out, buffer + slab * kWarpgroupRows * kRowBytes, slab * T::kSlab,
                       t.start_q + first_row(), t.head, batch);
      bulk_commit();
    }
  }
  // From registers, row by row. The four lanes of a row hold two columns of every eight; a 4 x 4
  // transpose of packed pairs among them makes that eight neighbouring columns per lane, one
  // 16-byte store.
  FA3_DEVICE void store_directly(const typename T::Tile& t, const float (&inverse)[2]) {
    const int quad = lane % 4;
    const int batch = p.cu_seqlens_q == nullptr ? t.batch : 0;
    Elem* out =
        static_cast<Elem*>(p.out_ptr) + batch * p.out_stride_batch + t.head * p.out_stride_head;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Elem* out_row = out + int64_t(t.start_q + row(i)) * p.out_stride_token;
#pragma unroll
      for (int g = 0; g < T::kDimV / 32; ++g) {
        uint32_t w[4];
#pragma unroll
        for (int e = 0; e < 4; ++e)
          w[e] = pack2<Elem>(o[16 * g + 4 * e + 2 * i] * inverse[i],
                             o[16 * g + 4 * e + 2 * i + 1] * inverse[i]);
#pragma unroll
        for (int bit = 1; bit <= 2;
             bit *= 2) {  // swap the off-diagonal halves across lanes that differ in this bit
          const bool upper = quad & bit;
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (e & bit) continue;
            const uint32_t received = __shfl_xor_sync(kFullWarp, upper ? w[e] : w[e | bit], bit);
            w[e] = upper ? received : w[e];
            w[e | bit] = upper ? w[e | bit] : received;
          }
        }
        const int col = 32 * g + 8 * quad;
        if (row(i) < seqlen_q && col < p.dim_v)
          *reinterpret_cast<uint4*>(out_row + col) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }

  FA3_DEVICE void run() {
    if (T::kPingPong && wg == T::kConsumers - 1)
      named_arrive(kTurn, 2 * kWarpgroupThreads);  // first turn: wg 0
    if constexpr (T::kWarpSpecialized) {
      for (;; ring.advance()) {
        mbar_wait(smem_addr(&shared.tile_full[ring.stage]), ring.phase);
        const uint32_t slot = smem_addr(&shared.tiles[ring.stage]);
        run_tile(read_tile<T>(slot));
        if (m < 0) break;
        const typename T::Tile t =
            read_tile<T>(slot);  // again: not kept in registers through the block loop
        arrive(shared.tile_empty[ring.stage]);
        finish(t);
      }
    } else {  // dense only, static schedule
      for (int round = 0;; ++round) {
        const typename T::Tile t = locate_tile<T>(p, snake(round, blockIdx.x, gridDim.x), lane);
        if (t.m < 0) break;
        __syncwarp();
        if (tid == 0 && wg == 0) write_tile<T>(smem_addr(&shared.tiles[0]), t);
        __syncwarp();
        run_tile(t);
        finish(t);
      }
    }
    if (T::kStageO && tid == 0) bulk_wait<0>();
  }
};

// ---- kernel ----------------------------------------------------------------------------------
template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    attn_fwd_kernel(const __grid_constant__ FwdParams p) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<typename T::Shared*>(shared_bytes);
  if (threadIdx.x == 0) {
    constexpr int kReaders = T::kConsumers * kWarpgroupWarps;
    for (int i = 0; i < T::kConsumers; ++i) {
      mbar_init(smem_addr(&shared.q_full[i]), 1);
      mbar_init(smem_addr(&shared.q_empty[i]), kWarpgroupWarps);
    }
    for (int i = 0; i < T::kStages; ++i) {
      mbar_init(smem_addr(&shared.k_full[i]), 1);
      mbar_init(smem_addr(&shared.k_empty[i]), kReaders);
      mbar_init(smem_addr(&shared.v_full[i]), 1);
      mbar_init(smem_addr(&shared.v_empty[i]), kReaders);
    }
    for (int i = 0; i < T::kTileRing; ++i) {
      mbar_init(smem_addr(&shared.tile_full[i]), 1);
      mbar_init(smem_addr(&shared.tile_empty[i]), kReaders + 1);  // and the producer
    }
    mbar_init(smem_addr(&shared.draw), 1);
    mbar_init_fence();
    tma_prefetch_map(&p.q);
    tma_prefetch_map(&p.k);
    tma_prefetch_map(&p.v);
  }
  if constexpr (T::kOnes) {
    for (int i = threadIdx.x; i < T::kStages * T::BLOCK_N * 8; i += T::kThreads) {
      constexpr uint32_t kPair = packed_ones<typename T::Elem>();
      sts128(smem_addr(shared.v[i / (T::BLOCK_N * 8)]) + T::kVBytes + i % (T::BLOCK_N * 8) * 16,
             make_uint4(kPair, kPair, kPair, kPair));
    }
    fence_proxy_async_shared();
  }
  __syncthreads();
  const int warpgroup = uniform(threadIdx.x / kWarpgroupThreads);
  if (T::kWarpSpecialized && warpgroup == 0) {
    if constexpr (T::kReallocate) registers_release<T::kProducerRegisters>();
    const int warp = uniform(threadIdx.x / 32);
    if (warp == 0) {
      if (elect_one()) produce<T>(p, shared);
    } else if (warp == 1) {
      schedule<T>(p, shared, threadIdx.x % 32);
    }
  } else {
    if constexpr (T::kReallocate && T::kWarpSpecialized) registers_claim<T::kConsumerRegisters>();
    Consumer<T>(p, shared, warpgroup - T::kProducerWarpgroups).run();
  }
}

}  // namespace fa3

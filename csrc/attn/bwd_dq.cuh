// dQ across thread blocks: each key tile adds its share to FP32 sums in the workspace, and when a
// row block is complete somebody rounds it, mostly while its sums are still in L2.
//
// A row block has a state (DqState in bwd_ranges.h): tickets drawn, arrivals, arrivals expected.
// Who draws ticket 0 stores instead of adding, so that nobody has to clear the sums; the others add
// once the first has arrived. (Deterministic: the rank of a key tile takes the place of the ticket,
// and it adds when all ranks before it have arrived.) Nobody waits for a thread block that is not
// running: a ticket is drawn while the sums that go with it are being computed, a rank is that of a
// tile that was handed out before.
//
// Row blocks are dealt out to the thread blocks, whose finishing warps look for complete ones among
// their own. Nobody waits for those that others still work on, either: when a thread block has no
// more tiles it closes what is left of its share, and whoever completes a closed row block finishes
// it himself.
#pragma once
#include <type_traits>

#include "attn/bwd_tile.cuh"

namespace fa3 {

constexpr int kFinishChunkBytes = 8192;  // of sums: 64 rows x 32 columns

// What the finishing warp of a thread block has to do and where it is, in shared memory because its
// registers are few; and row blocks that the sending thread hands to it.
struct FinishQueue {
  static constexpr int kSlots = 8;
  volatile int made, taken, closed;  // closed: the sending thread is done
  volatile int row_block[kSlots];
  // 32 row blocks of the share are in view, a bit for each: finished or not there; complete.
  volatile int view, closing;
  volatile uint32_t finished, ready;
  // Of the row block in hand: rows that exist. Of all so far: chunks through the buffers.
  volatile int rows;
  volatile uint32_t chunks;

  FA3_DEVICE void clear() {
    made = taken = closed = view = closing = 0;
    finished = ready = chunks = 0;
  }
  FA3_DEVICE void put(int r) {  // the sending thread
    while (made - taken == kSlots) __nanosleep(100);
    row_block[made % kSlots] = r;
    __threadfence_block();
    made = made + 1;
  }
  FA3_DEVICE void close() {  // nothing comes after this
    __threadfence_block();
    closed = 1;
  }
  FA3_DEVICE int take() {  // one thread of the finishing warp. -1: none
    if (taken == made) return -1;
    __threadfence_block();
    const int r = row_block[taken % kSlots];
    __threadfence_block();
    taken = taken + 1;
    return r;
  }
};

// What this thread knows to have been added to `row_block` counts; if that completes a closed row
// block, it is for this thread block to finish.
FA3_DEVICE void count_arrival(uint64_t* state, int row_block, FinishQueue& queue) {
  fence_proxy_async_global();
  const uint64_t before = fetch_add_release(state, DqState::kArrival);
  if (!DqState::closed(before) || DqState::arrivals(before) + 1 != DqState::expected(before))
    return;
  fence_gpu();  // the other arrivals
  queue.put(row_block);
}

// Rounds (or adds to FP32) one complete row block. One warp; the sums come through `buffers`, two
// of kFinishChunkBytes, with a barrier each.
template <class T>
FA3_DEVICE void finish_row_block(const BwdKernelParams& p, int row_block, uint32_t buffers,
                                 uint32_t bars, FinishQueue& queue) {
  using Elem = typename T::Elem;
  constexpr int BLOCK_M = T::BLOCK_M, kChunks = T::kDqBlockFloats * 4 / kFinishChunkBytes;
  const BwdShape& s = p.shape;
  const auto load = [&](int chunk, uint32_t stage) {
    mbar_arrive_expect_tx(bars + stage * 8, kFinishChunkBytes);
    bulk_load(buffers + stage * kFinishChunkBytes,
              p.work.dq + int64_t(row_block) * T::kDqBlockFloats + chunk * (kFinishChunkBytes / 4),
              kFinishChunkBytes, bars + stage * 8);
  };
  const int lane = current_thread_index() & 31;
  __syncwarp();  // after the acquires of other lanes
  if (lane == 0) {
    fence_proxy_async_global();  // the sums were made by other thread blocks' async proxies
    const PairRing ring{queue.chunks};
    load(0, ring.stage()), load(1, ring.stage() ^ 1);
  }

  // A lane takes 8 columns of a row at a time, two from each of four fragments, in an order of its
  // own, so that the reads meet no bank conflict.
  int64_t at;
  {
    int first, head, rows;
    if (!T::kPacked || s.cu_seqlens_q == nullptr) {
      const int sequence_head = row_block / s.row_blocks, b = sequence_head / s.heads_q;
      first = (row_block - sequence_head * s.row_blocks) * BLOCK_M;
      head = sequence_head - b * s.heads_q;
      rows = s.seqlen_q - first;
      at = b * p.dq.stride_batch;
    } else {
      head = row_block / s.row_blocks;
      const int index = row_block - head * s.row_blocks;
      int b = 0, above = s.batch;  // the last b with first_block(b) <= index
      while (above - b > 1) {
        const int middle = (b + above) / 2;
        if (first_block(__ldg(s.cu_seqlens_q + middle), middle, BLOCK_M) <= index)
          b = middle;
        else
          above = middle;
      }
      const int start = __ldg(s.cu_seqlens_q + b);
      first = start + (index - first_block(start, b, BLOCK_M)) * BLOCK_M;
      rows = __ldg(s.cu_seqlens_q + b + 1) - first;
      at = 0;
    }
    if (lane == 0) queue.rows = rows;
    __syncwarp();
    at += head * p.dq.stride_head + int64_t(first) * p.dq.stride_token;
  }
  const auto convert = [&](auto* to, uint32_t src, int rows_left, int cols_left) {
    using Out = std::remove_pointer_t<decltype(to)>;
    {
      const int l = current_thread_index() & 31;
      to += (l & 15) * p.dq.stride_token + 8 * (l / 16);
      src += l / 16 * 2048 + (l & 7) * 64 + (l & 8) + (l / 2 & 3) * 16;
      rows_left -= l & 15;
    }
#pragma unroll 1
    for (int i = 0; i < 4; ++i, rows_left -= 16, to += 16 * p.dq.stride_token, src += 512) {
      const int skew = current_thread_index() / 2;
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // vectors 2 j + lane / 16
        float2 f[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) f[k] = lds_float2((src ^ (k * 16)) + j * 4096);
        // f[k] belongs at place k ^ skew % 4
        const bool exists = rows_left > 0 && 16 * j + (skew & 8) < cols_left;
        if constexpr (std::is_same_v<Out, float>) {
          if (exists)
#pragma unroll
            for (int k = 0; k < 4; ++k)
              reduce_add_f32x2(to + 16 * j + 2 * (k ^ (skew & 3)), f[k].x * s.softmax_scale,
                               f[k].y * s.softmax_scale);
        } else {
          const bool one = skew & 1, two = skew & 2;
          uint32_t x[4];
#pragma unroll
          for (int k = 0; k < 4; ++k)
            x[k] = pack2<Elem>(f[k].x * s.softmax_scale, f[k].y * s.softmax_scale);
          const uint32_t y[4] = {one ? x[1] : x[0], one ? x[0] : x[1], one ? x[3] : x[2],
                                 one ? x[2] : x[3]};
          if (exists)
            *reinterpret_cast<uint4*>(to + 16 * j) = make_uint4(
                two ? y[2] : y[0], two ? y[3] : y[1], two ? y[0] : y[2], two ? y[1] : y[3]);
        }
        __syncwarp();  // one j after the other: registers
      }
    }
  };
  // Chunk c: columns 32 (c % 2) .. + 31 of piece c / 2, which is 64 rows at head dim 64, else 64
  // columns.
#pragma unroll 1
  for (int c = 0; c < kChunks; ++c) {
    const PairRing ring{queue.chunks};
    mbar_wait(bars + ring.stage() * 8, ring.phase());
    const int col0 = (T::kSplitDqRows ? 0 : c / 2 * 64) + c % 2 * 32;
    const int row0 = T::kSplitDqRows ? c / 2 * 64 : 0;
    const int64_t to = at + row0 * p.dq.stride_token + col0;
    const uint32_t src = buffers + ring.stage() * kFinishChunkBytes;
    if (p.dq_fp32)
      convert(static_cast<float*>(p.dq.ptr) + to, src, queue.rows - row0, s.head_dim_qk - col0);
    else
      convert(static_cast<Elem*>(p.dq.ptr) + to, src, queue.rows - row0, s.head_dim_qk - col0);
    __syncwarp();
    if ((current_thread_index() & 31) == 0) {
      PairRing after{queue.chunks};
      if (c + 2 < kChunks) load(c + 2, after.stage());
      queue.chunks = after.count + 1;
    }
    __syncwarp();
  }
}

// A row block for the finishing warp; -1: none now; -2: none will come. All lanes get the same.
FA3_DEVICE int next_complete(const BwdKernelParams& p, FinishQueue& queue) {
  constexpr uint32_t kAllLanes = 0xffffffffu;
  const int lane = current_thread_index() & 31, all = p.shape.all_row_blocks;
  __syncwarp();
  const int closed = uniform(queue.closed);  // before the queue is looked at
  const int handed = uniform(lane == 0 ? queue.take() : 0);
  if (handed >= 0) return handed;
  const int view = queue.view;
  if (owned_row_block(view, blockIdx.x, gridDim.x) >= all) return closed ? -2 : -1;
  uint32_t ready = queue.ready;
  if (ready == 0) {
    uint32_t finished = queue.finished;
    const int mine = owned_row_block(view + lane, blockIdx.x, gridDim.x);
    const bool closing = queue.closing;
    bool gone = mine >= all || (finished >> lane & 1);
    uint64_t state = 0;
    if (!gone) {
      state = closing ? fetch_add_acquire(p.work.dq_state + mine, DqState::kClosed)
                      : load_acquire(p.work.dq_state + mine);
      gone = DqState::expected(state) == 0;
    }
    ready = __ballot_sync(kAllLanes, !gone && DqState::arrivals(state) == DqState::expected(state));
    finished |= __ballot_sync(kAllLanes, gone) | ready;
    if (closing) finished = kAllLanes;
    const bool next_view = ready == 0 && finished == kAllLanes;
    __syncwarp();
    if (lane == 0) {
      queue.finished = next_view ? 0 : finished;
      if (next_view)
        queue.view = view + 32;
      else if (closed)
        queue.closing = 1;
    }
    if (ready == 0) return -1;
  }
  __syncwarp();
  if (lane == 0) queue.ready = ready & (ready - 1);
  return owned_row_block(view + __ffs(ready) - 1, blockIdx.x, gridDim.x);
}

// The finishing warp.
template <class T>
FA3_DEVICE void finish_row_blocks(const BwdKernelParams& p, uint32_t buffers, uint32_t bars,
                                  FinishQueue& queue) {
  constexpr uint32_t kPauseNs = 500;
#pragma unroll 1
  for (;;) {
    const int row_block = next_complete(p, queue);
    if (row_block == -2) return;
    if (row_block >= 0)
      finish_row_block<T>(p, row_block, buffers, bars, queue);
    else
      __nanosleep(kPauseNs);
  }
}

}  // namespace fa3

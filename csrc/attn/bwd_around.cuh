// The small kernels around the backward: bwd_prepare before it; bwd_finish_dq, bwd_sum_dkv and
// bwd_finish_sink after it. All are bound by memory traffic, and launched so that their start
// overlaps the end of the kernel before.
#pragma once
#include "attn/bwd_params.cuh"
#include "attn/bwd_tile.cuh"

namespace fa3 {

constexpr int kAroundThreads = 256;

struct BwdAroundParams {
  BwdShape shape;
  BwdWorkspace work;
  GradTensor out, dout;  // 16-bit inputs (B, Sq, heads_q, head_dim_v)
  GradTensor dq;         // 16-bit, or FP32 to add to (dq_fp32)
  GradTensor dk, dv;     // bwd_sum_dkv: 16-bit, or FP32 to add to (dkv_fp32)
  const float* lse;      // (B, H, Sq) or (H, total_q), natural log
  const float* dlse;     // likewise; NULL: none
  const float* sink;     // (heads_q); NULL: none
  float* dsink;
  float*
      // [heads_q * row_blocks]: bwd_prepare's sums of exp(sink - lse) * delta, per row block
      sink_parts;
  float4* zero;  // workspace that must be zero (counters): zero_vectors of 16 bytes
  int64_t zero_vectors;
  const float *dk_parts, *dv_parts;  // bwd_sum_dkv: [shares](B, Sk, heads_k, D) contiguous
  int64_t dk_share, dv_share;        // floats of one share
  int shares;
  int64_t total_q, total_k;  // rows of q and of k: packed totals, dense batch * seqlen
  float lse_factor;  // neg_lse = -lse * lse_factor: 1 / softmax_scale, or log2 e with softcap
  int dq_fp32, dkv_fp32;
  int finish_inside;
};

// Rows of a query row block: sequence b, block m of it. False: a spare number.
struct RowBlock {
  int first_row;    // token of the tensor's token dimension
  int batch;        // for batch strides; 0 when packed
  int seqlen, row;  // row: first query of the block within its sequence
  int seqlen_k;
  int64_t lse_row;  // index of (head 0, first row) in lse
  int64_t lse_head_stride;
  int index;  // of statistics, without the head
};
template <int BLOCK_M>
FA3_DEVICE bool find_row_block(const BwdShape& s, int64_t total_q, int m, int b, RowBlock* r) {
  r->row = m * BLOCK_M;
  if (s.cu_seqlens_q == nullptr) {
    r->batch = b;
    r->seqlen = s.seqlen_q;
    r->seqlen_k = s.seqlen_k;
    r->first_row = r->row;
    r->lse_row = int64_t(b) * s.heads_q * s.seqlen_q + r->row;
    r->lse_head_stride = s.seqlen_q;
    r->index = b * s.heads_q * s.row_blocks + m;
  } else {
    const int start = __ldg(s.cu_seqlens_q + b);
    r->batch = 0;
    r->seqlen = __ldg(s.cu_seqlens_q + b + 1) - start;
    r->seqlen_k = __ldg(s.cu_seqlens_k + b + 1) - __ldg(s.cu_seqlens_k + b);
    r->first_row = start + r->row;
    r->lse_row = r->first_row;
    r->lse_head_stride = total_q;
    r->index = first_block(start, b, BLOCK_M) + m;
  }
  return r->row < r->seqlen;
}

template <class Elem>
FA3_DEVICE float dot8(uint4 a, uint4 b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = unpack2<Elem>(x[i]), v = unpack2<Elem>(y[i]);
    sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
  }
  return sum;
}

// neg_delta = -(rowsum(dO o O) - dLSE), neg_lse, zeroed accumulators, sink sums. A thread block per
// row block (m, head, batch). kLanes lanes read a row of up to 8 kLanes elements. dLSE: d LSE_i / d
// s_ij = P_ij, hence dS_ij = P_ij (dP_ij - delta_i + dLSE_i). Sink z of the head: P_sink = exp(z -
// LSE_i) meets no value, so dP_sink = 0 and dz = -sum_i P_sink (delta_i - dLSE_i).
template <class Elem, int BLOCK_M, int kLanes, int kDqFloats>
__global__ void __launch_bounds__(kAroundThreads)
    bwd_prepare(const __grid_constant__ BwdAroundParams p) {
  constexpr int kRowsAtOnce = kAroundThreads / kLanes, kPasses = BLOCK_M / kRowsAtOnce;
  constexpr int kBatch = kPasses % 4 == 0   ? 4
                         : kPasses % 3 == 0 ? 3
                                            : kPasses;  // rows a thread has in flight
  static_assert(kPasses >= 1 && kPasses % kBatch == 0, "rows of a block divide evenly");
  const int head = blockIdx.y, b = blockIdx.z, thread = threadIdx.x;
  if (thread == 0) grid_launch_dependents();
  const int64_t block =
      blockIdx.x + int64_t(gridDim.x) * (blockIdx.y + int64_t(gridDim.y) * blockIdx.z);
  const int64_t threads = int64_t(gridDim.x) * gridDim.y * gridDim.z * kAroundThreads;
  for (int64_t i = block * kAroundThreads + thread; i < p.zero_vectors; i += threads)
    p.zero[i] = make_float4(0.f, 0.f, 0.f, 0.f);

  RowBlock r;
  const bool exists = find_row_block<BLOCK_M>(p.shape, p.total_q, blockIdx.x, b, &r);
  const int64_t row_block = int64_t(head) * p.shape.row_blocks + r.index;
  if (kDqFloats > 0 && p.shape.cu_seqlens_q != nullptr && blockIdx.x == 0 && thread == 0) {
    // Row blocks that no sequence has: spare numbers, and rows behind the last sequence.
    const int end = b + 1 < p.shape.batch
                        ? first_block(__ldg(p.shape.cu_seqlens_q + b + 1), b + 1, BLOCK_M)
                        : p.shape.row_blocks;
    for (int i = r.index + ceil_div(r.seqlen, BLOCK_M); i < end; ++i)
      p.work.dq_state[row_block - r.index + i] = 0;
  }
  if (!exists) return;
  const int lane = thread % kLanes, row0 = thread / kLanes, col = 8 * lane;
  const bool has_col = col < p.shape.head_dim_v;
  const auto address = [&](const GradTensor& t, int row) {
    return reinterpret_cast<const uint4*>(
        static_cast<const Elem*>(t.ptr) + r.batch * t.stride_batch +
        int64_t(r.first_row + row) * t.stride_token + head * t.stride_head + col);
  };
  if constexpr (kDqFloats > 0) {
    const Mask mask{r.seqlen_k - r.seqlen, p.shape.window_left, p.shape.window_right};
    const int key_tiles = key_blocks({BLOCK_M, kBwdKeyTile}, mask, r.row / BLOCK_M,
                                     ceil_div(r.seqlen_k, kBwdKeyTile))
                              .size();
    if (thread == 0) p.work.dq_state[row_block] = key_tiles;
    if (!p.finish_inside) {
      float4* const dq = reinterpret_cast<float4*>(p.work.dq) + row_block * (kDqFloats / 4);
#pragma unroll
      for (int i = 0; i < kDqFloats / 4 / kAroundThreads; ++i)
        dq[i * kAroundThreads + thread] = make_float4(0.f, 0.f, 0.f, 0.f);
    } else if (!p.dq_fp32 && key_tiles == 0) {  // no key tile, nobody to finish it
      for (int row = row0; row < BLOCK_M && r.row + row < r.seqlen; row += kRowsAtOnce)
        for (int c = col; c < p.shape.head_dim_qk; c += 8 * kLanes)
          *reinterpret_cast<uint4*>(static_cast<Elem*>(p.dq.ptr) + r.batch * p.dq.stride_batch +
                                    int64_t(r.first_row + row) * p.dq.stride_token +
                                    head * p.dq.stride_head + c) = make_uint4(0, 0, 0, 0);
    }
  }
  const float* const lse = p.lse + r.lse_row + head * r.lse_head_stride;
  const float* const dlse =
      p.dlse == nullptr ? nullptr : p.dlse + r.lse_row + head * r.lse_head_stride;
  const float sink = p.sink == nullptr ? 0.f : __ldg(p.sink + head);
  float sink_sum = 0.f;
#pragma unroll
  for (int first = 0; first < kPasses; first += kBatch) {
    uint4 o[kBatch], d[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = row0 + (first + i) * kRowsAtOnce;
      o[i] = d[i] = make_uint4(0, 0, 0, 0);
      if (r.row + row < r.seqlen && has_col) {
        o[i] =
            __ldcs(address(p.out, row));  // nobody reads O again; dO comes back in the main kernel
        d[i] = __ldg(address(p.dout, row));
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = row0 + (first + i) * kRowsAtOnce;
      float delta = dot8<Elem>(o[i], d[i]);
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2)
        delta += __shfl_xor_sync(0xffffffffu, delta, step);
      if (lane != 0) continue;
      // A row without keys has LSE = -inf, P = 0 and no gradient; rows past the end are made to
      // look like one.
      const float l = r.row + row < r.seqlen ? lse[row] : -INFINITY;
      const bool live = l != -INFINITY;
      if (live && dlse != nullptr) delta -= dlse[row];
      const int64_t at = row_block * BLOCK_M + statistics_slot(row);
      p.work.neg_lse[at] = live ? -l * p.lse_factor : -INFINITY;
      p.work.neg_delta[at] = live ? -delta : 0.f;
      if (p.sink != nullptr && live) sink_sum += exp2_approx((sink - l) * 1.44269504f) * delta;
    }
  }
  if (p.sink != nullptr) {  // fixed order: lanes, then warps
    __shared__ float parts[kAroundThreads / 32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      sink_sum += __shfl_xor_sync(0xffffffffu, sink_sum, step);
    if (thread % 32 == 0) parts[thread / 32] = sink_sum;
    __syncthreads();
    if (thread == 0) {
      float sum = 0.f;
      for (float part : parts) sum += part;
      p.sink_parts[row_block] = sum;
    }
  }
}

// dsink[head] = -sum of its parts over all row blocks that exist, in a fixed order. A thread block
// per head.
template <int BLOCK_M>
__global__ void __launch_bounds__(kAroundThreads)
    bwd_finish_sink(const __grid_constant__ BwdAroundParams p) {
  const int head = blockIdx.x, thread = threadIdx.x;
  grid_dependency_wait();
  float sum = 0.f;
  for (int b = 0; b < p.shape.batch; ++b)
    for (int m = thread; m * BLOCK_M < p.shape.seqlen_q; m += kAroundThreads) {
      RowBlock r;
      if (find_row_block<BLOCK_M>(p.shape, p.total_q, m, b, &r))
        sum += p.sink_parts[int64_t(head) * p.shape.row_blocks + r.index];
    }
  __shared__ float parts[kAroundThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (thread % 32 == 0) parts[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) {
    float total = 0.f;
    for (float part : parts) total += part;
    p.dsink[head] = -total;
  }
}

// dQ from fragment order (see bwd_fused: [warpgroup][vector i][thread]) to rows, times the softmax
// scale: rounded, or added to FP32. A thread block per row block; BLOCK_M * kHeadDim floats. 32
// columns at a time: few registers, so that many thread blocks keep the memory busy.
template <class Elem, int BLOCK_M, int kHeadDim>
__global__ void __launch_bounds__(kAroundThreads, 6)
    bwd_finish_dq(const __grid_constant__ BwdAroundParams p) {
  constexpr int kVectorBytes = 128 * 16, kPieceFloats = 64 * 64, kColumns = 32;
  const int head = blockIdx.y, b = blockIdx.z;
  const int piece = threadIdx.x / 128, thread = threadIdx.x % 128;
  grid_dependency_wait();
  RowBlock r;
  if (!find_row_block<BLOCK_M>(p.shape, p.total_q, blockIdx.x, b, &r)) return;
  constexpr bool kSplitRows = kHeadDim == 64;
  const int64_t row_block = int64_t(head) * p.shape.row_blocks + r.index;
  const float4* const src =
      reinterpret_cast<const float4*>(p.work.dq + row_block * (BLOCK_M * kHeadDim) +
                                      piece * kPieceFloats) +
      thread;
  const int row0 = kSplitRows ? 64 * piece : 0, col0 = kSplitRows ? 0 : 64 * piece;
  const int rows = r.seqlen - r.row - row0, cols = p.shape.head_dim_qk - col0;
  const int64_t at = r.batch * p.dq.stride_batch + head * p.dq.stride_head + col0 +
                     int64_t(r.first_row + row0) * p.dq.stride_token;
  const float scale = p.shape.softmax_scale;
#pragma unroll
  for (int first = 0; first < 64; first += kColumns) {
    if (kHeadDim % 64 != 0 && first >= kHeadDim - col0) return;
    float acc[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      const float4 f = __ldcs(src + (first / 8 + i) * (kVectorBytes / 16));
      acc[4 * i] = f.x, acc[4 * i + 1] = f.y, acc[4 * i + 2] = f.z, acc[4 * i + 3] = f.w;
    }
    if (p.dq_fp32)
      add_rows<kColumns>(acc, scale, static_cast<float*>(p.dq.ptr) + at + first, p.dq.stride_token,
                         rows, cols - first);
    else
      store_rows<Elem, kColumns>(acc, scale, static_cast<Elem*>(p.dq.ptr) + at + first,
                                 p.dq.stride_token, rows, cols - first);
  }
}

// dK and dV of whole groups from the partial sums of their shares, added in order: rounded once, or
// added to FP32. A thread takes 8 columns of one row and head.
template <class Elem>
__global__ void __launch_bounds__(kAroundThreads)
    bwd_sum_dkv(const __grid_constant__ BwdAroundParams p) {
  grid_dependency_wait();
  const bool is_v = blockIdx.y == 1;
  const int head_dim = is_v ? p.shape.head_dim_v : p.shape.head_dim_qk;
  const GradTensor& dst = is_v ? p.dv : p.dk;
  const float* const parts = is_v ? p.dv_parts : p.dk_parts;
  const int64_t share = is_v ? p.dv_share : p.dk_share;
  const int vectors = head_dim / 8;
  const int64_t count = p.total_k * p.shape.heads_k * vectors;
  for (int64_t i = int64_t(blockIdx.x) * kAroundThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kAroundThreads) {
    const int64_t row = i / vectors;
    const int col = 8 * int(i - row * vectors);
    const int64_t token = row / p.shape.heads_k;
    const int head = int(row - token * p.shape.heads_k);
    int64_t batch = 0, in_sequence = token;
    if (p.shape.cu_seqlens_k == nullptr) {
      batch = token / p.shape.seqlen_k;
      in_sequence = token - batch * p.shape.seqlen_k;
    } else if (token >= __ldg(p.shape.cu_seqlens_k + p.shape.batch)) {
      return;  // rows past the last sequence belong to nobody
    }
    const float4* src = reinterpret_cast<const float4*>(parts + row * head_dim + col);
    float4 a = make_float4(0.f, 0.f, 0.f, 0.f), c = a;
#pragma unroll 4
    for (int n = 0; n < p.shares; ++n, src += share / 4) {
      const float4 u = __ldcs(src), v = __ldcs(src + 1);
      a.x += u.x, a.y += u.y, a.z += u.z, a.w += u.w;
      c.x += v.x, c.y += v.y, c.z += v.z, c.w += v.w;
    }
    const int64_t at =
        batch * dst.stride_batch + in_sequence * dst.stride_token + head * dst.stride_head + col;
    if (p.dkv_fp32) {
      float4* const out = reinterpret_cast<float4*>(static_cast<float*>(dst.ptr) + at);
      const float4 u = out[0], v = out[1];
      out[0] = make_float4(u.x + a.x, u.y + a.y, u.z + a.z, u.w + a.w);
      out[1] = make_float4(v.x + c.x, v.y + c.y, v.z + c.z, v.w + c.w);
    } else {
      *reinterpret_cast<uint4*>(static_cast<Elem*>(dst.ptr) + at) =
          make_uint4(pack2<Elem>(a.x, a.y), pack2<Elem>(a.z, a.w), pack2<Elem>(c.x, c.y),
                     pack2<Elem>(c.z, c.w));
    }
  }
}

}  // namespace fa3

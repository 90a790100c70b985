// FP8 forward: tensor maps and launch of one kernel instantiation. Host code; arguments have been
// checked (fp8_api.cu).
#pragma once
#include <algorithm>

#include "attn/fp8_fwd.cuh"
#include "attn/fp8_launch.h"

namespace fa3 {

// Varlen: tiles of one head before each sequence, and the work counter, in one block of one warp.
template <int kBlockM>
__global__ void fp8_plan_kernel(const int* cu_q, int batch, int* counter, int* prefix) {
  int before = 0;
  for (int first = 0; first < batch; first += kWarpThreads) {
    const int b = first + int(threadIdx.x);
    int sum = b < batch ? (cu_q[b + 1] - cu_q[b] + kBlockM - 1) / kBlockM : 0;
    const int own = sum;
#pragma unroll
    for (int d = 1; d < kWarpThreads; d *= 2) {
      const int left = __shfl_up_sync(0xffffffffu, sum, d);
      if (int(threadIdx.x) >= d) sum += left;
    }
    if (b < batch) prefix[b] = before + sum - own;
    before += __shfl_sync(0xffffffffu, sum, kWarpThreads - 1);
  }
  if (threadIdx.x == 0) {
    prefix[batch] = before;
    *counter = 0;
  }
}

template <class T>
int encode_operand(CUtensorMap* map, const char* name, const fa3_tensor& x,
                   const fa3_tensor& stand_in, int64_t tokens, int64_t heads, int64_t batch,
                   int head_dim, int rows) {
  TensorMapShape shape{};
  shape.rank = 4;
  const bool empty = tokens == 0;  // never read, but the driver wants an address and a size
  const int64_t dims[4] = {head_dim, empty ? 1 : tokens, heads, batch};
  const int64_t strides[3] = {x.stride_token, x.stride_head, x.stride_batch};
  const int box[4] = {T::kWidth, rows, 1, 1};
  for (int i = 0; i < 4; ++i) {
    shape.dims[i] = dims[i];
    shape.box[i] = box[i];
    if (i < 3) shape.strides_bytes[i] = strides[i];
  }
  shape.swizzle_bytes = T::kWidth;
  return encode_tensor_map(map, name, FA3_E4M3, empty ? stand_in.ptr : x.ptr, shape);
}

template <int kHeadDim, Fp8Sums kSums>
int fp8_launch(const fa3_attn_fp8_fwd_params& a, const Device& device) {
  using T = Fp8Traits<kHeadDim, kSums>;
  const bool varlen = a.cu_seqlens_q != nullptr;
  const int64_t batch = varlen ? 1 : a.batch;
  Fp8FwdKernelParams p{};
  const int64_t rows_q = varlen ? a.total_q : a.seqlen_q, rows_k = varlen ? a.total_k : a.seqlen_k;
  const int dim = a.head_dim_qk;
  FA3_TRY(encode_operand<T>(&p.q, "q", a.q, a.q, rows_q, a.heads_q, batch, dim, kWarpgroupRows));
  FA3_TRY(encode_operand<T>(&p.k, "k", a.k, a.q, rows_k, a.heads_k, batch, dim, T::kBlockN));
  FA3_TRY(encode_operand<T>(&p.v, "v", a.v, a.q, rows_k, a.heads_k, batch, dim, kFp8RawKeys));
  p.out = static_cast<uint8_t*>(a.out.ptr);
  p.out_stride_batch = a.out.stride_batch;
  p.out_stride_token = a.out.stride_token;
  p.out_stride_head = a.out.stride_head;
  p.lse = a.lse;
  p.q_descale = a.q_descale;
  p.k_descale = a.k_descale;
  p.v_descale = a.v_descale;
  p.scale_log2 = a.softmax_scale * 1.4426950408889634f;
  p.batch = a.batch;
  p.heads_q = a.heads_q;
  p.heads_k = a.heads_k;
  p.group = a.heads_q / a.heads_k;
  p.seqlen_q = a.seqlen_q;
  p.seqlen_k = a.seqlen_k;
  p.head_dim = a.head_dim_qk;
  p.window_left = a.window_left < 0 ? kUnboundedWindow : std::min(a.window_left, kUnboundedWindow);
  p.window_right =
      a.window_right < 0 ? kUnboundedWindow : std::min(a.window_right, kUnboundedWindow);
  p.out_is_fp16 = a.out_dtype == FA3_FP16;

  const auto stream = static_cast<cudaStream_t>(a.stream);
  int* counter = static_cast<int*>(a.workspace);
  if (varlen) {
    p.cu_q = a.cu_seqlens_q;
    p.cu_k = a.cu_seqlens_k;
    p.lse_rows = a.total_q;
    p.q_scale_blocks = a.total_q / kFp8ScaleBlock + a.batch;
    p.k_scale_blocks = a.total_k / kFp8ScaleBlock + a.batch;
    p.next_work = counter;
    p.work_prefix = counter + kFp8PrefixOffset;
    fp8_plan_kernel<T::kBlockM><<<1, kWarpThreads, 0, stream>>>(a.cu_seqlens_q, a.batch, counter,
                                                                counter + kFp8PrefixOffset);
    FA3_TRY(check_cuda(cudaGetLastError(), "fa3_attn_fp8_fwd: launch of the plan"));
    p.work = INT32_MAX;
  } else {
    p.lse_rows = a.seqlen_q;
    p.q_scale_blocks = ceil_div(a.seqlen_q, kFp8ScaleBlock);
    p.k_scale_blocks = ceil_div(a.seqlen_k, kFp8ScaleBlock);
    p.tiles_per_head = ceil_div(a.seqlen_q, T::kBlockM);
    p.work = p.tiles_per_head * a.heads_q * a.batch;
    // Heads whose K and V fill at most 32 MB: a power of two, times the query heads that share
    // them.
    const bool uneven = a.window_left >= 0 || a.window_right >= 0;
    constexpr int64_t kSectionBytes = int64_t(32) << 20;
    const int64_t fit =
        kSectionBytes / std::max<int64_t>(1, int64_t(a.seqlen_k) * 2 * a.head_dim_qk);
    int64_t heads = 1;
    while (2 * heads <= fit) heads *= 2;
    p.heads_per_section =
        int(std::min<int64_t>(uneven ? heads * p.group : p.group, int64_t(a.heads_q) * a.batch));
    if (uneven) {  // tiles differ in length: who is done first draws next
      p.next_work = counter;
      FA3_TRY(check_cuda(cudaMemsetAsync(counter, 0, sizeof(int), stream),
                         "fa3_attn_fp8_fwd: clearing the work counter"));
    }
  }
  const auto kernel = fp8_fwd_kernel<T>;
  constexpr int kShared = fp8_shared_bytes<T>();
  FA3_TRY(allow_shared_memory(reinterpret_cast<const void*>(kernel), kShared));
  kernel<<<std::min(device.sm_count, p.work), T::kThreads, kShared, stream>>>(p);
  return check_cuda(cudaGetLastError(), "fa3_attn_fp8_fwd: launch");
}

}  // namespace fa3

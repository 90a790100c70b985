#include "attn/fwd_varlen.cuh"
#include "host.h"

namespace fa3 {
namespace {

constexpr int kVarlenThreads = 1024;
// Sorting compares all pairs: worth it up to this many sequences; beyond, their number alone
// balances the load.
constexpr int kVarlenSorted = 4096;

__global__ void __launch_bounds__(kVarlenThreads)
    attn_varlen_order_kernel(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, int batch,
                             int heads, int block_m, int* memory, int* counter) {
  __shared__ int lengths[kVarlenSorted];
  __shared__ int warp_sums[kVarlenThreads / 32];
  __shared__ int running;
  int* order = memory + 1;
  int* first = order + batch;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (batch <= kVarlenSorted) {
    for (int b = threadIdx.x; b < batch; b += kVarlenThreads)
      lengths[b] = cu_seqlens_k[b + 1] - cu_seqlens_k[b];
    __syncthreads();
    for (int b = threadIdx.x; b < batch; b += kVarlenThreads) {
      const int mine = lengths[b];
      int rank = 0;
      for (int other = 0; other < batch; ++other)
        rank += lengths[other] > mine || (lengths[other] == mine && other < b);
      order[rank] = b;
    }
  } else {
    for (int b = threadIdx.x; b < batch; b += kVarlenThreads) order[b] = b;
  }
  if (threadIdx.x == 0) running = 0, *counter = 0;
  __syncthreads();
  for (int base = 0; base < batch;
       base += kVarlenThreads) {  // exclusive prefix sum, a block of ranks at a time
    const int rank = base + threadIdx.x;
    int tiles = 0;
    if (rank < batch) {
      const int b = order[rank];
      tiles = ceil_div(max(cu_seqlens_q[b + 1] - cu_seqlens_q[b], 0), block_m) * heads;
    }
    int sum = tiles;
    for (int d = 1; d < 32; d *= 2) {
      const int left = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += left;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
      int total = warp_sums[lane];
      for (int d = 1; d < 32; d *= 2) {
        const int left = __shfl_up_sync(0xffffffffu, total, d);
        if (lane >= d) total += left;
      }
      warp_sums[lane] = total;
    }
    __syncthreads();
    const int before = running + (warp > 0 ? warp_sums[warp - 1] : 0) + sum - tiles;
    if (rank < batch) first[rank] = before;
    __syncthreads();
    if (threadIdx.x == 0) running += warp_sums[31];
    __syncthreads();
  }
  if (threadIdx.x == 0) first[batch] = memory[0] = running;
}

}  // namespace

int make_varlen_order(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, int batch,
                      int heads, int block_m, int* memory, int* counter, cudaStream_t stream) {
  attn_varlen_order_kernel<<<1, kVarlenThreads, 0, stream>>>(cu_seqlens_q, cu_seqlens_k, batch,
                                                             heads, block_m, memory, counter);
  return check_cuda(cudaGetLastError(), "fa3_attn_fwd: launch of the varlen order");
}

}  // namespace fa3

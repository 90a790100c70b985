// Order of work for packed sequences, made on the GPU (their lengths are known only there).
//
// Sequences sorted by falling key count, so that the longest tiles of the launch come first; for
// each rank the index of its first tile. One small kernel per launch, one thread block. Memory,
// int32: {tiles in all, order[batch], first[batch + 1]}.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "ptx/types.cuh"
#include "tile/layout.cuh"

namespace fa3 {

constexpr int64_t varlen_order_ints(int64_t batch) {
  return 2 * batch + 2;
}

struct VarlenOrder {
  const int* memory;
  int batch;
  FA3_DEVICE int num_tiles() const { return __ldg(memory); }
  FA3_DEVICE int sequence(int rank) const { return __ldg(memory + 1 + rank); }
  FA3_DEVICE int first_tile(int rank) const { return __ldg(memory + 1 + batch + rank); }
  // The rank whose tiles include `index`: the last one that starts at or before it (empty sequences
  // start where the next one does). The whole warp searches, 32 times finer a step.
  FA3_DEVICE int rank_of(int index, int lane) const {
    int low = 0, span = batch;  // the answer is in [low, low + span)
    while (span > 1) {
      const int step = ceil_div(span, 32);
      const int rank = low + lane * step;
      const bool starts_before = lane * step < span && first_tile(rank) <= index;
      const int last =
          31 - __clz(__ballot_sync(0xffffffffu, starts_before));  // lane 0 always votes yes
      low += last * step;
      span = min(step, span - last * step);
    }
    return low;
  }
};

// Launches the kernel that writes `memory` and sets *counter to 0.
int make_varlen_order(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, int batch,
                      int heads, int block_m, int* memory, int* counter, cudaStream_t stream);

}  // namespace fa3

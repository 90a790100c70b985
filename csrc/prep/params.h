// What the host hands to the preprocessing kernels.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fa3::prep {

constexpr int kMaxTensors = 3;

// One of q, k, v inside a launch of the row kernel.
struct RowTensor {
  char* out;  // only for the rows that a tensor store could not clip: tails of sequences in a packed batch
  int64_t out_token_bytes, out_head_bytes;
  float* descale;  // (batch, heads, blocks), NULL without quantization
  int heads;
  int rope, hadamard;
};

struct RowParams {
  CUtensorMap in[kMaxTensors], out[kMaxTensors];  // 4D: (head_dim, token, head, batch)
  RowTensor tensors[kMaxTensors];
  const float *cos, *sin;      // (positions, rotary_dim / 2)
  const float* signs;          // (head_dim), the sign bit counts; or NULL
  const int32_t* position_ids;
  const int32_t* cu_seqlens;   // NULL: dense
  int first_tile[kMaxTensors];  // tile index of the first head of each tensor; those that are absent: INT_MAX
  int num_tensors, batch, seqlen, total, positions;
  int rotary_dim, interleaved;
  int partial_neox;  // pairs (i, i + rotary_dim / 2) with rotary_dim < head_dim
  int quantize, in_fp32;
  int block_tokens;  // tokens of a work item: the scale block, or as many as share a cos/sin fill
  int blocks;        // per batch entry; packed: slots of the whole batch, some of them unused
  int items, phases, heads_per_phase, heads_total;
  int groups, group_warps;  // a group of warps owns (block, head) at a time
  int stage_in_bytes, stage_out_bytes;  // per warp
  int table_pitch;                      // bytes of one row of cos in shared memory
  int table_offset, control_offset;     // within dynamic shared memory
};

// One tensor of the elementwise rotary kernel: 16-bit or fp32 in, 16-bit out.
struct RopeTensor {
  const char* x;
  char* out;
  int64_t x_batch, x_token, x_head;  // bytes
  int64_t out_batch, out_token, out_head;
  int heads;
};

struct RopeParams {
  RopeTensor tensors[kMaxTensors];
  const float *cos, *sin;
  const int32_t* position_ids;
  const int32_t* cu_seqlens;
  int num_tensors, batch, seqlen, total, positions;
  int head_dim, rotary_dim, interleaved;
  int units;            // threads per token
  int64_t rows;         // batch * seqlen or total
  int heads_per_block;  // heads that one thread walks
  float direction;      // +1 rotate, -1 rotate back
};

int launch_rope(const RopeParams& params, int in_dtype, int out_dtype, cudaStream_t stream);

}  // namespace fa3::prep

// What the host hands to the preprocessing kernels.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fa3::prep {

constexpr int kMaxTensors = 3;

struct Rotation {
  const float *cos, *sin;  // (positions, rotary_dim / 2); NULL: no tensor is rotated
  const int32_t* position_ids;
  int positions, rotary_dim, interleaved;
  int partial_neox;  // pairs (i, i + rotary_dim / 2) with rotary_dim < head_dim
};

struct Sequences {
  const int32_t* cu_seqlens;  // NULL: dense
  int batch, seqlen, total;
};

// ---- block kernel: scale blocks of tokens -> e4m3 ----

struct BlockTensor {
  char* out;  // only for rows that a tensor store could not clip: tails of packed sequences
  int64_t out_token_bytes, out_head_bytes;
  float* descale;  // (batch, heads, blocks)
  int heads, rope, hadamard;
};

struct BlockParams {
  CUtensorMap in[kMaxTensors], out[kMaxTensors];  // 4D: (head_dim, head, token, batch)
  BlockTensor tensors[kMaxTensors];
  Rotation rotation;
  Sequences sequences;
  const float* signs;           // (head_dim), the sign bit counts; or NULL
  int first_tile[kMaxTensors];  // tile index of each tensor's first head; absent ones: INT_MAX
  int num_tensors, heads_total;
  int block_tokens;
  int blocks;         // per batch entry; packed: slots of the whole batch, some of them unused
  int items, phases;  // an item is every phases-th head of a block
  int groups, group_warps;
  int stage_in_bytes, stage_out_bytes;  // per warp
  int table_pitch;                      // bytes of one row of cos in shared memory
  int table_offset, control_offset;     // within dynamic shared memory
};

// ---- token kernel: tiles of a few tokens x many heads -> 16-bit ----

struct TokenTensor {
  int heads_log2;   // heads of a warp's tile; its tokens are the rest of the warp's rows
  int head_chunks;  // tiles over the heads
  int first_tile;   // within a token group; absent tensors: INT_MAX
  int rope, hadamard;
};

struct TokenParams {
  CUtensorMap in[kMaxTensors], out[kMaxTensors];
  TokenTensor tensors[kMaxTensors];
  Rotation rotation;
  Sequences sequences;
  const float* signs;
  int num_tensors;
  int in_fp32;
  int group_tokens_log2;  // tokens of a group: the most that a tile of any tensor has
  int groups_per_batch, tiles_per_group, tiles;
  int stages;  // input buffers per warp
  int stage_in_bytes, stage_out_bytes;
  int table_pitch, table_bytes;  // of a row; of a warp
  int warp_bytes, control_offset;
};

// ---- tile kernel: 64 rows that lie together -> 16-bit, on tensor cores ----

struct TileParams {
  CUtensorMap in[kMaxTensors], out[kMaxTensors];
  TokenTensor tensors[kMaxTensors];
  Rotation rotation;
  Sequences sequences;
  const float* signs;
  int num_tensors;
  int group_tokens_log2, groups_per_batch, tiles_per_group, tiles;  // as in TokenParams
  int stages, stage_bytes;
  int matrix_offset, control_offset;
};

// ---- rotary kernel: elementwise, 16-bit or fp32 -> 16-bit ----

struct RopeTensor {
  const char* x;
  char* out;
  int64_t x_batch, x_token, x_head;  // bytes
  int64_t out_batch, out_token, out_head;
  int heads;
};

struct RopeParams {
  RopeTensor tensors[kMaxTensors];
  Rotation rotation;
  Sequences sequences;
  int num_tensors, head_dim;
  int units;           // lanes of a head
  int lane_heads;      // heads of a warp side by side
  int heads_per_warp;  // heads that one warp walks, over the tensors
  int splits;          // warps of a token
  int sm_count;
  int64_t rows;     // batch * seqlen or total
  float direction;  // +1 rotate, -1 rotate back
};

// ---- dequantization: codes -> 16-bit ----

struct DequantizeTensor {
  const char* codes;
  char* out;
  int64_t codes_batch, codes_token, codes_head;  // bytes
  int64_t out_batch, out_token, out_head;
  const float* descale;  // (batch, heads, blocks)
  int heads;
};

struct DequantizeParams {
  DequantizeTensor tensors[kMaxTensors];
  Sequences sequences;
  int num_tensors, head_dim, block_tokens, blocks;
  int sm_count;
  int64_t rows;
};

int launch_dequantize(const DequantizeParams& params, int out_dtype, cudaStream_t stream);
int launch_rope(const RopeParams& params, int in_dtype, int out_dtype, cudaStream_t stream);

}  // namespace fa3::prep

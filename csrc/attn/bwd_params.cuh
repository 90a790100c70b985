// What the host hands to the backward kernels. Device pointers; strides in elements unless named
// _bytes.
#pragma once
#include <cuda.h>

#include "attn/bwd_ranges.h"

namespace fa3 {

// What a kernel is compiled for; each serves all that the ones before it do. A branch that never
// runs still costs: with the packed code in it, the plain loop at head dim 128 was 6 % slower.
enum BwdMode : int {
  kBwdPlain,   // dense, no bound
  kBwdCausal,  // dense, a right bound
  kBwdWindow,  // dense, both bounds
  kBwdPacked,  // packed sequences
  kBwdSoftcap,
};

// Where dK and dV of a tile go.
enum BwdEmit : int {
  kEmitRounded,  // 16 bits
  kEmitAdded,    // added to the caller's FP32; each element by one thread block
  kEmitPartial,  // FP32 sums over a share of the group's heads; bwd_sum_dkv adds the shares
};

// One output with its strides. 16-bit or FP32 as its user says.
struct GradTensor {
  void* ptr;
  int64_t stride_batch, stride_token, stride_head;
};

// Shapes that all kernels of a call share.
struct BwdShape {
  const int* cu_seqlens_q;  // (batch + 1), NULL: dense
  const int* cu_seqlens_k;
  int batch, seqlen_q, seqlen_k;  // packed: the maxima
  int heads_q, heads_k;
  int head_dim_qk, head_dim_v;
  int window_left, window_right;  // kUnbounded: none
  int row_blocks;                 // query row blocks of a head: dense of one sequence, else of all
  int all_row_blocks;             // of all heads and sequences
  float softmax_scale;
  float
      // P = exp2(scale_log2 * (score + neg_lse)); softcap: of tanh, then neg_lse is in log2 units
      scale_log2;
  float softcap_input;  // tanh(score * softcap_input), softmax_scale / softcap
};

// Statistics and accumulators in the workspace. Row block of (b, h, m): dense
// (b * heads_q + h) * row_blocks + m, packed h * row_blocks + first block of b + m.
struct BwdWorkspace {
  float*
      // [all_row_blocks][block_m]: see bwd_prepare for units; -inf: the row has no P
      neg_lse;
  float* neg_delta;  // likewise; -(rowsum(dO * O) - dLSE)
  float*
      // [all_row_blocks][fragment order]; NULL in the two-pass kernels
      dq;
  int* tile_counter;   // [2]: key tiles, query tiles
  uint64_t* dq_state;  // [all_row_blocks]: see bwd_dq.cuh
};

struct BwdKernelParams {
  CUtensorMap q, k, v, dout;   // {head dim, tokens, heads, batch}; packed: batch 1
  CUtensorMap dk_map, dv_map;  // likewise, 64 rows a box; bwd_fused with kEmitRounded only
  BwdShape shape;
  BwdWorkspace work;
  TileOrder order;        // of key tiles
  TileOrder query_order;  // two-pass kernels: of query tiles
  // (B, Sk, heads_k, D): 16-bit; FP32 to add to; or FP32 partial sums, one tensor per share of the
  // group.
  GradTensor dk, dv;
  int64_t dk_share, dv_share;  // floats from one share's partial sums to the next
  GradTensor dq;               // 16-bit, or FP32 to add to (dq_fp32)
  int heads_per_tile;          // query heads one CTA loops over: the whole group, or a share of it
  BwdEmit emit_dkv;
  int dq_fp32;
  int deterministic;  // dQ is added in tile order
  int finish_inside;  // bwd_fused rounds dQ itself
  int rotate;         // key tiles of a head start at query blocks of their own
};

// One key tile of work, as the drawing thread hands it to the other roles through shared memory.
// They hold on to the slot until they are done with the tile and read fields when needed: registers
// are what all of them lack.
struct alignas(16) KeyTile {
  int key_block;  // within its sequence; < 0: no more tiles
  int batch;      // of the tensor map and the gradients: 0 when packed
  int head_q;     // first query head
  int head_k;
  int query_begin, query_end;  // query blocks
  int query_start;             // the first one to be visited; after the last comes query_begin
  int query_row;               // first token of the sequence in q (packed), else 0
  int key_row;
  int row_block;  // first row block of the sequence
  int seqlen_q, seqlen_k;
  int share;  // which share of its group the heads are
  // dK and dV go through shared memory and TMA, which clips at the end of the tensor alone
  int staged;
  int steps;  // (query head, query block) pairs
};

// One tile of bwd_queries. row_block counts blocks of the statistics, not of the tiles.
struct alignas(16) QueryTile {
  int query_block;  // within its sequence; < 0: no more tiles
  int batch;
  int head_q, head_k;
  int key_begin, key_end;  // key blocks
  int query_row, key_row;
  int row_block;
  int seqlen_q, seqlen_k;
};

}  // namespace fa3

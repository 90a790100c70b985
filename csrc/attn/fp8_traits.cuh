// FP8 forward: parameters of the kernel, the tile table, shared memory, barriers.
#pragma once
#include <cuda.h>

#include <cstddef>

#include "attn/fp8_keys.cuh"
#include "attn/fp8_launch.h"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/layout.cuh"

namespace fa3 {

constexpr int kFp8RawKeys = 64;  // keys per stage of V as it comes from memory

struct Fp8FwdKernelParams {
  CUtensorMap q, k, v;  // e4m3 {D, tokens, heads, batch}; varlen: batch = 1
  uint8_t* out;         // 16-bit elements, strides in elements
  int64_t out_stride_batch, out_stride_token, out_stride_head;
  float* lse;              // row r of (batch, head): [(batch * heads_q + head) * lse_rows + r]
  // Index of block i of (batch, head): (batch * heads + head) * *_scale_blocks + i; varlen: batch 0,
  // plus the first block of the sequence.
  const float* q_descale;
  const float* k_descale;
  const float* v_descale;
  const int* cu_q;  // varlen, else null
  const int* cu_k;
  int* next_work;  // shared counter of the dynamic schedule (zero at launch), or null: static
  const int* work_prefix;  // varlen: tiles of one head before sequence b, [batch + 1]
  float scale_log2;        // softmax scale * log2(e)
  int batch, heads_q, heads_k, group;
  int seqlen_q, seqlen_k;  // dense
  int lse_rows, q_scale_blocks, k_scale_blocks;
  int head_dim;
  int window_left, window_right;  // unbounded: kUnboundedWindow
  int tiles_per_head, work;       // dense
  int heads_per_section;          // (batch, head) pairs whose K and V share the L2 at a time
  int out_is_fp16;
};

constexpr int kUnboundedWindow = 1 << 29;  // added to a row index it stays inside 32 bits

// What decides speed, per head dim. Measured on an H200 (docs/fp8.md). `binds`: what keeps the row
// from being larger.
struct Fp8Tile {
  int head_dim;
  int warpgroups;      // of 64 query rows
  int warpgroups_sum;  // the same where the row sum is made of scores in registers
  int value_columns;   // two levels: columns of P V that are promoted at a time
  int k_stages, raw_stages, v_stages;
};
constexpr Fp8Tile kFp8Tiles[] = {
    // d  wg sum cols  K raw Vt   binds
    {64, 4, 3, 64, 4, 6, 4},    //  registers: S 64 or P 16 + T 36, O 32 of 112
    {96, 3, 3, 96, 3, 4, 3},    //  registers: S 64 or P 16 + T 52, O 48 of 160
    {128, 3, 3, 128, 3, 4, 3},  //  registers: S 64 or P 16 + T 68, O 64 of 160
    {192, 2, 2, 192, 2, 3, 2},  //  shared memory 211 KB; registers: P 16 + T 100 + O 96 of 232
    {256, 2, 2, 128, 2, 3, 2},  //  shared memory 227 KB; registers: P 16 + T 68 + O 128 of 232
};
constexpr Fp8Tile fp8_tile(int head_dim) {
  for (const Fp8Tile& row : kFp8Tiles)
    if (row.head_dim == head_dim) return row;
  return {};
}

template <int kHeadDim_, Fp8Sums kSums_>
struct Fp8Traits {
  static constexpr Fp8Tile kTile = fp8_tile(kHeadDim_);
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kTwoLevel = kSums_ != Fp8Sums::OneLevel;
  static constexpr bool kSumByProduct = kSums_ == Fp8Sums::TwoLevel;
  static constexpr int kBlockN = kFp8BlockN;

  static constexpr int kWarpgroups = kSumByProduct ? kTile.warpgroups : kTile.warpgroups_sum;
  static constexpr int kBlockM = kWarpgroups * kWarpgroupRows;
  static constexpr int kThreads = (1 + kWarpgroups) * kWarpgroupThreads;
  static constexpr int kTransposers = 3;  // warps; the fourth of warpgroup 0 feeds TMA

  // One level: P V accumulates into O itself, in one piece. Pieces are as wide as registers allow:
  // a narrow product with A from registers takes as long as a wide one.
  static constexpr int kValueColumns = kTwoLevel ? kTile.value_columns : kHeadDim;
  static constexpr int kValueParts = kHeadDim / kValueColumns;
  // Shares of the 65,536 registers: a thread starts with 96 (4 consumers), 128 (3) or 168 (2).
  static constexpr int kProducerRegisters = kWarpgroups >= 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kWarpgroups == 4 ? 112 : kWarpgroups == 3 ? 160 : 232;

  // Rows of Q, K and V: slabs of 64 or 128 bytes. Rows of Vt: 128 keys.
  static constexpr int kWidth = kHeadDim <= 64 ? 64 : 128;
  static constexpr int kSlabs = ceil_div(kHeadDim, kWidth);
  static constexpr int kQBytes = kWarpgroupRows * kWidth * kSlabs;  // per warpgroup
  static constexpr int kKBytes = kBlockN * kWidth * kSlabs;
  static constexpr int kRawBytes = kFp8RawKeys * kWidth * kSlabs;
  // 8 more rows of Vt, the first all kFp8OnesValue: P V also yields the sum of the rounded P.
  static constexpr int kOnesRows = kSumByProduct ? 8 : 0;
  static constexpr int kLastColumns = kValueColumns + kOnesRows;  // of the last part
  static constexpr int kVtBytes = (kHeadDim + kOnesRows) * kBlockN;
  static constexpr int kOutWarpBytes = 16 * 128;  // 16 rows x 64 columns of O on their way out
  static constexpr int kOutPasses = ceil_div(kHeadDim, 64);

  static constexpr int kKStages = kTile.k_stages;
  static constexpr int kRawStages = kTile.raw_stages;
  static constexpr int kVStages = kTile.v_stages;

  static_assert(kTile.head_dim == kHeadDim, "head dim missing in kFp8Tiles");
  static_assert(kHeadDim % kValueColumns == 0 && kValueColumns % 16 == 0,
                "whole groups of 16 columns");
  static_assert(kBlockN == kFp8ScaleBlock, "one K and one V scale per step");
};

// A unit of work: one tile of query rows of one head. Written by the producer, read by everybody.
struct alignas(16) Fp8Work {
  int row0;              // first query row inside the sequence; < 0: no more work
  int len_q, len_k;      // of the sequence
  int head;              // query head
  int batch;             // coordinate of the tensor maps (varlen: 0)
  int token_q, token_k;  // first token of the sequence (dense: 0)
  int block_begin,
      block_end;         // key blocks [begin, end), visited from the right; none: begin >= end
  int scale_q, scale_k;  // index of the first descale
  int head_k;            // its key/value head
};
constexpr int kFp8WorkSlots = 2;

// {K descale, b = log2 of the V descale, 2^-b} of a K stage.
struct alignas(16) Fp8BlockScale {
  float k, bias, unbias, unused;
};

template <class T>
struct Fp8Shared {
  alignas(1024) uint8_t q[T::kWarpgroups][T::kQBytes];
  alignas(1024) uint8_t k[T::kKStages][T::kKBytes];
  alignas(1024) uint8_t raw[T::kRawStages][T::kRawBytes];
  alignas(1024) uint8_t vt[T::kVStages][T::kVtBytes];
  alignas(1024) uint8_t out[T::kWarpgroups * kWarpgroupWarps][T::kOutWarpBytes];
  Fp8Work work[kFp8WorkSlots];
  Fp8BlockScale scale[T::kKStages];
  // full: producer -> consumer; empty: consumer -> producer. Arrivals per phase: where the kernel
  // initialises them.
  uint64_t q_full[T::kWarpgroups], q_empty[T::kWarpgroups];
  uint64_t k_full[T::kKStages], k_empty[T::kKStages];
  uint64_t raw_full[T::kRawStages], raw_empty[T::kRawStages];
  uint64_t vt_full[T::kVStages], vt_empty[T::kVStages];
  uint64_t work_full[kFp8WorkSlots], work_empty[kFp8WorkSlots];
};
// Dynamic shared memory starts at a multiple of this (behind the kilobyte that the system keeps):
// swizzles count on it.
constexpr int kSharedAlignment = 1024;
template <class T>
constexpr int fp8_shared_bytes() {
  static_assert(sizeof(Fp8Shared<T>) <= kSharedBytesPerBlock, "shared memory");
  return int(sizeof(Fp8Shared<T>));
}

// Named barriers. 0 belongs to __syncthreads.
enum Fp8NamedBarrier {
  kFp8BarTurn =
      1,  // + warpgroup: its turn at the tensor cores; arrives: the one before; waits: itself
  kFp8BarTransposers =
      5,  // the three transposing warps among themselves (end of a varlen sequence)
};

}  // namespace fa3

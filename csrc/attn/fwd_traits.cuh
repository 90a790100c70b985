// Forward attention: the tile table, the traits made from a row of it, shared memory, parameters.
#pragma once
#include <cuda.h>

#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/layout.cuh"
#include "tile/mask.cuh"
#include "tile/softmax.cuh"

namespace fa3 {

// ---- the tile table --------------------------------------------------------------------------
// One row per head-dim bucket; other head dims run in the next bucket, where TMA fills the missing
// columns with zeros and clips them on the way out. Registers per thread: S block_n / 2, P block_n
// / 4, O dim_v / 2 (+ 4); at 240 registers 208 of them can be live through the matrix products, at
// 160 (three consumers) 128.
struct FwdTile {
  int dim_qk, dim_v;  // bucket
  int consumers;      // warpgroups of 64 query rows
  int block_n;        // keys per block
  bool stage_o;       // own shared-memory buffer for O: stored by TMA while the next tile runs
  bool ones;  // row sums by columns of ones beside V: eight more columns of O, one more slab of V
  int head_start;       // exponentials of a block that do not wait for its maxima
  bool always_rescale;  // O follows the maxima in every block, or only where one of a warp grew
};
constexpr FwdTile kFwdTiles[] = {
    // dims       wgs  keys  stage  ones   head  rescale   shared memory  live     what binds
    {64, 64, 3, 128, true, true, 8, true},        //  144 KB  140/128  registers
    {96, 96, 2, 128, true, false, 20, true},      //  192 KB  164/208  96 columns: two slabs of 64
    {128, 128, 2, 128, true, true, 20, true},     //  224 KB  184/208  shared memory
    {192, 128, 2, 112, true, false, 20, true},    //  220 KB  168/208  shared memory
    {192, 192, 2, 96, false, false, 8, false},    //  192 KB  176/208  shared memory
    {256, 256, 2, 64, false, false, 8, false},    //  192 KB  184/208  shared memory
};
constexpr int kFwdTileCount = sizeof(kFwdTiles) / sizeof(kFwdTiles[0]);

// ---- how a kernel works: the default, and what the ablations switch off
// --------------------------
struct FwdDefault {
  static constexpr int kStages = 2;               // of K and of V
  static constexpr bool kWarpSpecialized = true;  // a producer warp issues the TMA copies
  static constexpr bool kOverlap =
      true;  // S of the next block is computed beside the softmax of this one
  static constexpr bool kPingPong = true;    // warpgroups take turns on the tensor cores
  static constexpr bool kReallocate = true;  // setmaxnreg
};

// ---- parameters ------------------------------------------------------------------------------
struct FwdParams {
  CUtensorMap q, k, v,
      out;  // 4D {columns, tokens, heads, batch}; varlen: batch 1, tokens of all sequences
  void* out_ptr;
  float* lse;
  const int32_t* cu_seqlens_q;  // varlen, else null
  const int32_t* cu_seqlens_k;
  const float* sink;        // (heads_q) or null
  int* tile_counter;        // dynamic schedule: next tile; null: static schedule
  const int* varlen_order;  // varlen: {tiles, order[batch], first[batch + 1]}, see fwd_varlen.cuh
  int64_t out_stride_batch, out_stride_token, out_stride_head;  // elements
  int batch, heads_q, group;                                    // group: query heads per KV head
  int seqlen_q, seqlen_k;                                       // dense lengths
  int total_q;                                                  // varlen: row pitch of lse
  int window_left, window_right;                                // Mask::Window; -1: unbounded
  int dim_v;                                                    // columns of out that exist
  int tiles_per_head, num_tiles;                                // dense
  int section;           // query heads that are scheduled together (varlen: computed per sequence)
  int l2_bytes;          // budget of a section
  float exponent_scale;  // c: scores to log2 units (softcap: of the capped score)
  float softcap_scale;   // scale / softcap: what tanh is taken of
};

// ---- traits ----------------------------------------------------------------------------------
template <class Elem_, int kTileIndex, Mask kMask_, bool kSoftcap_, class Options = FwdDefault>
struct FwdTraits : Options {
  using Elem = Elem_;
  static constexpr FwdTile kTile = kFwdTiles[kTileIndex];
  static constexpr int kDimQK = kTile.dim_qk, kDimV = kTile.dim_v;
  static constexpr Mask kMask = kMask_;
  static constexpr bool kSoftcap = kSoftcap_;
  static constexpr int kConsumers = kTile.consumers;
  static constexpr RowSum kRowSum = kTile.ones ? RowSum::Ones : RowSum::Float;
  // Without setmaxnreg a thread has 168 registers (384 threads): a full block of S, P and O does
  // not fit.
  static constexpr int BLOCK_N = Options::kReallocate ? kTile.block_n : kTile.block_n / 2;
  static constexpr int kHeadStart =  // at most the columns of a row in a thread
      kTile.head_start < BLOCK_N / 4 ? kTile.head_start : BLOCK_N / 4;
  static constexpr int BLOCK_M = kConsumers * kWarpgroupRows;
  static constexpr bool kStageO = kTile.stage_o;
  static constexpr int kProducerWarpgroups = Options::kWarpSpecialized ? 1 : 0;
  static constexpr int kThreads = (kProducerWarpgroups + kConsumers) * kWarpgroupThreads;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;
  static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kWarpgroupThreads <= 65536,
                "registers");

  static constexpr int kSlab = 64;  // columns of a 128-byte slab of 16-bit elements
  static constexpr int kSlabsQK = ceil_div(kDimQK, kSlab), kSlabsV = ceil_div(kDimV, kSlab);
  static constexpr int kQBytes = kWarpgroupRows * kSlabsQK * 128;  // of one warpgroup
  static constexpr int kOBytes = kWarpgroupRows * kSlabsV * 128;
  static constexpr int kKBytes = BLOCK_N * kSlabsQK * 128,
                       kVBytes = BLOCK_N * kSlabsV * 128;  // of one stage
  // RowSum::Ones: V has eight more columns, all ones, in a slab of their own that TMA never writes.
  static constexpr bool kOnes = kTile.ones;
  static constexpr int kColumnsV = kDimV + (kOnes ? 8 : 0);
  static constexpr int kVStride = kVBytes + (kOnes ? BLOCK_N * 128 : 0);
  static_assert(!kOnes || kDimV % kSlab == 0, "the ones follow the last full slab");
  static_assert(BLOCK_N % 16 == 0, "k-steps of P V; swizzle atoms of 8 rows");
  static_assert(kDimQK % 16 == 0 && kDimV % 8 == 0 && kDimV <= 256,
                "k-steps of Q K; columns of P V");

  // A tile in flight, as the scheduler publishes it.
  struct Tile {
    int m;  // query tile of the sequence; < 0: no more work
    int head, batch;
    int seqlen_q, seqlen_k;  // of this sequence
    int start_q, start_k;    // first token (0 when dense)
    int unused;
    BlockRange blocks;  // key blocks to visit
    int64_t lse_row;    // index in lse of row 0 of the sequence and head
  };
  static_assert(sizeof(Tile) == 48, "three 16-byte words");
  static constexpr int kTileRing = 2;

  struct alignas(1024) Shared {
    alignas(1024) uint8_t q[kConsumers][kQBytes];
    alignas(1024) uint8_t k[Options::kStages][kKBytes];
    alignas(1024) uint8_t v[Options::kStages][kVStride];
    alignas(1024) uint8_t o[kStageO ? kConsumers : 1][kStageO ? kOBytes : 16];
    alignas(16) Tile tiles[kTileRing];
    uint64_t q_full[kConsumers], q_empty[kConsumers];
    uint64_t k_full[Options::kStages], k_empty[Options::kStages];
    uint64_t v_full[Options::kStages], v_empty[Options::kStages];
    uint64_t tile_full[kTileRing], tile_empty[kTileRing];
    uint64_t draw;  // the producer is about to run out of work
  };
  static_assert(sizeof(Shared) <= kSharedBytesPerBlock, "shared memory of one block");
};

}  // namespace fa3

// How one backward call is carried out: tiles, who sums dK and dV, the layout of the workspace.
// Pure host arithmetic on the parameters, shared by the workspace query and the launch.
#pragma once
#include "attn/bwd_ranges.h"
#include "fa3_train.h"

namespace fa3 {

// fa3_attn_bwd_params::options
enum BwdOption : int { kBwdWholeGroup = 1, kBwdHeadByHead = 2 };

constexpr int kBwdQueryTile = 128;  // rows of a tile of the second pass

struct BwdPlan {
  // Kernel: the head-dim bucket, one or two passes over the scores.
  int head_dim_qk, head_dim_v;  // of the bucket
  bool two_pass;
  BlockShape blocks;
  bool window;                    // a bound that can hide something
  int window_left, window_right;  // kUnbounded where it cannot
  // Query heads of a group that one thread block loops over, and how many such shares a group has.
  // More than one share: FP32 partial sums in the workspace, which bwd_sum_dkv adds up.
  int heads_per_tile, shares;
  int row_blocks, all_row_blocks;  // as in BwdShape
  TileOrder order;        // key tiles
  TileOrder query_order;  // query tiles of the second pass
  // Workspace: byte offsets. [zero, zero + zero_bytes) must be zero when the main kernel starts.
  int64_t dq, neg_lse, neg_delta, sink_parts;
  int64_t dk_parts, dv_parts;
  int64_t zero, tile_counter, dq_state;
  bool finish_inside, rotate;  // as in BwdKernelParams
  int64_t zero_bytes, bytes;
};

// Checks everything that needs no device and fills the plan. `function` is named in messages.
int plan_bwd(const char* function, const fa3_attn_bwd_params& a, int sm_count, BwdPlan* plan);

struct BwdCall {
  const fa3_attn_bwd_params* params;
  BwdPlan plan;
  int sm_count;
};

// One per (bucket, type), in a translation unit of its own.
template <int kHeadDim, class Elem>
int launch_bwd_fused(const BwdCall& call);
template <int kHeadDimQK, int kHeadDimV, class Elem>
int launch_bwd_two_pass(const BwdCall& call);

}  // namespace fa3

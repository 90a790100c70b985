#include <cmath>

#include "attn/bwd_plan.h"
#include "host.h"

namespace fa3 {
namespace {

int64_t aligned(int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}

int check_shape(const char* f, const fa3_attn_bwd_params& a) {
  if (a.dtype != FA3_BF16 && a.dtype != FA3_FP16)
    return fail(FA3_INVALID_ARGUMENT, "%s: dtype must be bf16 (0) or fp16 (1), got %d", f, a.dtype);
  const struct {
    const char* name;
    int value, least;
  } sizes[] = {{"batch", a.batch, 0},     {"seqlen_q", a.seqlen_q, 0}, {"seqlen_k", a.seqlen_k, 0},
               {"total_q", a.total_q, 0}, {"total_k", a.total_k, 0},   {"heads_q", a.heads_q, 1},
               {"heads_k", a.heads_k, 1}};
  for (const auto& s : sizes)
    if (s.value < s.least || s.value > kMaxTokens)
      return fail(FA3_INVALID_ARGUMENT, "%s: %s must be in [%d, %d], got %d", f, s.name, s.least,
                  kMaxTokens, s.value);
  if (a.heads_q % a.heads_k != 0)
    return fail(FA3_INVALID_ARGUMENT, "%s: heads_q must be a multiple of heads_k, got %d and %d", f,
                a.heads_q, a.heads_k);
  for (const int d : {a.head_dim_qk, a.head_dim_v})
    if (d < 8 || d > 256 || d % 8 != 0)
      return fail(FA3_INVALID_ARGUMENT,
                  "%s: head dims must be multiples of 8 in [8, 256], got qk %d, v %d", f,
                  a.head_dim_qk, a.head_dim_v);
  if (!std::isfinite(a.softmax_scale) || a.softmax_scale <= 0.f)
    return fail(FA3_INVALID_ARGUMENT, "%s: softmax_scale must be finite and positive, got %g", f,
                a.softmax_scale);
  if (!std::isfinite(a.softcap) || a.softcap < 0.f)
    return fail(FA3_INVALID_ARGUMENT, "%s: softcap must be finite and >= 0 (0: none), got %g", f,
                a.softcap);
  if (a.window_left < -1 || a.window_right < -1)
    return fail(FA3_INVALID_ARGUMENT,
                "%s: window sides must be >= -1 (-1: unbounded), got left %d, right %d", f,
                a.window_left, a.window_right);
  if ((a.cu_seqlens_q == nullptr) != (a.cu_seqlens_k == nullptr))
    return fail(FA3_INVALID_ARGUMENT,
                "%s: cu_seqlens_q and cu_seqlens_k must both be given or both be NULL", f);
  if (a.deterministic != 0 && a.deterministic != 1)
    return fail(FA3_INVALID_ARGUMENT, "%s: deterministic must be 0 or 1, got %d", f,
                a.deterministic);
  if (a.options & ~(kBwdWholeGroup | kBwdHeadByHead) ||
      a.options == (kBwdWholeGroup | kBwdHeadByHead))
    return fail(FA3_INVALID_ARGUMENT,
                "%s: options must be 0, 1 (one block per group) or 2 (one per head), got %d", f,
                a.options);
  return FA3_OK;
}

// Buckets. `max_qk` and `max_v` are what the tile holds; smaller head dims load zeros and store no
// padding.
struct Bucket {
  int max_qk, max_v;
  bool two_pass;
  BlockShape blocks;
};
constexpr Bucket kBuckets[] = {
    {64, 64, false, {128, 128}}, {96, 96, false, {64, 128}}, {128, 128, false, {64, 128}},
    {192, 128, true, {80, 64}},  {192, 192, true, {64, 64}}, {256, 256, true, {48, 64}},
};

}  // namespace

int plan_bwd(const char* f, const fa3_attn_bwd_params& a, int sm_count, BwdPlan* plan) {
  FA3_TRY(check_shape(f, a));
  BwdPlan p{};
  const Bucket* bucket = nullptr;
  for (const Bucket& b : kBuckets)
    if (bucket == nullptr && a.head_dim_qk <= b.max_qk && a.head_dim_v <= b.max_v) bucket = &b;
  if (bucket == nullptr)
    return fail(FA3_UNSUPPORTED,
                "%s: no backward kernel for head dims qk %d, v %d in this build (largest: %d, %d)",
                f, a.head_dim_qk, a.head_dim_v,
                kBuckets[sizeof(kBuckets) / sizeof(Bucket) - 1].max_qk,
                kBuckets[sizeof(kBuckets) / sizeof(Bucket) - 1].max_v);
  p.head_dim_qk = bucket->max_qk;
  p.head_dim_v = bucket->max_v;
  p.two_pass = bucket->two_pass;
  p.blocks = bucket->blocks;

  // A bound that hides nothing costs nothing: row i sees up to i + Sk - Sq + right, all keys once
  // right >= Sq - 1.
  const bool packed = a.cu_seqlens_q != nullptr;
  p.window_right =
      a.window_right < 0 || a.window_right >= a.seqlen_q - 1 ? kUnbounded : a.window_right;
  p.window_left = a.window_left < 0 || a.window_left >= a.seqlen_k - 1 ? kUnbounded : a.window_left;
  p.window = p.window_right != kUnbounded || p.window_left != kUnbounded;

  const int block_m = p.blocks.block_m, block_n = p.blocks.block_n;
  p.row_blocks =
      packed ? packed_blocks(a.total_q, a.batch, block_m) : ceil_div(a.seqlen_q, block_m);
  const int64_t rows = int64_t(a.heads_q) * p.row_blocks * (packed ? 1 : a.batch);
  const int key_blocks =
      packed ? packed_blocks(a.total_k, a.batch, block_n) : ceil_div(a.seqlen_k, block_n);
  const int batch_tiles = packed ? key_blocks : key_blocks * a.batch;

  // A thread block per whole group loads K and V once and writes dK and dV once, but where there
  // are few groups the last thread blocks run alone. Then a group is divided into the fewest shares
  // that give enough tiles.
  constexpr int kTilesPerSM = 3;
  const int group = a.heads_q / a.heads_k;
  p.shares = a.options == kBwdHeadByHead ? group : 1;
  if (a.options == 0)
    while (p.shares < group &&
           int64_t(batch_tiles) * a.heads_k * p.shares < int64_t(kTilesPerSM) * sm_count)
      do ++p.shares;
      while (group % p.shares != 0);
  p.heads_per_tile = group / p.shares;

  // Heads whose Q, dO and dQ sums share L2. Without a window all tiles are equally long, and one
  // head at a time keeps the fewest bytes in use.
  constexpr int64_t kSectionBytes = int64_t(40) << 20;
  const int shares_of_heads = a.heads_q / p.heads_per_tile;
  p.order.num_heads = packed ? shares_of_heads : shares_of_heads * a.batch;
  p.order.num_key_blocks = key_blocks;
  p.order.section = 1;
  const int64_t head_bytes = int64_t(a.seqlen_q) * (6 * p.head_dim_qk + 2 * p.head_dim_v);
  if (p.window && !packed)
    while (p.order.section * 2 * head_bytes <= kSectionBytes &&
           p.order.section * 2 <= p.order.num_heads)
      p.order.section *= 2;
  if (p.two_pass) {
    // K and V of the heads in a section share L2. Later queries see more keys: longest first is
    // descending.
    TileOrder& q = p.query_order;
    q.num_heads = packed ? a.heads_q : a.heads_q * a.batch;
    q.num_key_blocks = packed ? packed_blocks(a.total_q, a.batch, kBwdQueryTile)
                              : ceil_div(a.seqlen_q, kBwdQueryTile);
    q.section = 1;
    q.descending = p.window_right != kUnbounded;
    const int64_t kv_bytes = int64_t(a.seqlen_k) * 2 * (p.head_dim_qk + p.head_dim_v);
    while (p.window && !packed && (q.section * 2 + group - 1) / group * kv_bytes <= kSectionBytes &&
           q.section * 2 <= q.num_heads)
      q.section *= 2;
  }
  // In-order sums: with a right bound a tile meets its first query blocks long before the tiles of
  // lower keys do.
  p.order.descending = a.deterministic && !p.two_pass && p.window_right != kUnbounded;
  // bwd_fused finishes dQ itself where that pays: the smaller the part of its own work, the more a
  // kernel before it that clears the sums and one after it that rounds them weigh. Measured (H100,
  // docs/backward.md), by the queries that a tile walks over, all its heads counted: up to 2,048
  // gain 2 to 20 %, 4,096 is a draw, from 8,192 the account of arrivals costs 0 to 5 %.
  constexpr int64_t kLongWalk = 4096;
  int64_t walk = packed ? a.total_q / (a.batch > 0 ? a.batch : 1) : a.seqlen_q;
  if (p.window_left != kUnbounded && p.window_right != kUnbounded) {
    const int64_t seen = int64_t(p.window_left) + p.window_right + block_n;
    walk = seen < walk ? seen : walk;
  } else if (p.window) {
    walk /= 2;
  }
  p.finish_inside = !p.two_pass && walk * p.heads_per_tile <= kLongWalk;
  p.rotate = p.finish_inside && !a.deterministic && !p.window;
  if (int64_t(p.order.num_heads) * p.order.num_key_blocks > (int64_t(1) << 30) ||
      rows > (int64_t(1) << 30))
    return fail(FA3_UNSUPPORTED,
                "%s: more than 2^30 blocks (batch %d, heads_q %d, seqlen_q %d, seqlen_k %d)", f,
                a.batch, a.heads_q, a.seqlen_q, a.seqlen_k);

  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t begin = at;
    at += aligned(bytes);
    return begin;
  };
  p.dq = take(p.two_pass ? 0 : rows * block_m * p.head_dim_qk * 4);
  p.neg_lse = take(rows * block_m * 4);
  p.neg_delta = take(rows * block_m * 4);
  p.sink_parts = take(a.sink != nullptr ? rows * 4 : 0);
  const int64_t key_rows =
      (packed ? int64_t(a.total_k) : int64_t(a.batch) * a.seqlen_k) * a.heads_k;
  p.dk_parts = take(p.shares > 1 ? p.shares * key_rows * a.head_dim_qk * 4 : 0);
  p.dv_parts = take(p.shares > 1 ? p.shares * key_rows * a.head_dim_v * 4 : 0);
  p.dq_state = take(p.two_pass ? 0 : rows * 8);
  p.zero = at;
  p.tile_counter = take(2 * sizeof(int));
  p.zero_bytes = at - p.zero;
  p.bytes = at;
  p.all_row_blocks = int(rows);
  *plan = p;
  return FA3_OK;
}

}  // namespace fa3

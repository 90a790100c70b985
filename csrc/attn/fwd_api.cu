// fa3_attn_fwd: check, choose the variant, launch.
#include <cmath>

#include "attn/fwd_launch.h"
#include "attn/fwd_varlen.cuh"
#include "tile/scheduler.cuh"

namespace fa3 {
namespace {

constexpr const char* kName = "fa3_attn_fwd";
constexpr int kDimMultiple = 8, kMaxDim = 256;
constexpr int64_t kCounterBytes = 16;
// K and V of the heads worked on together: what a 50 MB L2 keeps while Q and O stream through it.
constexpr int kSectionBytes = 32 << 20;
constexpr int kKnownOptions = FA3_OPT_NO_WARP_SPECIALIZATION | FA3_OPT_NO_OVERLAP |
                              FA3_OPT_NO_PINGPONG | FA3_OPT_NO_REG_REALLOC | FA3_OPT_NOT_PERSISTENT;

int check_dim(const char* name, int dim) {
  if (dim >= kDimMultiple && dim <= kMaxDim && dim % kDimMultiple == 0) return FA3_OK;
  return fail(FA3_UNSUPPORTED, "%s: %s must be a multiple of %d from %d to %d, got %d", kName, name,
              kDimMultiple, kDimMultiple, kMaxDim, dim);
}

int check_at_least(const char* name, int value, int least) {
  if (value >= least) return FA3_OK;
  return fail(FA3_INVALID_ARGUMENT, "%s: %s must be at least %d, got %d", kName, name, least,
              value);
}

int check_shapes(const fa3_attn_fwd_params& a) {
  FA3_TRY(check_at_least("batch", a.batch, 0));
  FA3_TRY(check_at_least("seqlen_q", a.seqlen_q, 0));
  FA3_TRY(check_at_least("seqlen_k", a.seqlen_k, 0));
  FA3_TRY(check_at_least("heads_q", a.heads_q, 1));
  FA3_TRY(check_at_least("heads_k", a.heads_k, 1));
  if (a.heads_q % a.heads_k != 0)
    return fail(FA3_INVALID_ARGUMENT, "%s: heads_q must be a multiple of heads_k, got %d and %d",
                kName, a.heads_q, a.heads_k);
  FA3_TRY(check_dim("head_dim_qk", a.head_dim_qk));
  FA3_TRY(check_dim("head_dim_v", a.head_dim_v));
  if (a.dtype != FA3_BF16 && a.dtype != FA3_FP16)
    return fail(FA3_UNSUPPORTED, "%s: dtype must be bf16 (%d) or fp16 (%d), got %d", kName,
                FA3_BF16, FA3_FP16, a.dtype);
  if (!(a.softmax_scale > 0.f) || std::isinf(a.softmax_scale))
    return fail(FA3_INVALID_ARGUMENT, "%s: softmax_scale must be positive and finite, got %g",
                kName, static_cast<double>(a.softmax_scale));
  if (!(a.softcap >= 0.f) || std::isinf(a.softcap))
    return fail(FA3_INVALID_ARGUMENT, "%s: softcap must be 0 (none) or positive and finite, got %g",
                kName, static_cast<double>(a.softcap));
  if ((a.cu_seqlens_q == nullptr) != (a.cu_seqlens_k == nullptr))
    return fail(FA3_INVALID_ARGUMENT,
                "%s: cu_seqlens_q and cu_seqlens_k must be given together, got %s only", kName,
                a.cu_seqlens_q ? "cu_seqlens_q" : "cu_seqlens_k");
  if (a.cu_seqlens_q != nullptr) {
    FA3_TRY(check_at_least("total_q", a.total_q, 0));
    FA3_TRY(check_at_least("total_k", a.total_k, 0));
    FA3_TRY(check_pointer(kName, "cu_seqlens_q", a.cu_seqlens_q, 4));
    FA3_TRY(check_pointer(kName, "cu_seqlens_k", a.cu_seqlens_k, 4));
  }
  if (a.options & ~kKnownOptions)
    return fail(FA3_UNSUPPORTED, "%s: options has unknown bits 0x%x", kName,
                a.options & ~kKnownOptions);
  return FA3_OK;
}

int check_tensors(const fa3_attn_fwd_params& a) {
  const bool varlen = a.cu_seqlens_q != nullptr;
  const int64_t batch = varlen ? 1 : a.batch;
  const int64_t rows_q = varlen ? a.total_q : a.seqlen_q, rows_k = varlen ? a.total_k : a.seqlen_k;
  FA3_TRY(check_tensor(kName, "q", a.q, a.dtype, batch, rows_q, a.heads_q, a.head_dim_qk));
  FA3_TRY(check_tensor(kName, "k", a.k, a.dtype, batch, rows_k, a.heads_k, a.head_dim_qk));
  FA3_TRY(check_tensor(kName, "v", a.v, a.dtype, batch, rows_k, a.heads_k, a.head_dim_v));
  FA3_TRY(check_tensor(kName, "out", a.out, a.dtype, batch, rows_q, a.heads_q, a.head_dim_v));
  FA3_TRY(check_pointer(kName, "lse", a.lse, 4));
  if (a.sink != nullptr) FA3_TRY(check_pointer(kName, "sink", a.sink, 4));
  return FA3_OK;
}

int64_t workspace_bytes(const fa3_attn_fwd_params& a) {
  return kCounterBytes + (a.cu_seqlens_q ? round_up(4 * varlen_order_ints(a.batch), 16) : 0);
}

// Index into kFwdTiles: the smallest bucket that holds both dims.
int choose_tile(const fa3_attn_fwd_params& a) {
  int index = 0;
  while (kFwdTiles[index].dim_qk < a.head_dim_qk || kFwdTiles[index].dim_v < a.head_dim_v) ++index;
  return index;
}

template <class Elem, int kIndex = 0>
int launch_tile(int index, FwdLaunch& launch) {
  if constexpr (kIndex < kFwdTileCount)
    return index == kIndex ? launch_fwd<Elem, kIndex>(launch)
                           : launch_tile<Elem, kIndex + 1>(index, launch);
  return fail(FA3_INTERNAL, "%s: tile %d does not exist", kName, index);
}

// Bottom-right alignment: a side that reaches past the sequence for every row is no bound.
void choose_mask(const fa3_attn_fwd_params& a, FwdLaunch& launch) {
  const int left = a.window_left >= a.seqlen_k - 1 ? -1 : a.window_left;
  const int right = a.window_right >= a.seqlen_q - 1 && a.window_right > 0 ? -1 : a.window_right;
  launch.kernel.window_left = left < 0 ? -1 : left;
  launch.kernel.window_right = right < 0 ? -1 : right;
  launch.mask = left >= 0 || right > 0 ? Mask::Window : right == 0 ? Mask::Causal : Mask::None;
}

}  // namespace

int encode_fwd_maps(FwdLaunch& launch, int block_n) {
  const fa3_attn_fwd_params& a = *launch.call;
  const bool varlen = a.cu_seqlens_q != nullptr;
  const int64_t batch = varlen ? 1 : a.batch;
  const auto encode = [&](CUtensorMap* map, const char* name, const fa3_tensor& x, int64_t rows,
                          int heads, int dim, int box_rows) {
    const int64_t at_least_one_row =
        rows > 0 ? rows : 1;  // a map of no rows is an error even if nothing uses it
    const void* base = rows > 0 ? x.ptr : a.q.ptr;
    const TensorMapShape shape = {4,
                                  {dim, at_least_one_row, heads, batch},
                                  {x.stride_token * 2, x.stride_head * 2, x.stride_batch * 2},
                                  {64, box_rows, 1, 1},
                                  128};
    return encode_tensor_map(map, name, a.dtype, base, shape);
  };
  const int64_t rows_q = varlen ? a.total_q : a.seqlen_q, rows_k = varlen ? a.total_k : a.seqlen_k;
  FA3_TRY(encode(&launch.kernel.q, "q", a.q, rows_q, a.heads_q, a.head_dim_qk, kWarpgroupRows));
  FA3_TRY(encode(&launch.kernel.k, "k", a.k, rows_k, a.heads_k, a.head_dim_qk, block_n));
  FA3_TRY(encode(&launch.kernel.v, "v", a.v, rows_k, a.heads_k, a.head_dim_v, block_n));
  return encode(&launch.kernel.out, "out", a.out, rows_q, a.heads_q, a.head_dim_v, kWarpgroupRows);
}

}  // namespace fa3

using namespace fa3;

extern "C" int64_t fa3_attn_fwd_workspace(const fa3_attn_fwd_params* params) {
  if (params == nullptr)
    return fail(FA3_INVALID_ARGUMENT, "fa3_attn_fwd_workspace: params is NULL"), -1;
  if (check_shapes(*params) != FA3_OK) return -1;
  return workspace_bytes(*params);
}

extern "C" int fa3_attn_fwd(const fa3_attn_fwd_params* params) {
  if (params == nullptr) return fail(FA3_INVALID_ARGUMENT, "%s: params is NULL", kName);
  const fa3_attn_fwd_params& a = *params;
  FA3_TRY(check_shapes(a));
  const bool varlen = a.cu_seqlens_q != nullptr;
  if (a.batch == 0 || (varlen ? a.total_q : a.seqlen_q) == 0) return FA3_OK;
  FA3_TRY(check_tensors(a));
  FA3_TRY(check_workspace(kName, a.workspace, a.workspace_bytes, workspace_bytes(a), 16));
  Device device;
  FA3_TRY(current_device(kName, &device));

  FwdLaunch launch{};
  launch.call = params;
  launch.softcap = a.softcap > 0.f;
  launch.options = a.options & ~FA3_OPT_NOT_PERSISTENT;
  choose_mask(a, launch);
  const int tile_index = choose_tile(a);
  const FwdTile tile = kFwdTiles[tile_index];
  if (launch.options != 0 && (tile.dim_qk != 128 || tile.dim_v != 128 || a.dtype != FA3_BF16 ||
                              varlen || launch.softcap || launch.mask == Mask::Window))
    return fail(FA3_UNSUPPORTED,
                "%s: options 0x%x serve ablations only: dense bf16, head dims up to 128 (above "
                "96), no window, no "
                "softcap; got %s, dims %d and %d",
                kName, launch.options, dtype_name(a.dtype), a.head_dim_qk, a.head_dim_v);

  constexpr float kLog2e = 1.4426950408889634f;
  const int block_m = tile.consumers * kWarpgroupRows;
  FwdParams& p = launch.kernel;
  p.out_ptr = a.out.ptr;
  p.lse = a.lse;
  p.cu_seqlens_q = a.cu_seqlens_q;
  p.cu_seqlens_k = a.cu_seqlens_k;
  p.sink = a.sink;
  p.out_stride_batch = a.out.stride_batch;
  p.out_stride_token = a.out.stride_token;
  p.out_stride_head = a.out.stride_head;
  p.batch = a.batch;
  p.heads_q = a.heads_q;
  p.group = a.heads_q / a.heads_k;
  p.seqlen_q = a.seqlen_q;
  p.seqlen_k = a.seqlen_k;
  p.total_q = a.total_q;
  p.dim_v = a.head_dim_v;
  p.exponent_scale = (launch.softcap ? a.softcap : a.softmax_scale) * kLog2e;
  p.softcap_scale = launch.softcap ? a.softmax_scale / a.softcap : 0.f;
  p.l2_bytes = kSectionBytes;

  int64_t tiles;  // dense: exact; varlen: at most
  auto stream = static_cast<cudaStream_t>(a.stream);
  int* counter = static_cast<int*>(a.workspace);
  if (varlen) {
    int* order = counter + kCounterBytes / sizeof(int);
    tiles = (int64_t(a.total_q) / block_m + a.batch) * a.heads_q;
    p.varlen_order = order;
    p.tile_counter = counter;
    FA3_TRY(make_varlen_order(a.cu_seqlens_q, a.cu_seqlens_k, a.batch, a.heads_q, block_m, order,
                              counter, stream));
  } else {
    p.tiles_per_head = ceil_div(a.seqlen_q, block_m);
    tiles = int64_t(p.tiles_per_head) * a.heads_q * a.batch;
    // Full tiles cost the same: head after head. Otherwise longest first within what L2 holds.
    const int64_t kv_bytes = int64_t(a.seqlen_k) * (a.head_dim_qk + a.head_dim_v) * 2;
    p.section = launch.mask == Mask::None ? 1 : heads_per_section(kv_bytes, p.group, kSectionBytes);
    if (launch.mask != Mask::None && tiles > device.sm_count) {
      p.tile_counter = counter;
      FA3_TRY(check_cuda(cudaMemsetAsync(counter, 0, sizeof(int), stream),
                         "fa3_attn_fwd: clearing the counter"));
    }
  }
  if (tiles > INT32_MAX / 2)
    return fail(FA3_UNSUPPORTED, "%s: %lld query tiles, at most %d", kName,
                static_cast<long long>(tiles), INT32_MAX / 2);
  p.num_tiles = static_cast<int>(tiles);
  launch.grid = p.num_tiles;
  if (a.options & FA3_OPT_NOT_PERSISTENT)
    p.tile_counter = nullptr;
  else if (launch.grid > device.sm_count)
    launch.grid = device.sm_count;
  if (launch.options != 0) {
    p.tile_counter = launch.options == FA3_OPT_NO_WARP_SPECIALIZATION ? nullptr : p.tile_counter;
    return launch_fwd_ablation(launch);
  }
  return a.dtype == FA3_BF16 ? launch_tile<bf16>(tile_index, launch)
                             : launch_tile<fp16>(tile_index, launch);
}

// Launches of the backward: fills kernel parameters from the plan, encodes tensor maps, chains the
// kernels. Included by the instantiation units only (csrc/attn/bwd.instances.cmake).
#pragma once
#include "attn/bwd_around.cuh"
#include "attn/bwd_fused.cuh"
#include "attn/bwd_keys.cuh"
#include "attn/bwd_plan.h"
#include "attn/bwd_queries.cuh"
#include "host.h"

namespace fa3 {

// `early`: the kernel may start before the one before it has ended, and calls grid_dependency_wait
// itself.
template <class Params>
int launch_kernel(void (*kernel)(Params), const Params& params, dim3 grid, int threads,
                  int shared_bytes, cudaStream_t stream, bool early, const char* name) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return FA3_OK;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  void* arguments[] = {const_cast<Params*>(&params)};
  return check_cuda(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments),
                    name);
}

inline GradTensor grad_tensor(const fa3_tensor& t) {
  return {t.ptr, t.stride_batch, t.stride_token, t.stride_head};
}

// {head dim, tokens, heads, batch}, boxes of 64 columns x rows. An empty tensor gets a map of one
// row that nobody loads: `filler` is any valid device address.
inline int encode_token_map(CUtensorMap* map, const char* name, const fa3_tensor& t, int dtype,
                            int64_t head_dim, int64_t tokens, int64_t heads, int64_t batch,
                            int rows, const void* filler) {
  TensorMapShape shape{};
  shape.rank = 4;
  const int64_t dims[4] = {head_dim, tokens > 0 ? tokens : 1, heads, batch};
  const int64_t strides[3] = {t.stride_token * 2, t.stride_head * 2, t.stride_batch * 2};
  const int box[4] = {kSlabCols, rows, 1, 1};
  for (int i = 0; i < 4; ++i) shape.dims[i] = dims[i], shape.box[i] = box[i];
  for (int i = 0; i < 3; ++i) shape.strides_bytes[i] = strides[i];
  shape.swizzle_bytes = 128;
  return encode_tensor_map(map, name, dtype, tokens > 0 ? t.ptr : filler, shape);
}

struct BwdLaunch {
  BwdKernelParams main;
  BwdAroundParams around;
  cudaStream_t stream;
  dim3 row_grid;  // of the kernels around: (query blocks, heads, batch)
};

// The four inputs in boxes of block_m queries and block_n keys.
inline int encode_maps(const BwdCall& call, BlockShape blocks, BwdKernelParams* p) {
  const fa3_attn_bwd_params& a = *call.params;
  const bool packed = a.cu_seqlens_q != nullptr;
  const int64_t batch = packed ? 1 : a.batch;
  const int64_t q_tokens = packed ? a.total_q : a.seqlen_q,
                k_tokens = packed ? a.total_k : a.seqlen_k;
  const int m = blocks.block_m, n = blocks.block_n;
  FA3_TRY(encode_token_map(&p->q, "q", a.q, a.dtype, a.head_dim_qk, q_tokens, a.heads_q, batch, m,
                           a.workspace));
  FA3_TRY(encode_token_map(&p->dout, "dout", a.dout, a.dtype, a.head_dim_v, q_tokens, a.heads_q,
                           batch, m, a.workspace));
  FA3_TRY(encode_token_map(&p->k, "k", a.k, a.dtype, a.head_dim_qk, k_tokens, a.heads_k, batch, n,
                           a.workspace));
  return encode_token_map(&p->v, "v", a.v, a.dtype, a.head_dim_v, k_tokens, a.heads_k, batch, n,
                          a.workspace);
}

inline int prepare_launch(const BwdCall& call, BwdLaunch* launch) {
  const fa3_attn_bwd_params& a = *call.params;
  const BwdPlan& plan = call.plan;
  const bool packed = a.cu_seqlens_q != nullptr;
  BwdKernelParams& m = launch->main;
  BwdAroundParams& r = launch->around;
  m = BwdKernelParams{};
  r = BwdAroundParams{};
  launch->stream = static_cast<cudaStream_t>(a.stream);
  launch->row_grid = dim3(ceil_div(a.seqlen_q, plan.blocks.block_m), a.heads_q, a.batch);

  constexpr float kLog2E = 1.44269504088896340736f;
  BwdShape& s = m.shape;
  s.cu_seqlens_q = a.cu_seqlens_q;
  s.cu_seqlens_k = a.cu_seqlens_k;
  s.batch = a.batch;
  s.seqlen_q = a.seqlen_q;
  s.seqlen_k = a.seqlen_k;
  s.heads_q = a.heads_q;
  s.heads_k = a.heads_k;
  s.head_dim_qk = a.head_dim_qk;
  s.head_dim_v = a.head_dim_v;
  s.window_left = plan.window_left;
  s.window_right = plan.window_right;
  s.row_blocks = plan.row_blocks;
  s.all_row_blocks = plan.all_row_blocks;
  s.softmax_scale = a.softmax_scale;
  s.scale_log2 = (a.softcap > 0.f ? a.softcap : a.softmax_scale) * kLog2E;
  s.softcap_input = a.softcap > 0.f ? a.softmax_scale / a.softcap : 0.f;

  char* const base = static_cast<char*>(a.workspace);
  const auto floats = [base](int64_t offset) { return reinterpret_cast<float*>(base + offset); };
  const auto ints = [base](int64_t offset) { return reinterpret_cast<int*>(base + offset); };
  m.work = {floats(plan.neg_lse), floats(plan.neg_delta), plan.two_pass ? nullptr : floats(plan.dq),
            ints(plan.tile_counter), reinterpret_cast<uint64_t*>(base + plan.dq_state)};
  m.order = plan.order;
  m.query_order = plan.query_order;
  m.heads_per_tile = plan.heads_per_tile;
  m.deterministic = a.deterministic && !plan.two_pass;
  m.finish_inside = plan.finish_inside;
  m.rotate = plan.rotate;
  const bool add = a.dk_accum.ptr != nullptr;
  const GradTensor dk = grad_tensor(add ? a.dk_accum : a.dk),
                   dv = grad_tensor(add ? a.dv_accum : a.dv);
  const int64_t total_k = packed ? a.total_k : int64_t(a.batch) * a.seqlen_k;
  const int64_t k_row = int64_t(a.heads_k) * a.head_dim_qk,
                v_row = int64_t(a.heads_k) * a.head_dim_v;
  m.emit_dkv = plan.shares > 1 ? kEmitPartial : add ? kEmitAdded : kEmitRounded;
  m.dk = plan.shares > 1
             ? GradTensor{floats(plan.dk_parts), a.seqlen_k * k_row, k_row, a.head_dim_qk}
             : dk;
  m.dv = plan.shares > 1
             ? GradTensor{floats(plan.dv_parts), a.seqlen_k * v_row, v_row, a.head_dim_v}
             : dv;
  m.dk_share = total_k * k_row;
  m.dv_share = total_k * v_row;
  m.dq_fp32 = a.dq_accum.ptr != nullptr;
  m.dq = grad_tensor(m.dq_fp32 ? a.dq_accum : a.dq);

  FA3_TRY(encode_maps(call, plan.blocks, &m));
  if (!plan.two_pass && m.emit_dkv == kEmitRounded) {
    const int64_t batch = packed ? 1 : a.batch, tokens = packed ? a.total_k : a.seqlen_k;
    FA3_TRY(encode_token_map(&m.dk_map, "dk", a.dk, a.dtype, a.head_dim_qk, tokens, a.heads_k,
                             batch, 64, base));
    FA3_TRY(encode_token_map(&m.dv_map, "dv", a.dv, a.dtype, a.head_dim_v, tokens, a.heads_k, batch,
                             64, base));
  }

  r.shape = s;
  r.work = m.work;
  r.out = grad_tensor(a.out);
  r.dout = grad_tensor(a.dout);
  r.dq = m.dq;
  r.dq_fp32 = m.dq_fp32;
  r.finish_inside = m.finish_inside;
  r.dk = dk;
  r.dv = dv;
  r.dkv_fp32 = add;
  r.dk_parts = floats(plan.dk_parts);
  r.dv_parts = floats(plan.dv_parts);
  r.dk_share = m.dk_share;
  r.dv_share = m.dv_share;
  r.shares = plan.shares;
  r.lse = a.lse;
  r.dlse = a.dlse;
  r.sink = a.sink;
  r.dsink = a.dsink;
  r.sink_parts = floats(plan.sink_parts);
  r.zero = reinterpret_cast<float4*>(base + plan.zero);
  r.zero_vectors = plan.zero_bytes / 16;
  r.total_q = packed ? a.total_q : int64_t(a.batch) * a.seqlen_q;
  r.total_k = total_k;
  r.lse_factor = a.softcap > 0.f ? kLog2E : 1.f / a.softmax_scale;
  return FA3_OK;
}

// What follows the main kernel in every variant.
template <class Elem, int BLOCK_M>
int finish_launch(const BwdCall& call, const BwdLaunch& launch) {
  const fa3_attn_bwd_params& a = *call.params;
  if (call.plan.shares > 1) {
    const int64_t vectors = launch.around.total_k * a.heads_k * (a.head_dim_qk / 8);
    const int64_t blocks = (vectors + kAroundThreads - 1) / kAroundThreads;
    const int64_t most = int64_t(call.sm_count) * 16;
    FA3_TRY(launch_kernel(bwd_sum_dkv<Elem>, launch.around,
                          dim3(unsigned(blocks < most ? blocks : most), 2), kAroundThreads, 0,
                          launch.stream, true, "bwd_sum_dkv"));
  }
  if (a.sink != nullptr)
    FA3_TRY(launch_kernel(bwd_finish_sink<BLOCK_M>, launch.around, dim3(a.heads_q), kAroundThreads,
                          0, launch.stream, true, "bwd_finish_sink"));
  return FA3_OK;
}

// The grid of bwd_prepare, which also zeroes: one block at least, even when there are no queries.
inline dim3 prepare_grid(const BwdLaunch& launch) {
  const dim3 g = launch.row_grid;
  return dim3(g.x > 0 ? g.x : 1, g.y, g.z);
}

inline BwdMode mode_of(const BwdCall& call) {
  if (call.params->softcap > 0.f) return kBwdSoftcap;
  if (call.params->cu_seqlens_q != nullptr) return kBwdPacked;
  if (call.plan.window_left != kUnbounded) return kBwdWindow;
  return call.plan.window ? kBwdCausal : kBwdPlain;
}

template <class T>
int launch_tiles(void (*kernel)(BwdKernelParams), const BwdCall& call, const BwdLaunch& launch,
                 const BwdKernelParams& params, const TileOrder& order, bool early,
                 const char* name) {
  const int tiles = tile_count(order);
  FA3_TRY(allow_shared_memory(reinterpret_cast<const void*>(kernel), T::kSharedBytes));
  return launch_kernel(kernel, params, dim3(tiles < call.sm_count ? tiles : call.sm_count),
                       T::kThreads, T::kSharedBytes, launch.stream, early, name);
}

template <int kHeadDim, class Elem, BwdMode kMode>
int launch_fused_kernel(const BwdCall& call, const BwdLaunch& launch) {
  using T = BwdFusedTraits<kHeadDim, Elem, kMode>;
  return launch_tiles<T>(bwd_fused<T>, call, launch, launch.main, call.plan.order, true,
                         "bwd_fused");
}

template <int kHeadDim, class Elem>
int launch_bwd_fused(const BwdCall& call) {
  using Any = BwdFusedTraits<kHeadDim, Elem, kBwdPlain>;
  constexpr int kLanes = kHeadDim == 64 ? 8 : 16;
  BwdLaunch launch;
  FA3_TRY(prepare_launch(call, &launch));
  FA3_TRY(launch_kernel(bwd_prepare<Elem, Any::BLOCK_M, kLanes, Any::kDqBlockFloats>, launch.around,
                        prepare_grid(launch), kAroundThreads, 0, launch.stream, false,
                        "bwd_prepare"));
  switch (mode_of(call)) {
    case kBwdPlain: FA3_TRY((launch_fused_kernel<kHeadDim, Elem, kBwdPlain>(call, launch))); break;
    case kBwdCausal:
      FA3_TRY((launch_fused_kernel<kHeadDim, Elem, kBwdCausal>(call, launch)));
      break;
    case kBwdWindow:
      FA3_TRY((launch_fused_kernel<kHeadDim, Elem, kBwdWindow>(call, launch)));
      break;
    case kBwdPacked:
      FA3_TRY((launch_fused_kernel<kHeadDim, Elem, kBwdPacked>(call, launch)));
      break;
    case kBwdSoftcap:
      FA3_TRY((launch_fused_kernel<kHeadDim, Elem, kBwdSoftcap>(call, launch)));
      break;
  }
  if (!call.plan.finish_inside)
    FA3_TRY(launch_kernel(bwd_finish_dq<Elem, Any::BLOCK_M, kHeadDim>, launch.around,
                          launch.row_grid, kAroundThreads, 0, launch.stream, true,
                          "bwd_finish_dq"));
  return finish_launch<Elem, Any::BLOCK_M>(call, launch);
}

template <int kDimQK, int kDimV, class Elem, BwdMode kMode>
int launch_pass_kernels(const BwdCall& call, const BwdLaunch& launch) {
  using Keys = BwdKeysTraits<kDimQK, kDimV, Elem, kMode>;
  using Queries = BwdQueriesTraits<kDimQK, kDimV, Keys::BLOCK_M, Elem, kMode>;
  static_assert(Queries::BLOCK_M == kBwdQueryTile, "the plan counts query tiles");
  FA3_TRY(launch_tiles<Keys>(bwd_keys<Keys>, call, launch, launch.main, call.plan.order, true,
                             "bwd_keys"));
  BwdKernelParams second = launch.main;
  FA3_TRY(encode_maps(call, {Queries::BLOCK_M, Queries::BLOCK_N}, &second));
  // bwd_queries does not wait for bwd_prepare: bwd_keys, if there is any, lets it start no earlier.
  const bool early = tile_count(call.plan.order) > 0;
  return launch_tiles<Queries>(bwd_queries<Queries>, call, launch, second, call.plan.query_order,
                               early, "bwd_queries");
}

template <int kDimQK, int kDimV, class Elem>
int launch_bwd_two_pass(const BwdCall& call) {
  using Keys = BwdKeysTraits<kDimQK, kDimV, Elem, kBwdPlain>;
  BwdLaunch launch;
  FA3_TRY(prepare_launch(call, &launch));
  FA3_TRY(launch_kernel(bwd_prepare < Elem, Keys::BLOCK_M, kDimV == 128 ? 16 : 32, 0 >,
                        launch.around, prepare_grid(launch), kAroundThreads, 0, launch.stream,
                        false, "bwd_prepare"));
  switch (mode_of(call)) {
    case kBwdPlain:
      FA3_TRY((launch_pass_kernels<kDimQK, kDimV, Elem, kBwdPlain>(call, launch)));
      break;
    case kBwdCausal:
      FA3_TRY((launch_pass_kernels<kDimQK, kDimV, Elem, kBwdCausal>(call, launch)));
      break;
    case kBwdWindow:
      FA3_TRY((launch_pass_kernels<kDimQK, kDimV, Elem, kBwdWindow>(call, launch)));
      break;
    case kBwdPacked:
      FA3_TRY((launch_pass_kernels<kDimQK, kDimV, Elem, kBwdPacked>(call, launch)));
      break;
    case kBwdSoftcap:
      FA3_TRY((launch_pass_kernels<kDimQK, kDimV, Elem, kBwdSoftcap>(call, launch)));
      break;
  }
  return finish_launch<Elem, Keys::BLOCK_M>(call, launch);
}

}  // namespace fa3

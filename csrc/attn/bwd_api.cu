// C entry points of the bf16/fp16 backward: check, plan, launch.
#include "attn/bwd_plan.h"
#include "fa3_train.h"
#include "host.h"
#include "ptx/types.cuh"

namespace fa3 {
namespace {

constexpr int kWorkspaceAlignment = 256;

int check_gradient(const char* f, const char* name, const fa3_tensor& rounded,
                   const fa3_tensor& sum, int dtype, int64_t batch, int64_t tokens, int64_t heads,
                   int64_t head_dim) {
  if (batch == 0 || tokens == 0) return FA3_OK;
  if ((rounded.ptr == nullptr) == (sum.ptr == nullptr))
    return fail(FA3_INVALID_ARGUMENT, "%s: exactly one of %s and %s_accum must be given, got %s", f,
                name, name, rounded.ptr ? "both" : "neither");
  return sum.ptr ? check_tensor(f, name, sum, FA3_FP32, batch, tokens, heads, head_dim)
                 : check_tensor(f, name, rounded, dtype, batch, tokens, heads, head_dim);
}

int check_tensors(const char* f, const fa3_attn_bwd_params& a) {
  const bool packed = a.cu_seqlens_q != nullptr;
  const int64_t batch = packed ? 1 : a.batch;
  const int64_t q_tokens = packed ? a.total_q : a.seqlen_q,
                k_tokens = packed ? a.total_k : a.seqlen_k;
  FA3_TRY(check_tensor(f, "q", a.q, a.dtype, batch, q_tokens, a.heads_q, a.head_dim_qk));
  FA3_TRY(check_tensor(f, "k", a.k, a.dtype, batch, k_tokens, a.heads_k, a.head_dim_qk));
  FA3_TRY(check_tensor(f, "v", a.v, a.dtype, batch, k_tokens, a.heads_k, a.head_dim_v));
  FA3_TRY(check_tensor(f, "out", a.out, a.dtype, batch, q_tokens, a.heads_q, a.head_dim_v));
  FA3_TRY(check_tensor(f, "dout", a.dout, a.dtype, batch, q_tokens, a.heads_q, a.head_dim_v));
  FA3_TRY(check_gradient(f, "dq", a.dq, a.dq_accum, a.dtype, batch, q_tokens, a.heads_q,
                         a.head_dim_qk));
  FA3_TRY(check_gradient(f, "dk", a.dk, a.dk_accum, a.dtype, batch, k_tokens, a.heads_k,
                         a.head_dim_qk));
  FA3_TRY(
      check_gradient(f, "dv", a.dv, a.dv_accum, a.dtype, batch, k_tokens, a.heads_k, a.head_dim_v));
  if ((a.dk_accum.ptr == nullptr) != (a.dv_accum.ptr == nullptr))
    return fail(FA3_INVALID_ARGUMENT, "%s: dk_accum and dv_accum must be given together", f);
  if (q_tokens > 0) FA3_TRY(check_pointer(f, "lse", a.lse, 4));
  if ((a.sink == nullptr) != (a.dsink == nullptr))
    return fail(FA3_INVALID_ARGUMENT,
                "%s: dsink must be given exactly when sink is, got sink %p, dsink %p", f,
                static_cast<const void*>(a.sink), static_cast<void*>(a.dsink));
  return FA3_OK;
}

template <class Elem>
int launch_bucket(const BwdCall& call) {
  switch (call.plan.head_dim_qk) {
    case 64: return launch_bwd_fused<64, Elem>(call);
    case 96: return launch_bwd_fused<96, Elem>(call);
    case 128: return launch_bwd_fused<128, Elem>(call);
    case 192:
      return call.plan.head_dim_v == 128 ? launch_bwd_two_pass<192, 128, Elem>(call)
                                         : launch_bwd_two_pass<192, 192, Elem>(call);
    case 256: return launch_bwd_two_pass<256, 256, Elem>(call);
    default:
      return fail(FA3_INTERNAL, "fa3_attn_bwd: no kernel for bucket %d", call.plan.head_dim_qk);
  }
}

// Tile counts depend on the SM count; without a device (a query on a build machine) it is that of
// an H100 SXM.
int query_sm_count() {
  constexpr int kSmsOfH100 = 132;
  Device device;
  return current_device("fa3_attn_bwd_workspace", &device) == FA3_OK ? device.sm_count : kSmsOfH100;
}

}  // namespace
}  // namespace fa3

extern "C" {

int64_t fa3_attn_bwd_workspace(const fa3_attn_bwd_params* params) {
  fa3::BwdPlan plan;
  if (params == nullptr) {
    fa3::fail(FA3_INVALID_ARGUMENT, "fa3_attn_bwd_workspace: params is NULL");
    return -1;
  }
  if (fa3::plan_bwd("fa3_attn_bwd_workspace", *params, fa3::query_sm_count(), &plan) != FA3_OK)
    return -1;
  return plan.bytes;
}

int fa3_attn_bwd(const fa3_attn_bwd_params* params) {
  constexpr const char* f = "fa3_attn_bwd";
  if (params == nullptr) return fa3::fail(FA3_INVALID_ARGUMENT, "%s: params is NULL", f);
  fa3::Device device;
  FA3_TRY(fa3::current_device(f, &device));
  fa3::BwdCall call{params, {}, device.sm_count};
  FA3_TRY(fa3::plan_bwd(f, *params, device.sm_count, &call.plan));
  FA3_TRY(fa3::check_tensors(f, *params));
  FA3_TRY(fa3::check_workspace(f, params->workspace, params->workspace_bytes, call.plan.bytes,
                               fa3::kWorkspaceAlignment));
  if (params->batch == 0) return FA3_OK;
  return params->dtype == FA3_BF16 ? fa3::launch_bucket<fa3::bf16>(call)
                                   : fa3::launch_bucket<fa3::fp16>(call);
}

}  // extern "C"

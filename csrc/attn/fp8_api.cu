// fa3_attn_fp8_fwd: checks, choice of the instantiation. Launch: fp8_launch.cuh.
#include <cmath>

#include "attn/fp8_launch.h"

namespace fa3 {
namespace {

constexpr const char* kName = "fa3_attn_fp8_fwd";
constexpr int kMaxHeadDim = 256;
constexpr int kHeadDimMultiple = 16;  // 16-byte rows of e4m3
constexpr int kUnroundedSum = 1;      // options, for ablations: Fp8Sums::TwoLevelUnrounded

// By sizes alone, so that it may be asked for before the pointers are known. (Dense calls leave the
// prefix unused.)
int64_t workspace_bytes(const fa3_attn_fp8_fwd_params& a) {
  return (kFp8PrefixOffset + int64_t(a.batch) + 1) * int64_t(sizeof(int32_t));
}

int check(const fa3_attn_fp8_fwd_params& a) {
  const struct {
    const char* name;
    int64_t value, least;
  } sizes[] = {{"batch", a.batch, 0},       {"seqlen_q", a.seqlen_q, 0},
               {"seqlen_k", a.seqlen_k, 0}, {"total_q", a.total_q, 0},
               {"total_k", a.total_k, 0},   {"heads_q", a.heads_q, 1},
               {"heads_k", a.heads_k, 1},   {"head_dim_qk", a.head_dim_qk, 1}};
  for (const auto& s : sizes)
    if (s.value < s.least)
      return fail(FA3_INVALID_ARGUMENT, "%s: %s must be at least %lld, got %lld", kName, s.name,
                  static_cast<long long>(s.least), static_cast<long long>(s.value));
  if (a.heads_q % a.heads_k != 0)
    return fail(FA3_INVALID_ARGUMENT, "%s: heads_q must be a multiple of heads_k, got %d and %d",
                kName, a.heads_q, a.heads_k);
  if (a.head_dim_v != a.head_dim_qk)
    return fail(FA3_UNSUPPORTED, "%s: head_dim_v must equal head_dim_qk, got %d and %d", kName,
                a.head_dim_v, a.head_dim_qk);
  if (a.head_dim_qk > kMaxHeadDim || a.head_dim_qk % kHeadDimMultiple != 0)
    return fail(FA3_UNSUPPORTED, "%s: head_dim must be a multiple of %d up to %d, got %d", kName,
                kHeadDimMultiple, kMaxHeadDim, a.head_dim_qk);
  if (a.out_dtype != FA3_BF16 && a.out_dtype != FA3_FP16)
    return fail(FA3_INVALID_ARGUMENT, "%s: out_dtype must be bf16 or fp16, got %s (%d)", kName,
                dtype_name(a.out_dtype), a.out_dtype);
  if (!(a.softmax_scale > 0.f) || !std::isfinite(a.softmax_scale))
    return fail(FA3_INVALID_ARGUMENT, "%s: softmax_scale must be positive and finite, got %g",
                kName, a.softmax_scale);
  if ((a.cu_seqlens_q == nullptr) != (a.cu_seqlens_k == nullptr))
    return fail(
        FA3_INVALID_ARGUMENT,
        "%s: cu_seqlens_q and cu_seqlens_k must both be given or both be NULL, got %p and %p",
        kName, static_cast<const void*>(a.cu_seqlens_q), static_cast<const void*>(a.cu_seqlens_k));
  if (a.window_left < -1 || a.window_right < -1)
    return fail(FA3_INVALID_ARGUMENT,
                "%s: window_left and window_right must be at least -1 (unbounded), got %d and %d",
                kName, a.window_left, a.window_right);
  if (a.two_level != 0 && a.two_level != 1)
    return fail(FA3_INVALID_ARGUMENT, "%s: two_level must be 0 or 1, got %d", kName, a.two_level);
  if (a.options != 0 && !(a.options == kUnroundedSum && a.two_level))
    return fail(
        FA3_UNSUPPORTED,
        "%s: options must be 0, or %d (row sum of unrounded P) with two_level = 1, got %d and %d",
        kName, kUnroundedSum, a.options, a.two_level);
  return FA3_OK;
}

template <Fp8Sums kSums>
int choose_head_dim(const fa3_attn_fp8_fwd_params& a, const Device& device) {
  if (a.head_dim_qk <= 64) return fp8_launch<64, kSums>(a, device);
  if (a.head_dim_qk <= 96) return fp8_launch<96, kSums>(a, device);
  if (a.head_dim_qk <= 128) return fp8_launch<128, kSums>(a, device);
  if (a.head_dim_qk <= 192) return fp8_launch<192, kSums>(a, device);
  return fp8_launch<256, kSums>(a, device);
}

int attn_fp8_fwd(const fa3_attn_fp8_fwd_params& a) {
  FA3_TRY(check(a));
  const bool varlen = a.cu_seqlens_q != nullptr;
  const int64_t batch = varlen ? 1 : a.batch;
  const int64_t rows_q = varlen ? a.total_q : a.seqlen_q, rows_k = varlen ? a.total_k : a.seqlen_k;
  if (a.batch == 0 || rows_q == 0) return FA3_OK;
  FA3_TRY(check_tensor(kName, "q", a.q, FA3_E4M3, batch, rows_q, a.heads_q, a.head_dim_qk));
  FA3_TRY(check_tensor(kName, "k", a.k, FA3_E4M3, batch, rows_k, a.heads_k, a.head_dim_qk));
  FA3_TRY(check_tensor(kName, "v", a.v, FA3_E4M3, batch, rows_k, a.heads_k, a.head_dim_v));
  FA3_TRY(check_tensor(kName, "out", a.out, a.out_dtype, batch, rows_q, a.heads_q, a.head_dim_v));
  FA3_TRY(check_pointer(kName, "lse", a.lse, sizeof(float)));
  FA3_TRY(check_pointer(kName, "q_descale", a.q_descale, sizeof(float)));
  if (rows_k > 0) {
    FA3_TRY(check_pointer(kName, "k_descale", a.k_descale, sizeof(float)));
    FA3_TRY(check_pointer(kName, "v_descale", a.v_descale, sizeof(float)));
  }
  FA3_TRY(check_workspace(kName, a.workspace, a.workspace_bytes, workspace_bytes(a), 16));
  Device device;
  FA3_TRY(current_device(kName, &device));
  if (!a.two_level) return choose_head_dim<Fp8Sums::OneLevel>(a, device);
  if (a.options == kUnroundedSum) return choose_head_dim<Fp8Sums::TwoLevelUnrounded>(a, device);
  return choose_head_dim<Fp8Sums::TwoLevel>(a, device);
}

}  // namespace
}  // namespace fa3

extern "C" {

int64_t fa3_attn_fp8_fwd_workspace(const fa3_attn_fp8_fwd_params* params) {
  if (params == nullptr) {
    fa3::fail(FA3_INVALID_ARGUMENT, "fa3_attn_fp8_fwd_workspace: params is NULL");
    return -1;
  }
  return fa3::check(*params) == FA3_OK ? fa3::workspace_bytes(*params) : -1;
}

int fa3_attn_fp8_fwd(const fa3_attn_fp8_fwd_params* params) {
  if (params == nullptr) return fa3::fail(FA3_INVALID_ARGUMENT, "fa3_attn_fp8_fwd: params is NULL");
  return fa3::attn_fp8_fwd(*params);
}

}  // extern "C"

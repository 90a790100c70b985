// Entry points that belong to no pass: version, layout of the structs, last error, contents of the build.
#include <cstddef>
#include <cstdio>
#include <string>

#include "fa3_train.h"
#include "host.h"

#ifndef FA3_BUILD_INFO  // set by CMake: the passes and tiles of this build
#define FA3_BUILD_INFO "unknown"
#endif

namespace {

struct LayoutText {
  std::string text;
  void type(const char* name, size_t size) {
    text += (text.empty() ? "" : "\n") + std::string(name) + " " + std::to_string(size);
  }
  void field(const char* name, size_t offset, size_t size) {
    text += " " + std::string(name) + ":" + std::to_string(offset) + ":" + std::to_string(size);
  }
};

#define TYPE(type_name)              \
  {                                  \
    using Type = type_name;          \
    layout.type(#type_name, sizeof(Type));
#define FIELD(name) layout.field(#name, offsetof(Type, name), sizeof(Type::name));
#define END }

std::string describe_layout() {
  LayoutText layout;
  TYPE(fa3_tensor)
    FIELD(ptr) FIELD(stride_batch) FIELD(stride_token) FIELD(stride_head)
  END
  TYPE(fa3_attn_fwd_params)
    FIELD(q) FIELD(k) FIELD(v) FIELD(out) FIELD(lse) FIELD(cu_seqlens_q) FIELD(cu_seqlens_k) FIELD(sink)
    FIELD(workspace) FIELD(workspace_bytes) FIELD(stream) FIELD(softmax_scale) FIELD(softcap) FIELD(dtype)
    FIELD(batch) FIELD(seqlen_q) FIELD(seqlen_k) FIELD(total_q) FIELD(total_k) FIELD(heads_q) FIELD(heads_k)
    FIELD(head_dim_qk) FIELD(head_dim_v) FIELD(window_left) FIELD(window_right) FIELD(options) FIELD(reserved)
  END
  TYPE(fa3_attn_bwd_params)
    FIELD(q) FIELD(k) FIELD(v) FIELD(out) FIELD(dout) FIELD(dq) FIELD(dk) FIELD(dv) FIELD(dq_accum)
    FIELD(dk_accum) FIELD(dv_accum) FIELD(lse) FIELD(dlse) FIELD(cu_seqlens_q) FIELD(cu_seqlens_k) FIELD(sink)
    FIELD(dsink) FIELD(workspace) FIELD(workspace_bytes) FIELD(stream) FIELD(softmax_scale) FIELD(softcap)
    FIELD(dtype) FIELD(batch) FIELD(seqlen_q) FIELD(seqlen_k) FIELD(total_q) FIELD(total_k) FIELD(heads_q)
    FIELD(heads_k) FIELD(head_dim_qk) FIELD(head_dim_v) FIELD(window_left) FIELD(window_right)
    FIELD(deterministic) FIELD(options)
  END
  TYPE(fa3_attn_fp8_fwd_params)
    FIELD(q) FIELD(k) FIELD(v) FIELD(out) FIELD(q_descale) FIELD(k_descale) FIELD(v_descale) FIELD(lse)
    FIELD(cu_seqlens_q) FIELD(cu_seqlens_k) FIELD(workspace) FIELD(workspace_bytes) FIELD(stream)
    FIELD(softmax_scale) FIELD(out_dtype) FIELD(batch) FIELD(seqlen_q) FIELD(seqlen_k) FIELD(total_q)
    FIELD(total_k) FIELD(heads_q) FIELD(heads_k) FIELD(head_dim_qk) FIELD(head_dim_v) FIELD(window_left)
    FIELD(window_right) FIELD(two_level) FIELD(options) FIELD(reserved)
  END
  TYPE(fa3_prep_tensor)
    FIELD(x) FIELD(out) FIELD(descale) FIELD(heads) FIELD(rope) FIELD(hadamard) FIELD(quantize)
  END
  TYPE(fa3_prep_params)
    FIELD(tensors) FIELD(cos) FIELD(sin) FIELD(signs) FIELD(position_ids) FIELD(cu_seqlens) FIELD(stream)
    FIELD(num_tensors) FIELD(batch) FIELD(seqlen) FIELD(total) FIELD(positions) FIELD(head_dim)
    FIELD(rotary_dim) FIELD(interleaved) FIELD(inverse) FIELD(in_dtype) FIELD(out_dtype) FIELD(block_size)
    FIELD(options)
  END
  return layout.text;
}

}  // namespace

extern "C" {

int fa3_abi_version(void) { return FA3_ABI_VERSION; }

const char* fa3_last_error(void) { return fa3::last_error(); }

const char* fa3_abi_layout(void) {
  static const std::string text = describe_layout();
  return text.c_str();
}

const char* fa3_build_info(void) { return FA3_BUILD_INFO; }

}  // extern "C"

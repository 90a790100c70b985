/* fa3_train: attention kernels for Hopper (sm_90a) behind a C ABI.
 *
 * Rules that hold for every entry point
 *   - returns a fa3_status; fa3_last_error() then gives a message (thread local) with the actual values
 *   - allocates nothing, never synchronises, launches on params->stream only (CUDA graphs capture it)
 *   - throws nothing; never exits the process
 *   - all pointers are device pointers unless said otherwise; strides are in elements; the last dimension is contiguous
 *   - 16-bit and 8-bit tensors: address and every used stride are multiples of 16 bytes
 *
 * Layouts: dense q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), out (B, Sq, H, Dv), lse fp32 (B, H, Sq).
 * Varlen (cu_seqlens_q != NULL): q (total_q, H, D) and so on, stride_batch unused, lse fp32 (H, total_q).
 * Masks are bottom-right aligned: with shift = Sk - Sq, row i sees key j iff i + shift - window_left <= j <= i + shift + window_right;
 * a negative window side is unbounded; causal is window_right = 0. A row with no key gives out = 0 and lse = -inf.
 */
#ifndef FA3_TRAIN_H_
#define FA3_TRAIN_H_

#include <stdint.h>

#define FA3_ABI_VERSION 1

#if defined(__GNUC__)
#define FA3_API __attribute__((visibility("default")))
#else
#define FA3_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum fa3_status {
  FA3_OK = 0,
  FA3_INVALID_ARGUMENT = 1, /* the caller's mistake: the message names argument, rule and value */
  FA3_UNSUPPORTED = 2,      /* a valid request that no kernel here serves (GPU, head dim, option) */
  FA3_CUDA_ERROR = 3,       /* the driver refused; the message carries its text */
  FA3_INTERNAL = 4
} fa3_status;

typedef enum fa3_dtype { FA3_BF16 = 0, FA3_FP16 = 1, FA3_E4M3 = 2, FA3_FP32 = 3 } fa3_dtype;

/* Switches for ablations; 0 is the default kernel. Unsupported combinations are FA3_UNSUPPORTED, never ignored. */
enum {
  FA3_OPT_NO_WARP_SPECIALIZATION = 1,
  FA3_OPT_NO_OVERLAP = 2,        /* no intra-warpgroup GEMM-softmax overlap */
  FA3_OPT_NO_PINGPONG = 4,
  FA3_OPT_NO_REG_REALLOC = 8,    /* no setmaxnreg */
  FA3_OPT_NOT_PERSISTENT = 16
};

typedef struct fa3_tensor {
  void* ptr;
  int64_t stride_batch; /* elements; 0 and unused in varlen */
  int64_t stride_token; /* elements */
  int64_t stride_head;  /* elements */
} fa3_tensor;

/* Forward, bf16/fp16 (paper: FlashAttention-3, algorithm 1-2). */
typedef struct fa3_attn_fwd_params {
  fa3_tensor q, k, v; /* dtype */
  fa3_tensor out;     /* dtype */
  float* lse;         /* (B, H, Sq) or (H, total_q), contiguous, natural log */
  const int32_t* cu_seqlens_q; /* (B + 1) or NULL: dense */
  const int32_t* cu_seqlens_k; /* (B + 1), NULL iff cu_seqlens_q is */
  const float* sink;           /* (H): one logit per query head, in units of scaled scores; or NULL */
  void* workspace;             /* fa3_attn_fwd_workspace bytes, 16-byte aligned; contents arbitrary */
  int64_t workspace_bytes;
  void* stream; /* cudaStream_t */
  float softmax_scale;
  float softcap; /* 0: none; else scores become softcap * tanh(score / softcap) before masking */
  int32_t dtype; /* FA3_BF16 or FA3_FP16 */
  int32_t batch;
  int32_t seqlen_q, seqlen_k; /* dense: lengths; varlen: the maxima over the batch */
  int32_t total_q, total_k;   /* varlen: rows of q and of k (may exceed cu_seqlens[B]); dense: 0 */
  int32_t heads_q, heads_k;   /* heads_q % heads_k == 0 */
  int32_t head_dim_qk, head_dim_v;
  int32_t window_left, window_right; /* -1: unbounded */
  int32_t options;                   /* FA3_OPT_* */
  int32_t reserved;
} fa3_attn_fwd_params;

FA3_API int64_t fa3_attn_fwd_workspace(const fa3_attn_fwd_params* params); /* bytes, or -1 with an error message */
FA3_API int fa3_attn_fwd(const fa3_attn_fwd_params* params);

/* Backward, bf16/fp16. dK and dV of a group of query heads are summed in FP32 and rounded once. */
typedef struct fa3_attn_bwd_params {
  fa3_tensor q, k, v, out, dout; /* dtype */
  fa3_tensor dq, dk, dv;         /* dtype; where *_accum of the same gradient is given, ptr is NULL */
  fa3_tensor dq_accum, dk_accum, dv_accum; /* fp32, same shapes as dq, dk, dv; ptr NULL or: the gradient is ADDED to what is there */
  const float* lse;            /* as the forward wrote it */
  const float* dlse;           /* gradient of lse, same shape; or NULL */
  const int32_t* cu_seqlens_q; /* as in the forward */
  const int32_t* cu_seqlens_k;
  const float* sink; /* (H) or NULL */
  float* dsink;      /* (H) fp32, overwritten; NULL iff sink is */
  void* workspace;   /* fa3_attn_bwd_workspace bytes, 256-byte aligned; contents arbitrary */
  int64_t workspace_bytes;
  void* stream;
  float softmax_scale;
  float softcap;
  int32_t dtype;
  int32_t batch;
  int32_t seqlen_q, seqlen_k;
  int32_t total_q, total_k;
  int32_t heads_q, heads_k;
  int32_t head_dim_qk, head_dim_v;
  int32_t window_left, window_right;
  int32_t deterministic; /* 1: dQ bitwise repeatable (dK and dV always are) */
  int32_t options;       /* bit 0: force one CTA over the whole group; bit 1: force FP32 global reduction; 0: the documented rule */
} fa3_attn_bwd_params;

FA3_API int64_t fa3_attn_bwd_workspace(const fa3_attn_bwd_params* params);
FA3_API int fa3_attn_bwd(const fa3_attn_bwd_params* params);

/* FP8 forward: e4m3 q, k, v with one FP32 descale per 128 tokens and head; v in its normal layout.
 * Descales: dense (B, heads, ceil(S / 128)); varlen (heads, total / 128 + B), where token t of sequence b has
 * block cu_seqlens[b] / 128 + b + (t - cu_seqlens[b]) / 128 (integer divisions): blocks never cross a sequence. */
typedef struct fa3_attn_fp8_fwd_params {
  fa3_tensor q, k, v; /* e4m3 */
  fa3_tensor out;     /* out_dtype */
  const float *q_descale, *k_descale, *v_descale;
  float* lse;
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  void* workspace; /* fa3_attn_fp8_fwd_workspace bytes */
  int64_t workspace_bytes;
  void* stream;
  float softmax_scale;
  int32_t out_dtype; /* FA3_BF16 or FA3_FP16 */
  int32_t batch;
  int32_t seqlen_q, seqlen_k;
  int32_t total_q, total_k;
  int32_t heads_q, heads_k;
  int32_t head_dim_qk, head_dim_v;
  int32_t window_left, window_right;
  int32_t two_level; /* 1: P V is promoted to FP32 registers after every key block (exact over long contexts) */
  int32_t options;   /* 0; 1 (ablation, with two_level): the row sum takes P before its rounding to e4m3 */
  int32_t reserved;
} fa3_attn_fp8_fwd_params;

FA3_API int64_t fa3_attn_fp8_fwd_workspace(const fa3_attn_fp8_fwd_params* params);
FA3_API int fa3_attn_fp8_fwd(const fa3_attn_fp8_fwd_params* params);

/* Fused RoPE -> random-sign Hadamard -> amax -> e4m3, up to three tensors (q, k, v) in one launch; each stage can be off.
 * inverse = 1: the gradient, i.e. inverse Hadamard then inverse RoPE (quantization is straight-through: quantize = 0).
 * Hadamard and quantize: head_dim 64, 96 (3 x 32), 128, 192 (3 x 64), 256. Packed rows past cu_seqlens[batch] are not written.
 * A block with a NaN or an infinity gets descale NaN and NaN codes, an all-zero block descale 1. A position outside
 * of the tables gives NaN. A descale has at most 4 significant bits, so that code * descale is exact in bf16.
 * in_dtype FA3_E4M3: the way back, out = x * descale (an input then), all stages 0. */
typedef struct fa3_prep_tensor {
  fa3_tensor x;   /* in_dtype, (B, S, heads, D) or varlen (total, heads, D) */
  fa3_tensor out; /* e4m3 if quantize, else out_dtype */
  float* descale; /* layout as in fa3_attn_fp8_fwd_params; NULL iff not quantize */
  int32_t heads;
  int32_t rope, hadamard, quantize; /* 0 or 1 each */
} fa3_prep_tensor;

typedef struct fa3_prep_params {
  fa3_prep_tensor tensors[3];
  const float *cos, *sin;      /* (positions, rotary_dim / 2) fp32 contiguous; NULL iff no tensor has rope */
  const float* signs;          /* (head_dim) fp32, +1 or -1 (the sign bit counts): multiplies elements before the transform; NULL: none */
  const int32_t* position_ids; /* (B, S) or (total); NULL: 0, 1, ... from the start of each sequence */
  const int32_t* cu_seqlens;   /* (B + 1) or NULL: dense */
  void* stream;
  int32_t num_tensors;
  int32_t batch, seqlen, total; /* total: varlen only */
  int32_t positions;            /* rows of cos and sin */
  int32_t head_dim, rotary_dim; /* rotary_dim <= head_dim, even; the rest passes through */
  int32_t interleaved;          /* 1: pairs (2i, 2i+1); 0: (i, i + rotary_dim / 2) */
  int32_t inverse;
  int32_t in_dtype, out_dtype; /* BF16, FP16; in_dtype also FP32 with inverse, and E4M3 */
  int32_t block_size;          /* 128 (64: 64-token blocks) */
  int32_t options;              /* bit 0: FP32 kernels only, where tensor cores would serve (head_dim 64, 128) */
} fa3_prep_params;

FA3_API int fa3_prep(const fa3_prep_params* params);

FA3_API int fa3_abi_version(void);
FA3_API const char* fa3_last_error(void);
/* Text, one line per struct: "name sizeof field:offset:size field:offset:size ...". Checked by the loader. */
FA3_API const char* fa3_abi_layout(void);
/* Text, space separated: what this build holds, e.g. "fwd bwd fp8 prep d64 d96 ...". */
FA3_API const char* fa3_build_info(void);

#ifdef __cplusplus
}
#endif
#endif /* FA3_TRAIN_H_ */

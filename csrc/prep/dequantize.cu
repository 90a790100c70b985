// e4m3 codes times their block's descale -> 16-bit. Elementwise; a warp owns a token, as in
// rope.cu.
//
//   codes (batch, token, head, D), descale (batch, head, block)  ->  out (batch, token, head, D)
//   bf16 or fp16
//
// With descales of at most 4 significant bits (block_scale in row_math.cuh) the results are exact
// in bf16.
#include "host.h"
#include "prep/params.h"
#include "ptx/convert.cuh"
#include "ptx/stream.cuh"

namespace fa3::prep {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 3;
constexpr int kAhead = 8;  // heads of a lane in flight
constexpr int kCodes = 8;  // codes of a lane: its results are 16 bytes, and a warp's lie together

template <class Out>
FA3_DEVICE uint4 scale_codes(uint2 codes, float descale) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t four = i < 2 ? codes.x : codes.y;
    const float2 f = unpack2<fp16>(unpack2_e4m3(static_cast<uint16_t>(i % 2 ? four >> 16 : four)));
    w[i] = pack2<Out>(f.x * descale, f.y * descale);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// Block of a token among the descales of its batch entry; -1: in no sequence.
FA3_DEVICE int block_of(const DequantizeParams& p, int token) {
  const int32_t* cu = p.sequences.cu_seqlens;
  if (cu == nullptr) return token / p.block_tokens;
  if (token >= cu[p.sequences.batch]) return -1;
  int low = 0,
      high = p.sequences.batch - 1;  // the last sequence that starts at or before the token
  while (low < high) {
    const int mid = (low + high + 1) / 2;
    if (cu[mid] <= token)
      low = mid;
    else
      high = mid - 1;
  }
  return cu[low] / p.block_tokens + low + (token - cu[low]) / p.block_tokens;
}

template <class Out>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    dequantize_kernel(const __grid_constant__ DequantizeParams p) {
  const int lane = threadIdx.x % 32;
  const int units = p.head_dim / kCodes, lane_heads = 32 / units;
  const int lane_head = lane / units, unit = lane - lane_head * units;
  if (lane_head >= lane_heads) return;
  const bool dense = p.sequences.cu_seqlens == nullptr;
  const int64_t stride = int64_t(gridDim.x) * kWarps;
#pragma unroll 1
  for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; row < p.rows; row += stride) {
    const int64_t batch = dense ? row / p.sequences.seqlen : 0;
    const int64_t token = dense ? row - batch * p.sequences.seqlen : row;
    const int block = block_of(p, int(token));
    if (block < 0) continue;
#pragma unroll 1
    for (int t = 0; t < p.num_tensors; ++t) {
      const DequantizeTensor& tensor = p.tensors[t];
      const char* codes =
          tensor.codes + batch * tensor.codes_batch + token * tensor.codes_token + unit * kCodes;
      char* out = tensor.out + batch * tensor.out_batch + token * tensor.out_token +
                  unit * kCodes * sizeof(Out);
      const float* descale = tensor.descale + batch * tensor.heads * p.blocks + block;
#pragma unroll 1
      for (int h = lane_head; h < tensor.heads; h += kAhead * lane_heads) {
        uint2 x[kAhead];
        float d[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int head = h + i * lane_heads;
          if (head >= tensor.heads) continue;
          x[i] = load_once_8(codes + head * tensor.codes_head);
          d[i] = __ldg(descale + head * p.blocks);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int head = h + i * lane_heads;
          if (head >= tensor.heads) continue;
          *reinterpret_cast<uint4*>(out + head * tensor.out_head) = scale_codes<Out>(x[i], d[i]);
        }
      }
    }
  }
}

}  // namespace

int launch_dequantize(const DequantizeParams& p, int out_dtype, cudaStream_t stream) {
  const int64_t needed = (p.rows + kWarps - 1) / kWarps;
  const int64_t resident = int64_t(p.sm_count) * kBlocksPerSm;
  const unsigned blocks = static_cast<unsigned>(needed < resident ? needed : resident);
  if (out_dtype == FA3_FP16)
    dequantize_kernel<fp16><<<blocks, kThreads, 0, stream>>>(p);
  else
    dequantize_kernel<bf16><<<blocks, kThreads, 0, stream>>>(p);
  return check_cuda(cudaGetLastError(), "fa3_prep: launch of the dequantization kernel");
}

}  // namespace fa3::prep

// Rotary embedding alone: x (batch, token, head, D) 16-bit or fp32 -> rotated, 16-bit, any D that is a multiple of 8.
//
// Elementwise, so nothing is shared between threads: a thread owns a pair of eight-element chunks of one token, keeps
// their cos and sin in registers and walks over heads. Eight lanes cover a row of 128 elements, so every access of a
// warp is whole 128-byte lines, and a few heads are loaded before the first is used: enough bytes in flight
// to run at the speed of a copy.
//
//   NeoX:        chunks u and u + rotary_dim / 16; elements past rotary_dim are copied, two chunks a thread
//   interleaved: chunks 2u and 2u + 1
// A NeoX rotary_dim that is not a multiple of 16 has pairs inside a chunk: rope_kernel_scalar, slower, same results.
#include "prep/params.h"
#include "prep/row_math.cuh"

#include "host.h"

namespace fa3::prep {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 3;  // 80 registers a thread
template <class In>
constexpr int kAheadOf = sizeof(In) == 4 ? 2 : 4;  // heads loaded ahead of use: 32 or 64 bytes each

struct Position {
  int64_t batch, token;  // where the row lies in the tensors
  int angle;             // row of the tables; negative: outside, NaN
  bool exists;
};

FA3_DEVICE Position locate(const RopeParams& p, int64_t row) {
  Position at{0, row, 0, true};
  if (p.cu_seqlens == nullptr) {
    at.batch = row / p.seqlen;
    at.token = row - at.batch * p.seqlen;
    at.angle = p.position_ids ? p.position_ids[row] : int(at.token);
  } else {
    if (row >= p.cu_seqlens[p.batch]) at.exists = false;  // rows that no sequence owns are left alone
    if (p.position_ids) {
      at.angle = p.position_ids[row];
    } else {
      int low = 0, high = p.batch - 1;  // the last sequence that starts at or before this row
      while (low < high) {
        const int mid = (low + high + 1) / 2;
        if (p.cu_seqlens[mid] <= row) low = mid; else high = mid - 1;
      }
      at.angle = int(row) - p.cu_seqlens[low];
    }
  }
  if (unsigned(at.angle) >= unsigned(p.positions)) at.angle = -1;
  return at;
}

template <class In>
struct Chunk {  // eight elements as loaded
  uint4 raw[sizeof(In) / 2];
  FA3_DEVICE void load(const char* x) {
#pragma unroll
    for (int i = 0; i < int(sizeof(In)) / 2; ++i) raw[i] = load_once(x + 16 * i);
  }
  FA3_DEVICE void unpack(float* f) const {
    if constexpr (sizeof(In) == 4) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        f[4 * i] = __uint_as_float(raw[i].x), f[4 * i + 1] = __uint_as_float(raw[i].y);
        f[4 * i + 2] = __uint_as_float(raw[i].z), f[4 * i + 3] = __uint_as_float(raw[i].w);
      }
    } else {
      const uint32_t w[4] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack2<In>(w[i]);
        f[2 * i] = pair.x, f[2 * i + 1] = pair.y;
      }
    }
  }
};

template <class Out>
FA3_DEVICE void store_chunk(char* out, const float* f) {
  *reinterpret_cast<uint4*>(out) =
      make_uint4(pack2<Out>(f[0], f[1]), pack2<Out>(f[2], f[3]), pack2<Out>(f[4], f[5]), pack2<Out>(f[6], f[7]));
}

// cos and sin of pairs pair .. pair + 7 of a row of the tables; those from `count` on do not turn.
FA3_DEVICE void load_angles(const RopeParams& p, int angle, int pair, int count, float (&c)[8], float (&s)[8]) {
  const float fill = angle < 0 ? __uint_as_float(0x7fffffffu) : 1.f;  // a position outside of the table must show
#pragma unroll
  for (int i = 0; i < 8; ++i) c[i] = i < count ? fill : 1.f, s[i] = 0.f;
  if (angle < 0 || count <= 0) return;
  const int64_t at = int64_t(angle) * (p.rotary_dim / 2) + pair;
  if (count >= 8 && p.rotary_dim % 8 == 0) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 x = __ldg(reinterpret_cast<const float4*>(p.cos + at + i));
      const float4 y = __ldg(reinterpret_cast<const float4*>(p.sin + at + i));
      c[i] = x.x, c[i + 1] = x.y, c[i + 2] = x.z, c[i + 3] = x.w;
      s[i] = y.x, s[i + 1] = y.y, s[i + 2] = y.z, s[i + 3] = y.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) c[i] = __ldg(p.cos + at + i), s[i] = __ldg(p.sin + at + i);
  }
}

template <class In, class Out, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) rope_kernel(const __grid_constant__ RopeParams p) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / p.units;
  const int unit = int(index - row * p.units);
  if (row >= p.rows) return;
  const Position at = locate(p, row);
  if (!at.exists) return;

  // ---- which two chunks, and their angles
  const int chunks = p.head_dim / 8;
  int low = 2 * unit, high = 2 * unit + 1;
  float c[8], s[8];
  if (kInterleaved) {
    load_angles(p, at.angle, 8 * unit, p.rotary_dim / 2 - 8 * unit, c, s);
  } else {
    const int rotated = p.rotary_dim / 16;
    if (unit < rotated) low = unit, high = unit + rotated;
    load_angles(p, at.angle, 8 * unit, unit < rotated ? 8 : 0, c, s);
  }
  const bool pair = high < chunks;  // an odd number of chunks leaves a single one
#pragma unroll
  for (int i = 0; i < 8; ++i) s[i] *= p.direction;

  // ---- heads
  int first = blockIdx.y * p.heads_per_block;
  int left = p.heads_per_block;
#pragma unroll 1
  for (int t = 0; t < p.num_tensors && left > 0; ++t) {
    const RopeTensor& tensor = p.tensors[t];
    if (first >= tensor.heads) {
      first -= tensor.heads;
      continue;
    }
    const int heads = min(left, tensor.heads - first);
    const char* x = tensor.x + at.batch * tensor.x_batch + at.token * tensor.x_token + first * tensor.x_head;
    char* out = tensor.out + at.batch * tensor.out_batch + at.token * tensor.out_token + first * tensor.out_head;
    constexpr int kChunkIn = 8 * sizeof(In), kAhead = kAheadOf<In>;
#pragma unroll 1
    for (int h = 0; h < heads; h += kAhead) {
      Chunk<In> a[kAhead], b[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (h + i < heads) {
          a[i].load(x + low * kChunkIn + i * tensor.x_head);
          if (pair) b[i].load(x + high * kChunkIn + i * tensor.x_head);
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (h + i >= heads) continue;
        float f[8], g[8];
        a[i].unpack(f);
        if (pair) b[i].unpack(g);
        if (kInterleaved) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            rotate<false>(f[2 * e], f[2 * e + 1], c[e], s[e]);
            rotate<false>(g[2 * e], g[2 * e + 1], c[e + 4], s[e + 4]);
          }
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e) rotate<false>(f[e], g[e], c[e], s[e]);
        }
        store_chunk<Out>(out + low * 16 + i * tensor.out_head, f);
        if (pair) store_chunk<Out>(out + high * 16 + i * tensor.out_head, g);
      }
      x += kAhead * tensor.x_head;
      out += kAhead * tensor.out_head;
    }
    left -= heads;
    first = 0;
  }
}

// One thread per element pair (or copied element) of one token, over the heads.
template <class In, class Out>
__global__ void __launch_bounds__(kThreads) rope_kernel_scalar(const __grid_constant__ RopeParams p) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / p.units;
  const int unit = int(index - row * p.units);
  if (row >= p.rows) return;
  const Position at = locate(p, row);
  if (!at.exists) return;
  const int half = p.rotary_dim / 2;
  const bool rotated = unit < half;
  const int low = rotated ? unit : unit + half, high = rotated ? unit + half : low;
  float c = 1.f, s = 0.f;
  if (rotated) {
    const int64_t angle = int64_t(at.angle) * half + unit;
    c = at.angle < 0 ? __uint_as_float(0x7fffffffu) : p.cos[angle];
    s = at.angle < 0 ? __uint_as_float(0x7fffffffu) : p.sin[angle] * p.direction;
  }
  int first = blockIdx.y * p.heads_per_block, left = p.heads_per_block;
  for (int t = 0; t < p.num_tensors && left > 0; ++t) {
    const RopeTensor& tensor = p.tensors[t];
    if (first >= tensor.heads) {
      first -= tensor.heads;
      continue;
    }
    const int heads = min(left, tensor.heads - first);
    for (int h = first; h < first + heads; ++h) {
      const In* x = reinterpret_cast<const In*>(tensor.x + at.batch * tensor.x_batch + at.token * tensor.x_token +
                                                h * tensor.x_head);
      Out* out = reinterpret_cast<Out*>(tensor.out + at.batch * tensor.out_batch + at.token * tensor.out_token +
                                        h * tensor.out_head);
      float a = float(x[low]), b = float(x[high]);
      if (rotated) rotate<false>(a, b, c, s);
      out[low] = Out(a);
      if (rotated) out[high] = Out(b);
    }
    left -= heads;
    first = 0;
  }
}

template <class In, class Out>
int launch(const RopeParams& params, cudaStream_t stream) {
  RopeParams p = params;
  const bool scalar = !p.interleaved && p.rotary_dim % 16 != 0;
  p.units = scalar ? p.head_dim - p.rotary_dim / 2 : (p.head_dim / 8 + 1) / 2;
  int heads = 0;
  for (int t = 0; t < p.num_tensors; ++t) heads += p.tensors[t].heads;
  const int64_t blocks = (p.rows * p.units + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(blocks), (heads + p.heads_per_block - 1) / p.heads_per_block);
  if (scalar) rope_kernel_scalar<In, Out><<<grid, kThreads, 0, stream>>>(p);
  else if (p.interleaved) rope_kernel<In, Out, true><<<grid, kThreads, 0, stream>>>(p);
  else rope_kernel<In, Out, false><<<grid, kThreads, 0, stream>>>(p);
  return check_cuda(cudaGetLastError(), "fa3_prep: launch of the rotary kernel");
}

}  // namespace

int launch_rope(const RopeParams& params, int in_dtype, int out_dtype, cudaStream_t stream) {
  const bool half = out_dtype == FA3_FP16;
  if (in_dtype == FA3_FP32)
    return half ? launch<float, fp16>(params, stream) : launch<float, bf16>(params, stream);
  return half ? launch<fp16, fp16>(params, stream) : launch<bf16, bf16>(params, stream);
}

}  // namespace fa3::prep

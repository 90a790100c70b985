// Rotary embedding alone: x (batch, token, head, D) 16-bit or fp32 -> rotated, 16-bit, any D that
// is a multiple of 8.
//
// Elementwise, so nothing is shared between threads. A warp owns a token and walks over its heads,
// which lie together in memory: it streams through kilobytes without a gap, as a copy does; then it
// takes another token. A lane owns a pair of eight-element chunks of a head and keeps their cos and
// sin in registers; at D = 128 eight lanes cover a head and four heads go side by side. Several
// steps of heads are in flight at a time.
//
//   NeoX:        chunks u and u + rotary_dim / 16; elements past rotary_dim are copied, two chunks
//   a lane interleaved: chunks u and u + chunks / 2, each with its own four pairs
// A NeoX rotary_dim that is not a multiple of 16 has pairs inside a chunk: rope_kernel_scalar,
// slower, same results.
#include "host.h"
#include "prep/params.h"
#include "prep/row_math.cuh"

namespace fa3::prep {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm =
    2;  // 128 registers a thread; more bytes in flight per thread beat more threads
template <class In>
constexpr int kAheadOf =
    sizeof(In) == 4 ? 3 : 6;  // steps loaded ahead of use, 64 or 32 bytes a lane each

struct Place {
  int64_t batch, token;  // where the row lies in the tensors
  bool exists;
};

FA3_DEVICE Place place_of(const RopeParams& p, int64_t row) {
  const Sequences& s = p.sequences;
  if (s.cu_seqlens)
    return {0, row, row < s.cu_seqlens[s.batch]};  // rows that no sequence owns are left alone
  const int64_t batch = row / s.seqlen;
  return {batch, row - batch * s.seqlen, true};
}

// Row of the tables; -1: outside.
FA3_DEVICE int angle_of(const RopeParams& p, int64_t row, const Place& place) {
  const Sequences& s = p.sequences;
  int position = int(place.token);
  if (p.rotation.position_ids) {
    position = p.rotation.position_ids[row];
  } else if (s.cu_seqlens) {
    int low = 0, high = s.batch - 1;  // the last sequence that starts at or before this row
    while (low < high) {
      const int mid = (low + high + 1) / 2;
      if (s.cu_seqlens[mid] <= row)
        low = mid;
      else
        high = mid - 1;
    }
    position = int(row) - s.cu_seqlens[low];
  }
  return unsigned(position) < unsigned(p.rotation.positions) ? position : -1;
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
  *reinterpret_cast<uint4*>(out) = make_uint4(pack2<Out>(f[0], f[1]), pack2<Out>(f[2], f[3]),
                                              pack2<Out>(f[4], f[5]), pack2<Out>(f[6], f[7]));
}

// cos and sin of pairs pair .. pair + N - 1 of a row of the tables; those from `count` on do not
// turn.
template <int N>
FA3_DEVICE void load_angles(const RopeParams& p, int angle, int pair, int count, float* c,
                            float* s) {
  const float fill =
      angle < 0 ? __uint_as_float(0x7fffffffu) : 1.f;  // a position outside of the tables must show
#pragma unroll
  for (int i = 0; i < N; ++i) c[i] = i < count ? fill : 1.f, s[i] = 0.f;
  if (angle < 0 || count <= 0) return;
  const int64_t at = int64_t(angle) * (p.rotation.rotary_dim / 2) + pair;
  if (count >= N && p.rotation.rotary_dim % 8 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 x = __ldg(reinterpret_cast<const float4*>(p.rotation.cos + at + i));
      const float4 y = __ldg(reinterpret_cast<const float4*>(p.rotation.sin + at + i));
      c[i] = x.x, c[i + 1] = x.y, c[i + 2] = x.z, c[i + 3] = x.w;
      s[i] = y.x, s[i + 1] = y.y, s[i + 2] = y.z, s[i + 3] = y.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) c[i] = __ldg(p.rotation.cos + at + i), s[i] = __ldg(p.rotation.sin + at + i);
  }
}

template <class In, class Out, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    rope_kernel(const __grid_constant__ RopeParams p) {
  constexpr int kAhead = kAheadOf<In>, kChunkIn = 8 * sizeof(In);
  const int lane = threadIdx.x % 32;
  const int lane_head = lane / p.units, unit = lane - lane_head * p.units;
  if (lane_head >= p.lane_heads) return;

  // ---- which two chunks of a head
  const int chunks = p.head_dim / 8, rotated = p.rotation.rotary_dim / 16;
  int low = 2 * unit, high = 2 * unit + 1;
  if (kInterleaved)
    low = unit, high = unit + p.units;
  else if (unit < rotated)
    low = unit, high = unit + rotated;
  const bool pair = high < chunks;  // an odd number of chunks leaves a single one

  // ---- tokens in turn; their heads in steps of lane_heads, over the tensors
  const int64_t walks = p.rows * p.splits;
  const int64_t stride = int64_t(gridDim.x) * kWarps;
#pragma unroll 1
  for (int64_t index = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; index < walks;
       index += stride) {
    const int64_t row = index / p.splits;
    const Place place = place_of(p, row);
    if (!place.exists) continue;
    int first = int(index - row * p.splits) * p.heads_per_warp, left = p.heads_per_warp;
    float c[8], s[8];
    bool have_angles = false;
#pragma unroll 1
    for (int t = 0; t < p.num_tensors && left > 0; ++t) {
      const RopeTensor& tensor = p.tensors[t];
      if (first >= tensor.heads) {
        first -= tensor.heads;
        continue;
      }
      const int heads = min(left, tensor.heads - first);
      left -= heads;
      const int64_t x_step = p.lane_heads * tensor.x_head,
                    out_step = p.lane_heads * tensor.out_head;
      const char* x = tensor.x + place.batch * tensor.x_batch + place.token * tensor.x_token +
                      (first + lane_head) * tensor.x_head;
      char* out = tensor.out + place.batch * tensor.out_batch + place.token * tensor.out_token +
                  (first + lane_head) * tensor.out_head;
      first = 0;
      Chunk<In> a[kAhead], b[kAhead];
      if (!pair) {  // what register b would hold instead turns the single chunk into NaN: s is 0, 0
                    // * NaN is not
#pragma unroll
        for (int i = 0; i < kAhead; ++i) b[i] = Chunk<In>{};
      }
      auto load = [&](int h) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (h + i * p.lane_heads < heads) {
            a[i].load(x + low * kChunkIn + i * x_step);
            if (pair)
              b[i].load(x + high * kChunkIn + i * x_step);
            else
              b[i] = {};  // the single chunk is "rotated" with it: by 0, which would keep a NaN
          }
        }
        x += kAhead * x_step;
      };
      load(lane_head);
      if (!have_angles) {  // after the first loads are under way
        const int angle = angle_of(p, row, place);
        if (kInterleaved) {
          load_angles<4>(p, angle, 4 * low, p.rotation.rotary_dim / 2 - 4 * low, c, s);
          load_angles<4>(p, angle, 4 * high, p.rotation.rotary_dim / 2 - 4 * high, c + 4, s + 4);
        } else {
          load_angles<8>(p, angle, 8 * unit, unit < rotated ? 8 : 0, c, s);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) s[i] *= p.direction;
        have_angles = true;
      }
#pragma unroll 1
      for (int h = lane_head; h < heads; h += kAhead * p.lane_heads) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (h + i * p.lane_heads >= heads) continue;
          float f[8], g[8];
          a[i].unpack(f);
          b[i].unpack(g);
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
          store_chunk<Out>(out + low * 16 + i * out_step, f);
          if (pair) store_chunk<Out>(out + high * 16 + i * out_step, g);
        }
        out += kAhead * out_step;
        load(h + kAhead * p.lane_heads);
      }
    }
  }
}

// One thread per element pair (or copied element) of one token, over the heads.
template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
    rope_kernel_scalar(const __grid_constant__ RopeParams p) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / p.units;
  const int unit = int(index - row * p.units);
  if (row >= p.rows) return;
  const Place place = place_of(p, row);
  if (!place.exists) return;
  const int half = p.rotation.rotary_dim / 2;
  const bool rotated = unit < half;
  const int low = rotated ? unit : unit + half, high = rotated ? unit + half : low;
  float c = 1.f, s = 0.f;
  if (rotated) {
    const int angle = angle_of(p, row, place);
    const int64_t at = int64_t(angle) * half + unit;
    c = angle < 0 ? __uint_as_float(0x7fffffffu) : p.rotation.cos[at];
    s = angle < 0 ? __uint_as_float(0x7fffffffu) : p.rotation.sin[at] * p.direction;
  }
  for (int t = 0; t < p.num_tensors; ++t) {
    const RopeTensor& tensor = p.tensors[t];
    for (int h = 0; h < tensor.heads; ++h) {
      const In* x = reinterpret_cast<const In*>(tensor.x + place.batch * tensor.x_batch +
                                                place.token * tensor.x_token + h * tensor.x_head);
      Out* out = reinterpret_cast<Out*>(tensor.out + place.batch * tensor.out_batch +
                                        place.token * tensor.out_token + h * tensor.out_head);
      float a = float(x[low]), b = float(x[high]);
      if (rotated) rotate<false>(a, b, c, s);
      out[low] = Out(a);
      if (rotated) out[high] = Out(b);
    }
  }
}

template <class In, class Out>
int launch(const RopeParams& params, cudaStream_t stream) {
  RopeParams p = params;
  int heads = 0;
  for (int t = 0; t < p.num_tensors; ++t) heads += p.tensors[t].heads;
  if (!p.rotation.interleaved && p.rotation.rotary_dim % 16 != 0) {
    p.units = p.head_dim - p.rotation.rotary_dim / 2;
    const int64_t blocks = (p.rows * p.units + kThreads - 1) / kThreads;
    rope_kernel_scalar<In, Out><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  } else {
    p.units = (p.head_dim / 8 + 1) / 2;
    p.lane_heads = 32 / p.units;
    p.splits = (heads + p.heads_per_warp - 1) / p.heads_per_warp;
    const int64_t needed = (p.rows * p.splits + kWarps - 1) / kWarps;
    const int64_t resident = int64_t(p.sm_count) * kBlocksPerSm;
    const unsigned blocks = static_cast<unsigned>(needed < resident ? needed : resident);
    if (p.rotation.interleaved)
      rope_kernel<In, Out, true><<<blocks, kThreads, 0, stream>>>(p);
    else
      rope_kernel<In, Out, false><<<blocks, kThreads, 0, stream>>>(p);
  }
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

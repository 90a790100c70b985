// Pieces of the backward kernels that work on one tile: statistics into accumulators, masks,
// fragments to shared and global memory. Accumulators of one thread as tile/layout.cuh lays them
// out (acc_row, acc_col).
#pragma once
#include "attn/bwd_params.cuh"
#include "ptx/barrier.cuh"
#include "ptx/convert.cuh"
#include "ptx/launch.cuh"
#include "ptx/memory.cuh"
#include "ptx/thread.cuh"
#include "ptx/tma.cuh"
#include "ptx/warp.cuh"
#include "ptx/wgmma.cuh"

namespace fa3 {

constexpr int kSlabBytes = 128;  // one row of a slab: 64 16-bit elements, 128-byte swizzle
constexpr int kSlabCols = 64;
constexpr int kStepKMajor = 32;  // bytes from one 16-deep k-step to the next, K-major inside a slab
constexpr int kStepMNMajor = 16 * kSlabBytes;  // MN-major

// Compile-time arguments of generic lambdas.
template <bool v>
struct Constant {
  static constexpr bool value = v;
};
template <int v>
struct Number {
  static constexpr int value = v;
};

// Ring of two stages in one register instead of two: what the math warpgroups lack.
struct PairRing {
  uint32_t count = 0;
  FA3_DEVICE uint32_t stage() const { return count & 1; }
  FA3_DEVICE uint32_t phase() const { return count >> 1 & 1; }
  FA3_DEVICE void advance() { ++count; }
};
// The same for one stage, of which only the phase changes.
struct SingleRing {
  uint32_t count = 0;
  FA3_DEVICE uint32_t stage() const { return 0; }
  FA3_DEVICE uint32_t phase() const { return count & 1; }
  FA3_DEVICE void advance() { ++count; }
};

// Key tile number `index` of the launch into shared memory, field by field. Runs in one thread; the
// binary search is over cumulative lengths.
template <int BLOCK_M, int BLOCK_N, bool kPacked>
FA3_DEVICE void find_key_tile(const BwdKernelParams& p, int index, KeyTile& t) {
  const BwdShape& s = p.shape;
  if (index >= tile_count(p.order)) {
    t.key_block = -1;
    return;
  }
  const TileName name = tile_name(p.order, index);
  int share = name.head, key_block = name.key_block;
  if (!kPacked || s.cu_seqlens_q == nullptr) {
    const int shares = s.heads_q / p.heads_per_tile, b = share / shares;
    share -= b * shares;
    t.batch = b;
    t.query_row = t.key_row = 0;
    t.seqlen_q = s.seqlen_q;
    t.seqlen_k = s.seqlen_k;
    t.row_block = b * s.heads_q * s.row_blocks;
  } else {
    int b = 0, above = s.batch;  // the last b with first_block(b) <= key_block
    while (above - b > 1) {
      const int middle = (b + above) / 2;
      if (first_block(__ldg(s.cu_seqlens_k + middle), middle, BLOCK_N) <= key_block)
        b = middle;
      else
        above = middle;
    }
    const int query_row = __ldg(s.cu_seqlens_q + b), key_row = __ldg(s.cu_seqlens_k + b);
    t.batch = 0;
    t.query_row = query_row;
    t.key_row = key_row;
    t.seqlen_q = __ldg(s.cu_seqlens_q + b + 1) - query_row;
    t.seqlen_k = __ldg(s.cu_seqlens_k + b + 1) - key_row;
    t.row_block = first_block(query_row, b, BLOCK_M);
    key_block -= first_block(key_row, b, BLOCK_N);
  }
  const int head_q = share * p.heads_per_tile, head_k = head_q / (s.heads_q / s.heads_k);
  t.key_block = key_block;
  t.head_q = head_q;
  t.head_k = head_k;
  t.share = (head_q - head_k * (s.heads_q / s.heads_k)) / p.heads_per_tile;
  const int seqlen_q = t.seqlen_q, seqlen_k = t.seqlen_k;
  t.staged = p.emit_dkv == kEmitRounded &&
             (!kPacked || s.cu_seqlens_k == nullptr || (key_block + 1) * BLOCK_N <= seqlen_k);
  const Mask mask{seqlen_k - seqlen_q, s.window_left, s.window_right};
  const BlockRange range =
      key_block * BLOCK_N < seqlen_k
          ? query_blocks({BLOCK_M, BLOCK_N}, mask, key_block, ceil_div(seqlen_q, BLOCK_M))
          : BlockRange{0, 0};  // a spare number of a packed sequence
  t.query_begin = range.begin;
  t.query_end = range.begin + range.size();
  // Without bounds all tiles of a head would meet each query block at the same time.
  t.query_start =
      range.begin +
      (p.rotate && range.size() > 0 ? key_block * ceil_div(BLOCK_N, BLOCK_M) % range.size() : 0);
  t.steps = range.size() * p.heads_per_tile;
}

// Query tile number `index`: as find_key_tile, with the roles exchanged.
template <int kStatRows, int BLOCK_M, int BLOCK_N, bool kPacked>
FA3_DEVICE void find_query_tile(const BwdKernelParams& p, int index, QueryTile& t) {
  const BwdShape& s = p.shape;
  if (index >= tile_count(p.query_order)) {
    t.query_block = -1;
    return;
  }
  const TileName name = tile_name(p.query_order, index);
  int head_q = name.head, query_block = name.key_block;
  if (!kPacked || s.cu_seqlens_q == nullptr) {
    const int b = head_q / s.heads_q;
    head_q -= b * s.heads_q;
    t.batch = b;
    t.query_row = t.key_row = 0;
    t.seqlen_q = s.seqlen_q;
    t.seqlen_k = s.seqlen_k;
    t.row_block = b * s.heads_q * s.row_blocks;
  } else {
    int b = 0, above = s.batch;
    while (above - b > 1) {
      const int middle = (b + above) / 2;
      if (first_block(__ldg(s.cu_seqlens_q + middle), middle, BLOCK_M) <= query_block)
        b = middle;
      else
        above = middle;
    }
    const int query_row = __ldg(s.cu_seqlens_q + b), key_row = __ldg(s.cu_seqlens_k + b);
    t.batch = 0;
    t.query_row = query_row;
    t.key_row = key_row;
    t.seqlen_q = __ldg(s.cu_seqlens_q + b + 1) - query_row;
    t.seqlen_k = __ldg(s.cu_seqlens_k + b + 1) - key_row;
    t.row_block = first_block(query_row, b, kStatRows);
    query_block -= first_block(query_row, b, BLOCK_M);
  }
  t.query_block = query_block;
  t.head_q = head_q;
  t.head_k = head_q / (s.heads_q / s.heads_k);
  const int seqlen_q = t.seqlen_q, seqlen_k = t.seqlen_k;
  const Mask mask{seqlen_k - seqlen_q, s.window_left, s.window_right};
  const BlockRange range =
      query_block * BLOCK_M < seqlen_q
          ? key_blocks({BLOCK_M, BLOCK_N}, mask, query_block, ceil_div(seqlen_k, BLOCK_N))
          : BlockRange{0, 0};
  t.key_begin = range.begin;
  t.key_end = range.begin + range.size();
}

// Walks (query head, query block) of a tile. What changes every step is in registers: shared-memory
// reads would queue behind the operand reads of the math warpgroups, hundreds of cycles each.
struct QueryWalk {
  const BwdShape& shape;
  const KeyTile& tile;
  int m, head, row_block, stop, left;  // stop: the block where m or the head changes
  FA3_DEVICE QueryWalk(const BwdShape& s, const KeyTile& t) : shape(s), tile(t) {
    head = t.head_q;
    m = t.query_start;
    stop = t.query_end;
    left = t.steps;
    row_block = head * s.row_blocks + t.row_block + m;
  }
  FA3_DEVICE void advance() {
    --left, ++m, ++row_block;
    if (m != stop) return;
    if (m == tile.query_end) {
      m = tile.query_begin;
      row_block -= tile.query_end - m;
      stop = tile.query_start;
    }
    if (m == stop) {
      ++head, row_block += shape.row_blocks;
      stop = tile.query_end;
    }
  }
};

// Statistics of the columns of a transposed score tile (statistics_slot order), four per 16 columns
// and thread; and accumulators that start at them. Apart, because the loads take long while wgmma
// reads shared memory.
template <int N>
FA3_DEVICE void load_columns(float4 (&columns)[N / 8], uint32_t statistics) {
  const int quad = threadIdx.x & 3;
#pragma unroll
  for (int k = 0; k < N / 8; ++k) columns[k] = lds_float4(statistics + k * 64 + quad * 16);
}
// That of accumulator i, 0 to 7.
FA3_DEVICE float column_of(const float4& columns, int i) {
  return (i & 4) ? (i & 1 ? columns.w : columns.z) : (i & 1 ? columns.y : columns.x);
}
template <int N>
FA3_DEVICE void spread_columns(float (&acc)[N], const float4 (&columns)[N / 8]) {
#pragma unroll
  for (int i = 0; i < N; ++i) acc[i] = column_of(columns[i / 8], i % 8);
}
template <int N>
FA3_DEVICE void start_at_columns(float (&acc)[N], uint32_t statistics) {
  float4 columns[N / 8];
  load_columns<N>(columns, statistics);
  spread_columns(acc, columns);
}

// Hides pairs of a transposed score tile (rows: 64 keys from key0, columns: query block m). Only
// tiles that a bound or the end of the keys cuts are looked at.
template <int BLOCK_M, bool kRight, bool kLeft>
FA3_DEVICE void mask_transposed(float (&s)[BLOCK_M / 2], float hidden, Mask mask, int key0,
                                int seqlen_k, int m) {
  constexpr int kAlways = 1 << 30;
  const int quad2 = 2 * (threadIdx.x & 3), row = acc_row(threadIdx.x & 127, 0);
  const int query0 = m * BLOCK_M;
  const BlockShape one{BLOCK_M, kWarpgroupRows};
  const bool tail = key0 + kWarpgroupRows > seqlen_k;
  // key <= query + shift + right  <=>  column >= key - shift - right - query0
  if (tail || (kRight && key0 + one.block_n - 1 > query0 + mask.shift + mask.right)) {
    const int first = kRight ? key0 + row - mask.shift - mask.right - query0 : -kAlways;
    const int lo0 = (key0 + row < seqlen_k ? first : kAlways) - quad2;
    const int lo1 = (key0 + row + 8 < seqlen_k ? first + (kRight ? 8 : 0) : kAlways) - quad2;
#pragma unroll
    for (int i = 0; i < BLOCK_M / 8; ++i) {
      if (8 * i + 0 < lo0) s[4 * i + 0] = hidden;
      if (8 * i + 1 < lo0) s[4 * i + 1] = hidden;
      if (8 * i + 0 < lo1) s[4 * i + 2] = hidden;
      if (8 * i + 1 < lo1) s[4 * i + 3] = hidden;
    }
  }
  // key >= query + shift - left  <=>  column <= key - shift + left - query0
  if (kLeft && key0 < query0 + BLOCK_M - 1 + mask.shift - mask.left) {
    const int hi0 = key0 + row - mask.shift + mask.left - query0 - quad2, hi1 = hi0 + 8;
#pragma unroll
    for (int i = 0; i < BLOCK_M / 8; ++i) {
      if (8 * i + 0 > hi0) s[4 * i + 0] = hidden;
      if (8 * i + 1 > hi0) s[4 * i + 1] = hidden;
      if (8 * i + 0 > hi1) s[4 * i + 2] = hidden;
      if (8 * i + 1 > hi1) s[4 * i + 3] = hidden;
    }
  }
}

template <class Elem, int N>
FA3_DEVICE void pack_all(const float (&x)[N], uint32_t (&out)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) out[i] = pack2<Elem>(x[2 * i], x[2 * i + 1]);
}

// Rows [from, rows) of a swizzled tile become zero: a swizzle permutes inside a row, so whole rows
// need no map. Packed sequences need it: TMA brought the next sequence's rows along, and 0 * NaN is
// NaN. kThreads: those that take part, a power of two, aligned.
template <int kThreads>
FA3_DEVICE void clear_rows(uint32_t tile, int slabs, int rows, int from) {
  const int thread = (current_thread_index() - kWarpgroupThreads) &
                     (kThreads - 1);  // math begins after warpgroup 0
  for (int slab = 0; slab < slabs; ++slab)
#pragma unroll 1
    for (int chunk = from * (kSlabBytes / 16) + thread; chunk < rows * (kSlabBytes / 16);
         chunk += kThreads)
      sts128(tile + (slab * rows * kSlabBytes + chunk * 16), make_uint4(0, 0, 0, 0));
}

// 4 x 4 transpose among the lanes of a quad: afterwards lane q holds element q of lanes 0 to 3.
FA3_DEVICE void quad_transpose(uint32_t (&v)[4], int q) {
#pragma unroll
  for (int step = 1; step <= 2; step <<= 1)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(i & step)) {
        const uint32_t send = (q & step) ? v[i] : v[i + step];
        const uint32_t got = __shfl_xor_sync(0xffffffffu, send, step);
        if (q & step)
          v[i] = got;
        else
          v[i + step] = got;
      }
}

// Rows of 64 x N accumulators, times `factor`, as 16-bit vectors of 8 columns: no shared memory, no
// overrun. `dst`: row 0 of the tile; rows and cols bound what exists.
template <class Elem, int N>
FA3_DEVICE void store_rows(const float* acc, float factor, Elem* dst, int64_t stride, int rows,
                           int cols, int thread = current_thread_index() & 127) {
  const int quad = thread & 3, row = acc_row(thread, 0);
#pragma unroll
  for (int u = 0; u < N / 32; ++u) {
    uint32_t lo[4], hi[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* c = acc + 16 * u + 4 * i;
      lo[i] = pack2<Elem>(c[0] * factor, c[1] * factor);
      hi[i] = pack2<Elem>(c[2] * factor, c[3] * factor);
    }
    quad_transpose(lo, quad);
    quad_transpose(hi, quad);
    const int col = 32 * u + 8 * quad;
    if (col < cols) {
      Elem* const at = dst + row * stride + col;
      if (row < rows) *reinterpret_cast<uint4*>(at) = make_uint4(lo[0], lo[1], lo[2], lo[3]);
      if (row + 8 < rows)
        *reinterpret_cast<uint4*>(at + 8 * stride) = make_uint4(hi[0], hi[1], hi[2], hi[3]);
    }
  }
}

// The same, added to FP32 in global memory. Each element is added to once per call of this
// function.
template <int N>
FA3_DEVICE void add_rows(const float* acc, float factor, float* dst, int64_t stride, int rows,
                         int cols, int thread = current_thread_index() & 127) {
  const int row = acc_row(thread, 0);
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    const int col = 8 * i + 2 * (thread & 3);
    const float* c = acc + 4 * i;
    float* const at = dst + row * stride + col;
    if (8 * i < cols) {
      if (row < rows) reduce_add_f32x2(at, c[0] * factor, c[1] * factor);
      if (row + 8 < rows) reduce_add_f32x2(at + 8 * stride, c[2] * factor, c[3] * factor);
    }
  }
}

// 64 x N accumulators, times `factor`, into a swizzled 16-bit tile in shared memory: [N / 64
// slabs][64 rows].
template <class Elem, int N>
FA3_DEVICE void stage_rows(const float* acc, float factor, uint32_t tile) {
  const int thread = current_thread_index() & 127, row = stmatrix_row(thread);
#pragma unroll
  for (int j = 0; j < N / 16; ++j) {
    const float* c = acc + 8 * j;
    const int chunk = stmatrix_chunk(thread, j % 4);
    stmatrix_x4(
        tile + j / 4 * 64 * kSlabBytes + row * kSlabBytes + ((chunk ^ (row & 7)) << 4),
        pack2<Elem>(c[0] * factor, c[1] * factor), pack2<Elem>(c[2] * factor, c[3] * factor),
        pack2<Elem>(c[4] * factor, c[5] * factor), pack2<Elem>(c[6] * factor, c[7] * factor));
  }
}

// Partial sums: plain FP32 stores.
template <int N>
FA3_DEVICE void store_rows_fp32(const float* acc, float factor, float* dst, int64_t stride,
                                int rows, int cols) {
  const int thread = current_thread_index() & 127, row = acc_row(thread, 0);
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    const float* c = acc + 4 * i;
    float* const at = dst + row * stride + 8 * i + 2 * (thread & 3);
    if (8 * i < cols) {
      if (row < rows) *reinterpret_cast<float2*>(at) = make_float2(c[0] * factor, c[1] * factor);
      if (row + 8 < rows)
        *reinterpret_cast<float2*>(at + 8 * stride) = make_float2(c[2] * factor, c[3] * factor);
    }
  }
}

// dK or dV of `rows` keys from key0 of the tile's sequence on.
template <class Elem, int N>
FA3_DEVICE void emit_gradient(const float* acc, float factor, const GradTensor& g,
                              int64_t share_stride, BwdEmit emit, const KeyTile& t, int key0,
                              int rows, int cols) {
  const int64_t at = t.batch * g.stride_batch + int64_t(t.key_row + key0) * g.stride_token +
                     t.head_k * g.stride_head;
  if (emit == kEmitRounded)
    store_rows<Elem, N>(acc, factor, static_cast<Elem*>(g.ptr) + at, g.stride_token, rows, cols);
  else if (emit == kEmitAdded)
    add_rows<N>(acc, factor, static_cast<float*>(g.ptr) + at, g.stride_token, rows, cols);
  else
    store_rows_fp32<N>(acc, factor, static_cast<float*>(g.ptr) + at + t.share * share_stride,
                       g.stride_token, rows, cols);
}

}  // namespace fa3

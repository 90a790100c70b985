// Fused rotary embedding -> random-sign Hadamard -> block scale -> e4m3, and its gradient. One pass over memory.
//
//   x (batch, token, head, D) 16-bit  ->  out e4m3 + descale (batch, head, block), or out 16-bit
//   inverse: gradient 16-bit or fp32  ->  Hadamard, signs, rotation by the opposite angle -> 16-bit
//
// A work item is a block of tokens (the scale block, 128) and a range of heads over all tensors of the launch. Its
// cos and sin are copied to shared memory once. Then a group of warps takes one (block, head) tile after the
// other; a lane holds a whole row (two lanes at D >= 192), so the rotation and the butterflies are register
// arithmetic in FP32, without shuffles, and the only exchange is the block maximum (a named barrier of the group).
//
// Memory moves by TMA, per warp: the lane that issues it loads the warp's rows of the next tile as soon as those
// of this one are in registers, and stores results from a second buffer. Nothing but the maximum couples
// warps, and the groups of an SM run out of step, which hides the phases of one behind those of the others.
//
// Signs: x is multiplied by them while packed (one XOR for two elements); the product of two signs goes into sin
// when the table is filled, so that rotating signed elements gives the signed rotated ones.
//
// Why not tensor cores for the transform: the result must be exact to one e4m3 step, which takes two bf16 passes
// (high and low part of the rotated value); splitting costs more than the FP32 butterflies it saves.
#pragma once
#include "prep/params.h"
#include "prep/row_math.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"

namespace fa3::prep {

constexpr int kMaxWarps = 16;
constexpr int kSlabBytes = 128;  // swizzle width: a tile is [slab][row][128 bytes]

template <int D>
struct RowTraits : RowShape<D> {
  // Registers bind: 168 a thread at 12 warps hold 128 values, 128 at 16 hold 64; two lanes a row at 8 warps.
  static constexpr int kThreads = D == 64 ? 512 : D <= 128 ? 384 : 256;
  static FA3_HD constexpr int slabs(int bytes_per_element) { return (D * bytes_per_element + kSlabBytes - 1) / kSlabBytes; }
};

struct Item {
  int row0, batch;  // coordinates of the first token in the tensor maps
  int tokens;       // of the sequence in this block; 0: unused slot
  int position0, position_row;  // position without ids; index of the first token in position_ids
  int block, batch_out;         // where the descales go
  int head_begin, head_end;
  int exists;
};

template <int D>
struct RowControl {
  uint64_t full[kMaxWarps];
  Item items[2];
  uint32_t amax[2][kMaxWarps];
  uint32_t signs[8];
  uint4 masks[2][D / 8];  // [0]: zeros, [1]: sign bits of a chunk of eight packed elements
};

// Sign bits of a packed pair.
FA3_DEVICE uint32_t pair_mask(uint32_t bits) { return ((bits & 1) << 15) | ((bits & 2) << 30); }

FA3_DEVICE Item decode_item(const RowParams& p, int index) {
  Item it{};
  it.exists = index < p.items;
  if (!it.exists) return it;
  const int block = index / p.phases, phase = index % p.phases;
  it.head_begin = phase * p.heads_per_phase;
  it.head_end = min(it.head_begin + p.heads_per_phase, p.heads_total);
  if (p.cu_seqlens == nullptr) {
    it.batch = block / p.blocks;
    it.block = block % p.blocks;
    it.batch_out = it.batch;
    it.row0 = it.block * p.block_tokens;
    it.tokens = min(p.block_tokens, p.seqlen - it.row0);
    it.position0 = it.row0;
    it.position_row = it.batch * p.seqlen + it.row0;
    return it;
  }
  // Sequence b owns the slots from cu[b] / block_tokens + b on: find the last b that starts at or before this one.
  int low = 0, high = p.batch - 1;
  while (low < high) {
    const int mid = (low + high + 1) / 2;
    if (p.cu_seqlens[mid] / p.block_tokens + mid <= block) low = mid; else high = mid - 1;
  }
  const int begin = p.cu_seqlens[low], end = min(p.cu_seqlens[low + 1], p.total);
  const int inside = (block - begin / p.block_tokens - low) * p.block_tokens;
  it.block = block;
  it.row0 = begin + inside;
  it.tokens = max(0, min(p.block_tokens, end - it.row0));
  it.position0 = inside;
  it.position_row = it.row0;
  return it;
}

// cos and sin of the item's tokens -> shared memory, sin with the signs of its pair.
template <class Shape>
FA3_DEVICE void fill_table(const RowParams& p, const Item& it, uint32_t table, const uint32_t* signs, bool has_signs) {
  using Row = TableRow<Shape::kLanes>;
  const int units = p.rotary_dim / 8, cells = p.block_tokens * units;
  const uint32_t to_sin = p.block_tokens * p.table_pitch;
  for (int i = threadIdx.x; i < cells; i += blockDim.x) {
    const int row = i / units, unit = i - row * units;
    const int token = min(row, it.tokens - 1);  // rows past the end take valid angles: 0 * NaN would reach the maximum
    const int position = p.position_ids ? p.position_ids[it.position_row + token] : it.position0 + token;
    const uint32_t dst = table + Row::offset(row, unit, p.table_pitch);
    if (unsigned(position) < unsigned(p.positions)) {
      const int64_t src = int64_t(position) * (p.rotary_dim / 2) + unit * 4;
      cp_async_16(dst, p.cos + src);
      cp_async_16(dst + to_sin, p.sin + src);
    } else {  // a position outside of the table must show
      const uint4 nan = make_uint4(0x7fffffffu, 0x7fffffffu, 0x7fffffffu, 0x7fffffffu);
      sts128(dst, nan);
      sts128(dst + to_sin, nan);
    }
  }
  cp_async_wait_all();
  if (!has_signs) return;
  for (int i = threadIdx.x; i < cells; i += blockDim.x) {
    const int row = i / units, unit = i - row * units;
    const uint32_t at = table + to_sin + Row::offset(row, unit, p.table_pitch);
    uint4 v = lds128(at);
    auto sign = [&](int element) { return signs[element >> 5] >> (element & 31); };
    auto fix = [&](uint32_t bits, int pair) {
      const int a = p.interleaved ? 2 * pair : pair, b = p.interleaved ? a + 1 : a + p.rotary_dim / 2;
      return bits ^ ((sign(a) ^ sign(b)) << 31);
    };
    v.x = fix(v.x, 4 * unit), v.y = fix(v.y, 4 * unit + 1), v.z = fix(v.z, 4 * unit + 2), v.w = fix(v.w, 4 * unit + 3);
    sts128(at, v);
  }
}

// One lane's view of its row in the input buffer of the warp.
template <class Shape>
struct RowReader {
  uint32_t base;  // row start with the swizzle of this row in bits 4..6
  int part;

  FA3_DEVICE RowReader(uint32_t stage, int row, int part) : base(stage + row * kSlabBytes + ((row & 7) << 4)), part(part) {}
  // 16-byte unit `unit` of the row.
  FA3_DEVICE uint32_t unit(int unit) const {
    return (base ^ ((unit & 7) << 4)) + (unit >> 3) * (Shape::kRows * kSlabBytes);
  }
  FA3_DEVICE int chunk(int c) const { return Shape::kLanes == 1 ? c : 2 * c + part; }
};

template <class Elem>
FA3_DEVICE void unpack_chunk(float* v, uint4 x, uint4 mask) {
  const uint32_t w[4] = {x.x ^ mask.x, x.y ^ mask.y, x.z ^ mask.z, x.w ^ mask.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = unpack2<Elem>(w[i]);
    v[2 * i] = f.x, v[2 * i + 1] = f.y;
  }
}

// Input rows -> values, signed and rotated.
template <class Shape, class Elem>
FA3_DEVICE void load_forward(float (&v)[Shape::kValues], const RowParams& p, const RowReader<Shape>& in,
                             const TableRow<Shape::kLanes>& table, const uint4* masks, bool rope) {
  constexpr int kChunks = Shape::kChunks;
  if (rope && !p.interleaved && !p.partial_neox) {
#pragma unroll
    for (int c = 0; c < kChunks / 2; ++c) {
      const int low = in.chunk(c), high = in.chunk(c + kChunks / 2);
      unpack_chunk<Elem>(v + 8 * c, lds128(in.unit(low)), masks[low]);
      unpack_chunk<Elem>(v + 8 * (c + kChunks / 2), lds128(in.unit(high)), masks[high]);
      rotate_chunks<false>(v + 8 * c, v + 8 * (c + kChunks / 2), table.template angles<8>(8 * low));
    }
    return;
  }
  const int rotated = rope && p.interleaved ? p.rotary_dim / 8 : 0;  // chunks
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = in.chunk(c);
    unpack_chunk<Elem>(v + 8 * c, lds128(in.unit(chunk)), masks[chunk]);
    if (chunk < rotated) rotate_neighbours<false>(v + 8 * c, table.template angles<4>(4 * chunk));
  }
}

// Gradient rows -> values, as they are.
template <class Shape, class Elem>
FA3_DEVICE void load_gradient(float (&v)[Shape::kValues], const RowReader<Shape>& in, bool fp32) {
#pragma unroll
  for (int c = 0; c < Shape::kChunks; ++c) {
    const int chunk = in.chunk(c);
    if (fp32) {
      const float4 a = lds_float4(in.unit(2 * chunk)), b = lds_float4(in.unit(2 * chunk + 1));
      v[8 * c] = a.x, v[8 * c + 1] = a.y, v[8 * c + 2] = a.z, v[8 * c + 3] = a.w;
      v[8 * c + 4] = b.x, v[8 * c + 5] = b.y, v[8 * c + 6] = b.z, v[8 * c + 7] = b.w;
    } else {
      unpack_chunk<Elem>(v + 8 * c, lds128(in.unit(chunk)), make_uint4(0, 0, 0, 0));
    }
  }
}

// One chunk -> 16-bit, in the output buffer.
template <class Elem>
FA3_DEVICE void write_chunk(const float* f, uint32_t address, uint4 mask) {
  sts128(address, make_uint4(pack2<Elem>(f[0], f[1]) ^ mask.x, pack2<Elem>(f[2], f[3]) ^ mask.y,
                             pack2<Elem>(f[4], f[5]) ^ mask.z, pack2<Elem>(f[6], f[7]) ^ mask.w));
}

// Values -> 16-bit rows; of a gradient, after the rotation back. Rotation and write share a loop, so that few values
// are alive where the branches meet.
template <class Shape, class Elem, bool kInverse>
FA3_DEVICE void write_16bit(float (&v)[Shape::kValues], const RowParams& p, const RowReader<Shape>& out,
                            const TableRow<Shape::kLanes>& table, const uint4* masks, bool rope) {
  constexpr int kChunks = Shape::kChunks;
  if (kInverse && rope && !p.interleaved && !p.partial_neox) {
#pragma unroll
    for (int c = 0; c < kChunks / 2; ++c) {
      const int low = out.chunk(c), high = out.chunk(c + kChunks / 2);
      rotate_chunks<true>(v + 8 * c, v + 8 * (c + kChunks / 2), table.template angles<8>(8 * low));
      write_chunk<Elem>(v + 8 * c, out.unit(low), masks[low]);
      write_chunk<Elem>(v + 8 * (c + kChunks / 2), out.unit(high), masks[high]);
    }
    return;
  }
  const int rotated = kInverse && rope && p.interleaved ? p.rotary_dim / 8 : 0;  // chunks
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = out.chunk(c);
    if (kInverse && chunk < rotated) rotate_neighbours<true>(v + 8 * c, table.template angles<4>(4 * chunk));
    write_chunk<Elem>(v + 8 * c, out.unit(chunk), masks[chunk]);
  }
}

// Values / scale -> e4m3 rows in the output buffer.
template <class Shape>
FA3_DEVICE void write_e4m3(float (&v)[Shape::kValues], const RowReader<Shape>& out, float inverse, bool pending) {
#pragma unroll
  for (int c = 0; c < Shape::kChunks; ++c) {
    uint32_t w[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* f = v + 8 * c + 4 * h;
      if (pending) {
        finish_pair(f[0], f[1], inverse);
        finish_pair(f[2], f[3], inverse);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) f[i] *= inverse;
      }
      w[h] = pack4_e4m3(f[0], f[1], f[2], f[3]);
    }
    const int chunk = out.chunk(c);
    sts64(out.unit(chunk / 2) + (chunk & 1) * 8, w[0], w[1]);
  }
}

template <int D, class Elem, bool kInverse>
__global__ void __launch_bounds__(RowTraits<D>::kThreads, 1) row_kernel(const __grid_constant__ RowParams p) {
  using Shape = RowTraits<D>;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& control = *reinterpret_cast<RowControl<D>*>(shared + p.control_offset);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32;
  const int group = warp / p.group_warps, warp_row = (warp % p.group_warps) * Shape::kRows;
  const int row = lane_row<Shape::kLanes>(lane), part = Shape::kLanes == 1 ? 0 : lane & 1;

  const uint32_t stage_in = smem_addr(shared) + warp * p.stage_in_bytes;
  const uint32_t stage_out = smem_addr(shared) + warps * p.stage_in_bytes + warp * p.stage_out_bytes;
  const uint32_t table_base = smem_addr(shared) + p.table_offset;
  const uint32_t full = smem_addr(&control.full[warp]);
  const bool rotates = p.cos != nullptr;

  // ---- set-up: barriers, signs, the first item
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int w = 0; w < warps; ++w) mbar_init(smem_addr(&control.full[w]), 1);
    mbar_init_fence();
    control.items[0] = decode_item(p, blockIdx.x);
  }
  for (int word = warp; word < D / 32; word += warps) {  // one element a lane
    const uint32_t bits = __ballot_sync(0xffffffffu, p.signs != nullptr && signbit(p.signs[word * 32 + lane]));
    if (lane == 0) control.signs[word] = bits;
    if (lane < 4) {
      const uint32_t b = bits >> (8 * lane);
      control.masks[0][4 * word + lane] = make_uint4(0, 0, 0, 0);
      control.masks[1][4 * word + lane] = make_uint4(pair_mask(b), pair_mask(b >> 2), pair_mask(b >> 4), pair_mask(b >> 6));
    }
  }
  if (threadIdx.x < kMaxTensors && threadIdx.x < p.num_tensors) tma_prefetch_map(&p.in[threadIdx.x]);
  __syncthreads();

  // ---- loads: the warp's rows of one (block, head), ahead of use by one tile
  auto tensor_of = [&](int tile) { return (tile >= p.first_tile[1]) + (tile >= p.first_tile[2]); };
  const int slabs_in = p.in_fp32 ? Shape::slabs(4) : Shape::slabs(2);
  const int slab_columns = p.in_fp32 ? kSlabBytes / 4 : kSlabBytes / 2;
  auto request = [&](const Item& it, int tile) {
    const int t = tensor_of(tile), head = tile - p.first_tile[t];
    const int token = uniform(it.row0) + warp_row, batch = uniform(it.batch);
    if (elect_one()) {
      mbar_arrive_expect_tx(full, slabs_in * Shape::kRows * kSlabBytes);
#pragma unroll 1
      for (int s = 0; s < slabs_in; ++s)
        tma_load_4d(stage_in + s * Shape::kRows * kSlabBytes, &p.in[t], full, kL2EvictFirst, s * slab_columns, token,
                    head, batch);
    }
    __syncwarp();
  };

  const RowReader<Shape> in(stage_in, row, part), out(stage_out, row, part);
  bool requested = false;
  uint32_t parity = 0;
  int buffer = 0;

  int turn = 0;
  for (int index = blockIdx.x; index < p.items; index += gridDim.x, turn ^= 1) {
    if (index != blockIdx.x) __syncthreads();  // everybody is done with the table and the other item
    const Item& it = control.items[turn];
    const Item& next = control.items[turn ^ 1];
    const bool used = it.tokens > 0;
    const int first = it.head_begin + group;
    if (used && !requested && first < it.head_end) request(it, first);
    requested = false;
    if (used && rotates) fill_table<Shape>(p, it, table_base, control.signs, p.signs != nullptr);
    if (threadIdx.x == 0) control.items[turn ^ 1] = decode_item(p, index + gridDim.x);
    if (!used && p.quantize) {  // a slot that no sequence needs: keep its scale harmless
      for (int tile = it.head_begin + threadIdx.x; tile < it.head_end; tile += blockDim.x) {
        const int t = tensor_of(tile), head = tile - p.first_tile[t];
        const RowTensor& tensor = p.tensors[t];
        tensor.descale[(int64_t(it.batch_out) * tensor.heads + head) * p.blocks + it.block] = 1.f;
      }
    }
    __syncthreads();
    if (!used) continue;

    using Row = TableRow<Shape::kLanes>;
    const Row table{table_base + Row::offset(warp_row + row, 0, p.table_pitch),
                    static_cast<uint32_t>(p.block_tokens * p.table_pitch)};
    const int warp_tokens = min(it.tokens - warp_row, Shape::kRows);  // may be <= 0

    for (int tile = first; tile < it.head_end; tile += p.groups) {
      const int t = tensor_of(tile), head = tile - p.first_tile[t];
      const RowTensor& tensor = p.tensors[t];
      const bool hadamard = tensor.hadamard != 0;

      // ---- read and rotate; then the buffer is free for the next tile
      float v[Shape::kValues];
      mbar_wait(full, parity);
      parity ^= 1;
      if constexpr (kInverse)
        load_gradient<Shape, Elem>(v, in, p.in_fp32 != 0);
      else
        load_forward<Shape, Elem>(v, p, in, table, control.masks[hadamard], tensor.rope != 0);
      __syncwarp();
      const bool last = tile + p.groups >= it.head_end;
      const int ahead = last ? next.head_begin + group : tile + p.groups;
      requested = last && next.exists && next.tokens > 0 && ahead < next.head_end;
      if (!last || requested) request(last ? next : it, ahead);
      if (warp_tokens < Shape::kRows) {  // rows of the next sequence, or beyond the end, do not count
        if (row >= warp_tokens) {
#pragma unroll
          for (int i = 0; i < Shape::kValues; ++i) v[i] = 0.f;
        }
      }

      if constexpr (!kInverse) {
        if (tensor.rope && p.partial_neox) rotate_partial_neox<Shape, false>(v, table, part, p.rotary_dim / (16 * Shape::kLanes));
      }

      // ---- transform
      if (hadamard) hadamard_but_neighbours<Shape>(v, part);
      if constexpr (kInverse) {
        if (hadamard) {
#pragma unroll
          for (int i = 0; i < Shape::kValues; i += 2) finish_pair(v[i], v[i + 1], Shape::kScale);
        }
        if (tensor.rope && p.partial_neox)
          rotate_partial_neox<Shape, true>(v, table, part, p.rotary_dim / (16 * Shape::kLanes));
      }

      // ---- scale and write to the output buffer, once its last store has left it
      float inverse = 1.f;
      if (!kInverse && p.quantize) {
        const uint32_t mine = warp_max(magnitude_bits(v, hadamard));
        if (lane == 0) control.amax[buffer][warp] = mine;
        named_sync(1 + group, p.group_warps * 32);
        uint32_t bits = 0;
#pragma unroll 1
        for (int w = 0; w < p.group_warps; ++w) bits = max(bits, control.amax[buffer][group * p.group_warps + w]);
        buffer ^= 1;
        const BlockScale scale = block_scale(bits);
        inverse = scale.inverse;
        if (lane == 0 && warp_row == 0)
          tensor.descale[(int64_t(it.batch_out) * tensor.heads + head) * p.blocks + it.block] =
              hadamard && bits != 0 ? scale.descale * Shape::kScale : scale.descale;
      }
      if (lane == 0) bulk_wait_read<0>();
      __syncwarp();
      if (!kInverse && p.quantize) {
        write_e4m3<Shape>(v, out, inverse, hadamard);
      } else {
        if (!kInverse && hadamard) {
#pragma unroll
          for (int i = 0; i < Shape::kValues; i += 2) finish_pair(v[i], v[i + 1], Shape::kScale);
        }
        write_16bit<Shape, Elem, kInverse>(v, p, out, table, control.masks[kInverse && hadamard], tensor.rope != 0);
      }

      // ---- store
      const int out_bytes = p.quantize ? 1 : 2;
      if (p.cu_seqlens == nullptr || warp_tokens == Shape::kRows) {
        fence_proxy_async_shared();
        __syncwarp();
        if (lane == 0 && warp_tokens > 0) {
#pragma unroll 1
          for (int s = 0; s < (p.quantize ? Shape::slabs(1) : Shape::slabs(2)); ++s)
            tma_store_4d(&p.out[t], stage_out + s * Shape::kRows * kSlabBytes, s * (kSlabBytes / out_bytes),
                         it.row0 + warp_row, head, it.batch);
          bulk_commit();
        }
      } else {  // the tail of a packed sequence: a tensor store would run into the next one
        __syncwarp();
        const int units = D * out_bytes / 16;
#pragma unroll 1
        for (int i = lane; i < warp_tokens * units; i += 32) {
          const int r = i / units, unit = i % units;
          const RowReader<Shape> source(stage_out, r, 0);
          char* dst = tensor.out + (it.row0 + warp_row + r) * tensor.out_token_bytes + head * tensor.out_head_bytes;
          *reinterpret_cast<uint4*>(dst + unit * 16) = lds128(source.unit(unit));
        }
        __syncwarp();
      }
    }
  }
  if (lane == 0) bulk_wait_read<0>();
}

template <int D, class Elem, bool kInverse>
const void* row_kernel_address() {
  return reinterpret_cast<const void*>(&row_kernel<D, Elem, kInverse>);
}

}  // namespace fa3::prep

// Fused rotary embedding -> random-sign Hadamard -> block scale -> e4m3. One pass over memory.
//
//   x (batch, token, head, D) 16-bit  ->  out e4m3, descale (batch, head, block), block = 128 (64)
//   tokens
//
// A work item is a block of tokens and a set of heads over all tensors of the launch. Its cos and
// sin are copied to shared memory once. Then a group of warps takes one (block, head) tile after
// the other; a lane holds a whole row (two lanes at D >= 192), so rotation and butterflies are
// register arithmetic in FP32 without shuffles, and the only exchange is the block maximum (a named
// barrier of the group).
//
// Memory moves by TMA, per warp: the warp's rows of the next tile are requested as soon as those of
// this one are in registers, and results leave from a second buffer. Nothing but the maximum
// couples warps, and the groups of an SM run out of step, which hides the phases of one behind
// those of the others.
//
// Any rotation, head dims 64 to 256, blocks of 64 or 128 tokens. Products instead of butterflies
// were no faster here: beside the maximum and the conversion, splitting rotated values in two bf16
// parts costs what it saves.
#pragma once
#include "prep/items.cuh"
#include "prep/row_io.cuh"

namespace fa3::prep {

template <int D>
struct BlockTraits : RowShape<D> {
  // Registers bind: 168 a thread at 12 warps hold 128 values, 128 at 16 hold 64; two lanes a row at
  // 8 warps.
  static constexpr int kThreads = D == 64 ? 512 : D <= 128 ? 384 : 256;
  static constexpr int kWarps = kThreads / 32;
  static FA3_HD constexpr int slabs(int element_bytes) {
    return (D * element_bytes + kSlabBytes - 1) / kSlabBytes;
  }
};

template <int D>
struct BlockControl {
  uint64_t full[BlockTraits<D>::kWarps];
  Item items[2];
  uint32_t amax[2][BlockTraits<D>::kWarps];
  SignTable<D> signs;
};

// cos and sin of the item's tokens -> shared memory, sin with the signs of its pair.
template <class Shape>
FA3_DEVICE void fill_table(const BlockParams& p, const Item& it, uint32_t table,
                           const SignTable<Shape::D>& signs) {
  using Row = TableRow<Shape::kLanes>;
  const Rotation& rotation = p.rotation;
  const int units = rotation.rotary_dim / 8, cells = p.block_tokens * units;
  const uint32_t to_sin = p.block_tokens * p.table_pitch;
  for (int i = threadIdx.x; i < cells; i += blockDim.x) {
    const int row = i / units, unit = i - row * units;
    const int token =
        min(row,
            it.tokens - 1);  // rows past the end take valid angles: 0 * NaN would reach the maximum
    const int position = rotation.position_ids ? rotation.position_ids[it.position_row + token]
                                               : it.position0 + token;
    const uint32_t at = table + Row::offset(row, unit, p.table_pitch);
    copy_angles(at, at + to_sin, rotation.cos, rotation.sin,
                checked_position(position, rotation.positions), rotation.rotary_dim / 2, unit);
  }
  cp_async_wait_all();
  if (p.signs == nullptr) return;
  for (int i = threadIdx.x; i < cells; i += blockDim.x) {
    const int row = i / units, unit = i - row * units;
    const uint32_t at = table + to_sin + Row::offset(row, unit, p.table_pitch);
    sts128(at, signs.fix(lds128(at), 4 * unit, rotation.rotary_dim, rotation.interleaved != 0));
  }
}

template <int D, class Elem>
__global__ void __launch_bounds__(BlockTraits<D>::kThreads, 1)
    block_kernel(const __grid_constant__ BlockParams p) {
  using Shape = BlockTraits<D>;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& control = *reinterpret_cast<BlockControl<D>*>(shared + p.control_offset);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32;
  const int group = warp / p.group_warps, warp_row = (warp % p.group_warps) * Shape::kRows;
  const int row = lane_row<Shape::kLanes>(lane), part = Shape::kLanes == 1 ? 0 : lane & 1;

  const uint32_t stage_in = smem_addr(shared) + warp * p.stage_in_bytes;
  const uint32_t stage_out =
      smem_addr(shared) + warps * p.stage_in_bytes + warp * p.stage_out_bytes;
  const uint32_t table_base = smem_addr(shared) + p.table_offset;
  const uint32_t full = smem_addr(&control.full[warp]);

  // ---- set-up: barriers, signs, the first item
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int w = 0; w < warps; ++w) mbar_init(smem_addr(&control.full[w]), 1);
    mbar_init_fence();
    control.items[0] = decode_item(p, blockIdx.x);
  }
  control.signs.fill(p.signs, warp, warps, lane);
  if (threadIdx.x < p.num_tensors) tma_prefetch_map(&p.in[threadIdx.x]);
  __syncthreads();

  // ---- loads: the warp's rows of one (block, head), ahead of use by one tile
  auto tensor_of = [&](int head) { return (head >= p.first_tile[1]) + (head >= p.first_tile[2]); };
  auto request = [&](const Item& it, int index) {
    const int any_head = it.phase + index * p.phases;
    const int t = tensor_of(any_head), head = any_head - p.first_tile[t];
    const int token = uniform(it.token0) + warp_row, batch = uniform(it.batch);
    if (elect_one()) {
      mbar_arrive_expect_tx(full, Shape::slabs(2) * Shape::kRows * kSlabBytes);
#pragma unroll
      for (int s = 0; s < Shape::slabs(2); ++s)
        tma_load_4d(stage_in + s * Shape::kRows * kSlabBytes, &p.in[t], full, kL2EvictNormal,
                    s * kSlabBytes / 2, head, token, batch);
    }
    __syncwarp();
  };
  const RowReader<Shape> in(stage_in, row, part), out(stage_out, row, part);
  bool requested = false;
  uint32_t parity = 0;
  int buffer = 0;

  int turn = 0;
  for (int index = blockIdx.x; index < p.items; index += gridDim.x, turn ^= 1) {
    if (index != blockIdx.x)
      __syncthreads();  // everybody is done with the table and the other item
    const Item& it = control.items[turn];
    const Item& next = control.items[turn ^ 1];
    const bool used = it.tokens > 0;
    if (used && !requested && group < it.count) request(it, group);
    requested = false;
    if (used && p.rotation.cos != nullptr) fill_table<Shape>(p, it, table_base, control.signs);
    if (threadIdx.x == 0) control.items[turn ^ 1] = decode_item(p, index + gridDim.x);
    if (!used) {  // a slot that no sequence needs: keep its scale harmless
      for (int i = threadIdx.x; i < it.count; i += blockDim.x) {
        const int any_head = it.phase + i * p.phases, t = tensor_of(any_head);
        const BlockTensor& tensor = p.tensors[t];
        tensor.descale[(int64_t(it.batch_out) * tensor.heads + any_head - p.first_tile[t]) *
                           p.blocks +
                       it.block] = 1.f;
      }
    }
    __syncthreads();
    if (!used) continue;

    using Row = TableRow<Shape::kLanes>;
    const Row table{table_base + Row::offset(warp_row + row, 0, p.table_pitch),
                    static_cast<uint32_t>(p.block_tokens * p.table_pitch)};
    const int warp_tokens = min(it.tokens - warp_row, Shape::kRows);  // may be <= 0

#pragma unroll 1
    for (int i = group; i < it.count; i += p.groups) {
      const int any_head = it.phase + i * p.phases;
      const int t = tensor_of(any_head), head = any_head - p.first_tile[t];
      const BlockTensor& tensor = p.tensors[t];
      const bool hadamard = tensor.hadamard != 0;

      // ---- read and rotate; then the buffer is free for the next tile
      float v[Shape::kValues];
      mbar_wait(full, parity);
      parity ^= 1;
      load_forward<Shape, Elem>(v, p.rotation, in, table, control.signs.masks[hadamard],
                                tensor.rope != 0);
      __syncwarp();
      const bool last = i + p.groups >= it.count;
      requested = last && next.tokens > 0 && group < next.count;
      if (!last || requested) request(last ? next : it, last ? group : i + p.groups);
      if (warp_tokens <
          Shape::kRows) {  // rows of the next sequence, or beyond the end, do not count
        if (row >= warp_tokens) {
#pragma unroll
          for (int e = 0; e < Shape::kValues; ++e) v[e] = 0.f;
        }
      }
      if (tensor.rope && p.rotation.partial_neox)
        rotate_partial_neox<Shape, false>(v, table, part,
                                          p.rotation.rotary_dim / (16 * Shape::kLanes));

      // ---- transform, block maximum
      if (hadamard) hadamard_but_neighbours<Shape>(v, part);
      const uint32_t mine = warp_max(magnitude_bits(v, hadamard));
      if (lane == 0) control.amax[buffer][warp] = mine;
      named_sync(1 + group, p.group_warps * 32);
      uint32_t bits = 0;
#pragma unroll 1
      for (int w = 0; w < p.group_warps; ++w)
        bits = max(bits, control.amax[buffer][group * p.group_warps + w]);
      buffer ^= 1;
      const BlockScale scale = block_scale(bits, hadamard ? Shape::kScale : 1.f);
      if (lane == 0 && warp_row == 0)
        tensor.descale[(int64_t(it.batch_out) * tensor.heads + head) * p.blocks + it.block] =
            scale.descale;

      // ---- codes to the output buffer, once its last store has left it; store
      if (lane == 0) bulk_wait_read<0>();
      __syncwarp();
      write_e4m3<Shape>(v, out, scale.inverse, hadamard);
      if (p.sequences.cu_seqlens == nullptr || warp_tokens == Shape::kRows) {
        fence_proxy_async_shared();
        __syncwarp();
        if (lane == 0 && warp_tokens > 0) {
#pragma unroll
          for (int s = 0; s < Shape::slabs(1); ++s)
            tma_store_4d(&p.out[t], stage_out + s * Shape::kRows * kSlabBytes, s * kSlabBytes, head,
                         it.token0 + warp_row, it.batch);
          bulk_commit();
        }
      } else {  // the tail of a packed sequence: a tensor store would run into the next one
        __syncwarp();
        constexpr int kUnits = D / 16;
#pragma unroll 1
        for (int cell = lane; cell < warp_tokens * kUnits; cell += 32) {
          const int r = cell / kUnits, unit = cell % kUnits;
          const RowReader<Shape> source(stage_out, r, 0);
          char* dst = tensor.out + (it.token0 + warp_row + r) * tensor.out_token_bytes +
                      head * tensor.out_head_bytes;
          *reinterpret_cast<uint4*>(dst + unit * 16) = lds128(source.unit(unit));
        }
        __syncwarp();
      }
    }
  }
  if (lane == 0) bulk_wait_read<0>();
}

template <int D, class Elem>
const void* block_kernel_address() {
  return reinterpret_cast<const void*>(&block_kernel<D, Elem>);
}

}  // namespace fa3::prep

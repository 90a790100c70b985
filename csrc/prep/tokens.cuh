// Rotary embedding and random-sign Hadamard with 16-bit results, and the gradient of either. One
// pass over memory.
//
//   x (batch, token, head, D) 16-bit  ->  rotation, signs, Hadamard  ->  16-bit
//   inverse: gradient 16-bit or fp32  ->  Hadamard, signs, rotation by the opposite angle  ->
//   16-bit
//
// Without a block maximum every row stands alone, so a warp's tile is what lies together in memory:
// all heads of a token, or a few tokens where heads are few. Tiles go to the warps of the whole GPU
// in memory order, which is how a copy walks; warps share nothing (each has its tile's angles in
// its own shared memory) and never wait for each other.
//
// A lane holds a row (token, head), two lanes at D >= 192; lanes of a token read the same angles, a
// broadcast. TMA brings the tile after next, or the next one, while this one is computed, and takes
// results from a second buffer.
#pragma once
#include "prep/row_io.cuh"
#include "prep/tile_order.cuh"

namespace fa3::prep {

template <int D>
struct TokenTraits : RowShape<D> {
  static constexpr int kThreads = D == 64    ? 512
                                  : D <= 128 ? 384
                                             : 256;  // registers, as in blocks.cuh
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMaxStages = 2;
  static FA3_HD constexpr int slabs(int element_bytes) {
    return (D * element_bytes + kSlabBytes - 1) / kSlabBytes;
  }
};

template <int D>
struct TokenControl {
  uint64_t full[TokenTraits<D>::kWarps][TokenTraits<D>::kMaxStages];
  SignTable<D> signs;
};

template <int D, class Elem, bool kInverse>
__global__ void __launch_bounds__(TokenTraits<D>::kThreads, 1)
    token_kernel(const __grid_constant__ TokenParams p) {
  using Shape = TokenTraits<D>;
  using Row = TableRow<Shape::kLanes>;
  constexpr int kRowsLog2 = Shape::kRows == 32 ? 5 : 4;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& control = *reinterpret_cast<TokenControl<D>*>(shared + p.control_offset);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32;
  const int row = lane_row<Shape::kLanes>(lane), part = Shape::kLanes == 1 ? 0 : lane & 1;

  // Buffers of the warp: inputs, output, angles. All input and output buffers come first, for their
  // alignment.
  const uint32_t base = smem_addr(shared) + warp * p.warp_bytes;
  const uint32_t stage_out = base + p.stages * p.stage_in_bytes;
  const uint32_t table_base = smem_addr(shared) + warps * p.warp_bytes + warp * p.table_bytes;
  const uint32_t full = smem_addr(&control.full[warp][0]);
  const bool rotates = p.rotation.cos != nullptr;

  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < warps * Shape::kMaxStages; ++i)
      mbar_init(smem_addr(&control.full[0][0]) + 8 * i, 1);
    mbar_init_fence();
  }
  control.signs.fill(p.signs, warp, warps, lane);
  if (threadIdx.x < p.num_tensors) tma_prefetch_map(&p.in[threadIdx.x]);
  __syncthreads();

  const int slabs_in = p.in_fp32 ? Shape::slabs(4) : Shape::slabs(2);
  const int slab_columns = p.in_fp32 ? kSlabBytes / 4 : kSlabBytes / 2;
  auto request = [&](int index, int stage) {
    const Tile tile = locate_tile(p, kRowsLog2, index);
    if (elect_one()) {
      mbar_arrive_expect_tx(full + 8 * stage, slabs_in * Shape::kRows * kSlabBytes);
#pragma unroll 1
      for (int s = 0; s < slabs_in; ++s)
        tma_load_4d(base + stage * p.stage_in_bytes + s * Shape::kRows * kSlabBytes,
                    &p.in[tile.tensor], full + 8 * stage, kL2EvictNormal, s * slab_columns,
                    tile.head, tile.token, tile.batch);
    }
    __syncwarp();
  };
  // Angles of the tile's tokens: copied ahead of use, then sin gets the signs. Both by the same
  // lanes.
  const int units = p.rotation.rotary_dim / 8;
  auto copy_table = [&](int index) {
    const Tile tile = locate_tile(p, kRowsLog2, index);
    const TokenTensor& tensor = p.tensors[tile.tensor];
    if (!tensor.rope) return;
    const int cells = units << (kRowsLog2 - tensor.heads_log2);
#pragma unroll 1
    for (int i = lane; i < cells; i += 32) {
      const int token = i / units, unit = i - token * units;
      const uint32_t at = table_base + Row::offset(token, unit, p.table_pitch);
      copy_angles(at, at + p.table_bytes / 2, p.rotation.cos, p.rotation.sin,
                  position_of(p, tile.batch, tile.token + token), p.rotation.rotary_dim / 2, unit);
    }
  };
  auto finish_table = [&](const TokenTensor& tensor) {
    cp_async_wait_all();
    if (p.signs != nullptr && tensor.hadamard) {
      const int cells = units << (kRowsLog2 - tensor.heads_log2);
#pragma unroll 1
      for (int i = lane; i < cells; i += 32) {
        const int token = i / units, unit = i - token * units;
        const uint32_t at =
            table_base + p.table_bytes / 2 + Row::offset(token, unit, p.table_pitch);
        sts128(at, control.signs.fix(lds128(at), 4 * unit, p.rotation.rotary_dim,
                                     p.rotation.interleaved != 0));
      }
    }
    __syncwarp();
  };

  const RowReader<Shape> out(stage_out, row, part);
  const int stride = gridDim.x * warps;
  const int begin = blockIdx.x * warps + warp;
  int stage = 0;
  uint32_t parity = 0;
  for (int s = 0; s < p.stages; ++s)
    if (begin + s * stride < p.tiles) request(begin + s * stride, s);
  if (rotates && begin < p.tiles) copy_table(begin);

#pragma unroll 1
  for (int index = begin; index < p.tiles; index += stride) {
    const Tile tile = locate_tile(p, kRowsLog2, index);
    const TokenTensor& tensor = p.tensors[tile.tensor];
    const bool hadamard = tensor.hadamard != 0, rope = tensor.rope != 0;
    const Row table{table_base + Row::offset(row >> tensor.heads_log2, 0, p.table_pitch),
                    static_cast<uint32_t>(p.table_bytes / 2)};
    if (rope) finish_table(tensor);

    // ---- read and rotate; then buffer and angles are free
    float v[Shape::kValues];
    const RowReader<Shape> in(base + stage * p.stage_in_bytes, row, part);
    mbar_wait(full + 8 * stage, parity);
    if constexpr (kInverse)
      load_gradient<Shape, Elem>(v, in, p.in_fp32 != 0);
    else
      load_forward<Shape, Elem>(v, p.rotation, in, table, control.signs.masks[hadamard], rope);
    __syncwarp();
    if (index + p.stages * stride < p.tiles) request(index + p.stages * stride, stage);
    if (++stage == p.stages) {
      stage = 0;
      parity ^= 1;
    }
    const int distance = p.rotation.rotary_dim / (16 * Shape::kLanes);
    if constexpr (!kInverse) {
      if (rope && p.rotation.partial_neox) {
        rotate_partial_neox<Shape, false>(v, table, part, distance);
        __syncwarp();
      }
      if (rotates && index + stride < p.tiles) copy_table(index + stride);
    }

    // ---- transform
    if (hadamard) {
      hadamard_but_neighbours<Shape>(v, part);
#pragma unroll
      for (int i = 0; i < Shape::kValues; i += 2) finish_pair(v[i], v[i + 1], Shape::kScale);
    }
    if constexpr (kInverse) {
      if (rope && p.rotation.partial_neox)
        rotate_partial_neox<Shape, true>(v, table, part, distance);
    }

    // ---- write to the output buffer, once its last store has left it; store
    if (lane == 0) bulk_wait_read<0>();
    __syncwarp();
    write_16bit<Shape, Elem, kInverse>(v, p.rotation, out, table,
                                       control.signs.masks[kInverse && hadamard], rope);
    fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int s = 0; s < Shape::slabs(2); ++s)
        tma_store_4d(&p.out[tile.tensor], stage_out + s * Shape::kRows * kSlabBytes,
                     s * kSlabBytes / 2, tile.head, tile.token, tile.batch);
      bulk_commit();
    }
    if constexpr (kInverse) {
      if (rotates && index + stride < p.tiles) copy_table(index + stride);
    }
  }
  if (lane == 0) bulk_wait_read<0>();
}

template <int D, class Elem, bool kInverse>
const void* token_kernel_address() {
  return reinterpret_cast<const void*>(&token_kernel<D, Elem, kInverse>);
}

}  // namespace fa3::prep

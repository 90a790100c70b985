// Choice of kernel and work distribution for fa3_prep.
#include <climits>

#include "prep/blocks.cuh"
#include "prep/launch.h"
#include "prep/tiles.cuh"
#include "prep/tokens.cuh"
#include "tile/layout.cuh"

namespace fa3::prep {

#define FA3_PREP_HEAD_DIMS(X) X(64) X(96) X(128) X(192) X(256)
#define FA3_PREP_EXTERN(D)                                            \
  extern template const void* block_kernel_address<D, bf16>();        \
  extern template const void* block_kernel_address<D, fp16>();        \
  extern template const void* token_kernel_address<D, bf16, false>(); \
  extern template const void* token_kernel_address<D, bf16, true>();  \
  extern template const void* token_kernel_address<D, fp16, false>(); \
  extern template const void* token_kernel_address<D, fp16, true>();
FA3_PREP_HEAD_DIMS(FA3_PREP_EXTERN)
#undef FA3_PREP_EXTERN
#define FA3_PREP_EXTERN_TILES(D)                                              \
  extern template const void* tile_kernel_address<D, bf16>(bool, bool, bool); \
  extern template const void* tile_kernel_address<D, fp16>(bool, bool, bool);
FA3_PREP_EXTERN_TILES(64)
FA3_PREP_EXTERN_TILES(128)
#undef FA3_PREP_EXTERN_TILES

namespace {

constexpr const char* kTensorNames[kMaxTensors] = {"tensors[0]", "tensors[1]", "tensors[2]"};

// What the host must know of a kernel. rows: of a warp's tile; lanes: of a row; control_bytes:
// after the buffers.
struct Kernel {
  const void* address = nullptr;
  int warps, rows, lanes, control_bytes;
};

template <int D>
Kernel block_kernel_of(int dtype) {
  using Traits = BlockTraits<D>;
  return {dtype == FA3_FP16 ? block_kernel_address<D, fp16>() : block_kernel_address<D, bf16>(),
          Traits::kWarps, Traits::kRows, Traits::kLanes, sizeof(BlockControl<D>)};
}

template <int D>
Kernel token_kernel_of(int dtype, bool inverse) {
  using Traits = TokenTraits<D>;
  const void* address;
  if (dtype == FA3_FP16)
    address =
        inverse ? token_kernel_address<D, fp16, true>() : token_kernel_address<D, fp16, false>();
  else
    address =
        inverse ? token_kernel_address<D, bf16, true>() : token_kernel_address<D, bf16, false>();
  return {address, Traits::kWarps, Traits::kRows, Traits::kLanes, sizeof(TokenControl<D>)};
}

Kernel find_block_kernel(int head_dim, int dtype) {
  switch (head_dim) {
#define FA3_PREP_CASE(D) \
  case D: return block_kernel_of<D>(dtype);
    FA3_PREP_HEAD_DIMS(FA3_PREP_CASE)
#undef FA3_PREP_CASE
    default: return {};
  }
}

Kernel find_token_kernel(int head_dim, int dtype, bool inverse) {
  switch (head_dim) {
#define FA3_PREP_CASE(D) \
  case D: return token_kernel_of<D>(dtype, inverse);
    FA3_PREP_HEAD_DIMS(FA3_PREP_CASE)
#undef FA3_PREP_CASE
    default: return {};
  }
}

// Descales of a head, per batch entry. Packed: sequence b owns the slots from cu_seqlens[b] / block
// + b on, so total / block + batch hold any packing.
int slots_of(const fa3_prep_params& p, int block) {
  return p.cu_seqlens ? p.total / block + p.batch : ceil_div(p.seqlen, block);
}

// ---- what all launches share ------------------------------------------------------------------

Rotation rotation_of(const fa3_prep_params& p, bool used) {
  Rotation r{};
  r.position_ids = p.position_ids;
  if (!used) return r;
  r.cos = p.cos;
  r.sin = p.sin;
  r.positions = p.positions;
  r.rotary_dim = p.rotary_dim;
  r.interleaved = p.interleaved;
  r.partial_neox = !p.interleaved && p.rotary_dim < p.head_dim;
  return r;
}

Sequences sequences_of(const fa3_prep_params& p) {
  return {p.cu_seqlens, p.batch, p.seqlen, p.total};
}

int table_pitch(int rotary_dim, int lanes) {
  if (rotary_dim == 0) return 0;
  return lanes == 1 ? TableRow<1>::pitch(rotary_dim) : TableRow<2>::pitch(rotary_dim);
}

int slab_bytes(int head_dim, int element, int rows) {
  return ceil_div(head_dim * element, kSlabBytes) * rows * kSlabBytes;
}

// (head_dim, head, token, batch), box of one slab x `heads` x `tokens`.
int encode_rows(CUtensorMap* map, const char* name, const fa3_tensor& tensor, int dtype,
                const fa3_prep_params& p, int head_count, int heads, int tokens) {
  const int bytes = dtype_bytes(dtype);
  TensorMapShape shape{};
  shape.rank = 4;
  shape.swizzle_bytes = kSlabBytes;
  const int64_t dims[4] = {p.head_dim, head_count, p.cu_seqlens ? p.total : p.seqlen,
                           p.cu_seqlens ? 1 : p.batch};
  const int64_t strides[3] = {tensor.stride_head * bytes, tensor.stride_token * bytes,
                              tensor.stride_batch * bytes};
  const int box[4] = {kSlabBytes / bytes, heads, tokens, 1};
  for (int i = 0; i < 4; ++i) shape.dims[i] = dims[i], shape.box[i] = box[i];
  for (int i = 0; i < 3; ++i) shape.strides_bytes[i] = strides[i];
  return encode_tensor_map(map, name, dtype, tensor.ptr, shape);
}

int launch(const Kernel& kernel, int blocks, int warps, int shared_bytes, void* params,
           void* stream, const char* what) {
  FA3_TRY(allow_shared_memory(kernel.address, kSharedBytesPerBlock));
  void* arguments[] = {params};
  return check_cuda(cudaLaunchKernel(kernel.address, dim3(blocks), dim3(warps * 32), arguments,
                                     shared_bytes, static_cast<cudaStream_t>(stream)),
                    what);
}

// ---- the block kernel ------------------------------------------------------------------------

// Into how many items the heads of a block are cut: the makespan of `sm_count` thread blocks that
// take items in turn, in units of one tile per group. An item costs its rounds and `fill` more
// (barriers, filling the table).
int choose_phases(int64_t blocks, int heads, int groups, int sm_count, int fill, int fewest) {
  int best = 1;
  int64_t best_cost = INT64_MAX;
  for (int phases = fewest < heads ? fewest : heads; phases <= heads; ++phases) {
    const int64_t waves = (blocks * phases + sm_count - 1) / sm_count;
    const int64_t cost = waves * (ceil_div(ceil_div(heads, phases), groups) + fill);
    if (cost < best_cost) best = phases, best_cost = cost;
  }
  return best;
}

// `chosen`: indices of the tensors of this launch.
}  // namespace

bool has_transform(int head_dim) {
  return find_block_kernel(head_dim, FA3_BF16).address != nullptr;
}

int launch_blocks(const fa3_prep_params& p, const int* chosen, int count, const Device& device) {
  const Kernel kernel = find_block_kernel(p.head_dim, p.out_dtype);
  BlockParams block{};
  int heads = 0;
  bool rope = false, hadamard = false;
  for (int i = 0; i < kMaxTensors; ++i) block.first_tile[i] = INT_MAX;
  for (int i = 0; i < count; ++i) {
    const fa3_prep_tensor& tensor = p.tensors[chosen[i]];
    block.tensors[i] = {static_cast<char*>(tensor.out.ptr),
                        tensor.out.stride_token,
                        tensor.out.stride_head,
                        tensor.descale,
                        tensor.heads,
                        tensor.rope,
                        tensor.hadamard};
    block.first_tile[i] = heads;
    heads += tensor.heads;
    rope |= tensor.rope != 0;
    hadamard |= tensor.hadamard != 0;
  }
  block.rotation = rotation_of(p, rope);
  block.sequences = sequences_of(p);
  block.signs = hadamard ? p.signs : nullptr;
  block.num_tensors = count;
  block.heads_total = heads;
  block.block_tokens = p.block_size;
  block.group_warps = p.block_size / kernel.rows;
  block.stage_in_bytes = slab_bytes(p.head_dim, 2, kernel.rows);
  block.stage_out_bytes = slab_bytes(p.head_dim, 1, kernel.rows);
  block.table_pitch = table_pitch(block.rotation.rotary_dim, kernel.lanes);
  int warps = 0, shared_bytes = INT_MAX;
  for (block.groups = kernel.warps / block.group_warps; block.groups > 0; --block.groups) {
    warps = block.groups * block.group_warps;
    block.table_offset = warps * (block.stage_in_bytes + block.stage_out_bytes);
    block.control_offset = block.table_offset + 2 * p.block_size * block.table_pitch;
    shared_bytes = block.control_offset + kernel.control_bytes;
    if (shared_bytes <= kSharedBytesPerBlock) break;
  }
  if (block.groups == 0)
    return fail(FA3_INTERNAL,
                "%s: no work distribution fits shared memory (head_dim %d, rotary_dim %d)",
                kFunction, p.head_dim, block.rotation.rotary_dim);

  block.blocks = slots_of(p, p.block_size);
  const int64_t blocks = p.cu_seqlens ? block.blocks : int64_t(p.batch) * block.blocks;
  // Without a table to fill, two items a block: their heads alternate, so that neighbouring thread
  // blocks read neighbouring heads.
  block.phases = choose_phases(blocks, heads, block.groups, device.sm_count, 1, rope ? 1 : 2);
  if (blocks * block.phases > INT_MAX)
    return fail(FA3_UNSUPPORTED, "%s: %lld blocks of %d tokens are too many", kFunction,
                static_cast<long long>(blocks), p.block_size);
  block.items = static_cast<int>(blocks * block.phases);
  for (int i = 0; i < count; ++i) {
    const fa3_prep_tensor& tensor = p.tensors[chosen[i]];
    const char* name = kTensorNames[chosen[i]];
    FA3_TRY(encode_rows(&block.in[i], name, tensor.x, p.in_dtype, p, tensor.heads, 1, kernel.rows));
    FA3_TRY(
        encode_rows(&block.out[i], name, tensor.out, FA3_E4M3, p, tensor.heads, 1, kernel.rows));
  }
  const int grid = block.items < device.sm_count ? block.items : device.sm_count;
  return launch(kernel, grid, warps, shared_bytes, &block, p.stream,
                "fa3_prep: launch of the block kernel");
}

namespace {

// ---- the token kernel ------------------------------------------------------------------------

// Heads of a warp's tile of `rows` rows: fewest idle lanes, then most heads, which lie together in
// memory.
int choose_heads_log2(int heads, int rows) {
  constexpr int kFewestLog2 = 3;
  int best = kFewestLog2;
  for (int log2 = kFewestLog2; 1 << log2 <= rows; ++log2)
    if (round_up(heads, 1 << log2) <= round_up(heads, 1 << best)) best = log2;
  return best;
}

}  // namespace

int launch_tokens(const fa3_prep_params& p, const int* chosen, int count, const Device& device) {
  const Kernel kernel = find_token_kernel(p.head_dim, p.out_dtype, p.inverse != 0);
  const int rows_log2 = kernel.rows == 32 ? 5 : 4;
  TokenParams token{};
  bool rope = false, hadamard = false;
  for (int i = 0; i < kMaxTensors; ++i) token.tensors[i].first_tile = INT_MAX;
  for (int i = 0; i < count; ++i) {
    const fa3_prep_tensor& tensor = p.tensors[chosen[i]];
    TokenTensor& t = token.tensors[i];
    t.heads_log2 = choose_heads_log2(tensor.heads, kernel.rows);
    t.head_chunks = ceil_div(tensor.heads, 1 << t.heads_log2);
    t.rope = tensor.rope;
    t.hadamard = tensor.hadamard;
    const int tokens_log2 = rows_log2 - t.heads_log2;
    if (tokens_log2 > token.group_tokens_log2) token.group_tokens_log2 = tokens_log2;
    rope |= t.rope != 0;
    hadamard |= t.hadamard != 0;
    const char* name = kTensorNames[chosen[i]];
    const int box_heads = 1 << t.heads_log2, box_tokens = 1 << tokens_log2;
    FA3_TRY(encode_rows(&token.in[i], name, tensor.x, p.in_dtype, p, tensor.heads, box_heads,
                        box_tokens));
    FA3_TRY(encode_rows(&token.out[i], name, tensor.out, p.out_dtype, p, tensor.heads, box_heads,
                        box_tokens));
  }
  for (int i = 0; i < count; ++i) {
    TokenTensor& t = token.tensors[i];
    t.first_tile = token.tiles_per_group;
    token.tiles_per_group += t.head_chunks
                             << (token.group_tokens_log2 - (rows_log2 - t.heads_log2));
  }
  token.rotation = rotation_of(p, rope);
  token.sequences = sequences_of(p);
  token.signs = hadamard ? p.signs : nullptr;
  token.num_tensors = count;
  token.in_fp32 = p.in_dtype == FA3_FP32;
  token.groups_per_batch =
      ceil_div(p.cu_seqlens ? p.total : p.seqlen, 1 << token.group_tokens_log2);
  const int64_t tiles =
      int64_t(token.groups_per_batch) * (p.cu_seqlens ? 1 : p.batch) * token.tiles_per_group;
  if (tiles > INT_MAX)
    return fail(FA3_UNSUPPORTED, "%s: %lld tiles are too many", kFunction,
                static_cast<long long>(tiles));
  token.tiles = static_cast<int>(tiles);
  token.stage_in_bytes = slab_bytes(p.head_dim, dtype_bytes(p.in_dtype), kernel.rows);
  token.stage_out_bytes = slab_bytes(p.head_dim, 2, kernel.rows);
  token.table_pitch = table_pitch(token.rotation.rotary_dim, kernel.lanes);
  token.table_bytes = 2 * (token.table_pitch << token.group_tokens_log2);
  // Most warps first, then a second input buffer.
  int warps = 0, shared_bytes = 0;
  auto fits = [&](int w, int stages) {
    token.stages = stages;
    token.warp_bytes = stages * token.stage_in_bytes + token.stage_out_bytes;
    warps = w;
    token.control_offset = w * (token.warp_bytes + token.table_bytes);
    shared_bytes = token.control_offset + kernel.control_bytes;
    return shared_bytes <= kSharedBytesPerBlock;
  };
  constexpr int kMaxStages = 2;
  int most = kernel.warps;
  while (most > 1 && !fits(most, 1)) --most;
  if (!fits(most, kMaxStages)) fits(most, 1);
  int grid = device.sm_count;
  if (int64_t(grid) * warps > token.tiles) grid = ceil_div(token.tiles, warps);
  return launch(kernel, grid, warps, shared_bytes, &token, p.stream,
                "fa3_prep: launch of the token kernel");
}

// ---- the tile kernel -------------------------------------------------------------------------

bool takes_tiles(const fa3_prep_params& p, const fa3_prep_tensor& tensor) {
  if (p.options & kPlain || (p.head_dim != 64 && p.head_dim != 128)) return false;
  if (p.in_dtype == FA3_FP32 || tensor.quantize) return false;
  return !tensor.rope || p.rotary_dim == p.head_dim;
}

namespace {
template <int D>
int launch_tiles_of(const fa3_prep_params& p, const int* chosen, int count, const Device& device) {
  using Traits = TileTraits<D>;
  TileParams tile{};
  const int rows_log2 = Traits::kRowsLog2;
  const fa3_prep_tensor& first = p.tensors[chosen[0]];
  const bool rope = first.rope, hadamard = first.hadamard;
  for (int i = 0; i < kMaxTensors; ++i) tile.tensors[i].first_tile = INT_MAX;
  for (int i = 0; i < count; ++i) {
    const fa3_prep_tensor& tensor = p.tensors[chosen[i]];
    TokenTensor& t = tile.tensors[i];
    t.heads_log2 = choose_heads_log2(tensor.heads, 1 << rows_log2);
    t.head_chunks = ceil_div(tensor.heads, 1 << t.heads_log2);
    const int tokens_log2 = rows_log2 - t.heads_log2;
    if (tokens_log2 > tile.group_tokens_log2) tile.group_tokens_log2 = tokens_log2;
    const char* name = kTensorNames[chosen[i]];
    FA3_TRY(encode_rows(&tile.in[i], name, tensor.x, p.in_dtype, p, tensor.heads, 1 << t.heads_log2,
                        1 << tokens_log2));
    FA3_TRY(encode_rows(&tile.out[i], name, tensor.out, p.out_dtype, p, tensor.heads,
                        1 << t.heads_log2, 1 << tokens_log2));
  }
  for (int i = 0; i < count; ++i) {
    TokenTensor& t = tile.tensors[i];
    t.first_tile = tile.tiles_per_group;
    tile.tiles_per_group += t.head_chunks << (tile.group_tokens_log2 - (rows_log2 - t.heads_log2));
  }
  tile.rotation = rotation_of(p, rope);
  tile.sequences = sequences_of(p);
  tile.signs = hadamard ? p.signs : nullptr;
  tile.num_tensors = count;
  tile.groups_per_batch = ceil_div(p.cu_seqlens ? p.total : p.seqlen, 1 << tile.group_tokens_log2);
  const int64_t tiles =
      int64_t(tile.groups_per_batch) * (p.cu_seqlens ? 1 : p.batch) * tile.tiles_per_group;
  if (tiles > INT_MAX)
    return fail(FA3_UNSUPPORTED, "%s: %lld tiles are too many", kFunction,
                static_cast<long long>(tiles));
  tile.tiles = static_cast<int>(tiles);
  const int angles = rope ? round_up(Traits::kAngleBytes << tile.group_tokens_log2, 1024) : 0;
  tile.stage_bytes = Traits::kTileBytes + angles;
  const int matrices = hadamard ? Traits::matrix_bytes(p.inverse != 0) : 0;
  const int fixed = matrices + int(sizeof(TileControl<D>));
  for (tile.stages = Traits::kMaxStages;
       tile.stages > 2 &&
       Traits::kWarpgroups * tile.stages * tile.stage_bytes + fixed > kSharedBytesPerBlock;)
    --tile.stages;
  tile.matrix_offset = Traits::kWarpgroups * tile.stages * tile.stage_bytes;
  tile.control_offset = tile.matrix_offset + matrices;
  Kernel kernel{};
  kernel.address = p.out_dtype == FA3_FP16
                       ? tile_kernel_address<D, fp16>(rope, hadamard, p.inverse)
                       : tile_kernel_address<D, bf16>(rope, hadamard, p.inverse);
  int grid = device.sm_count;
  if (grid * Traits::kWarpgroups > tile.tiles) grid = ceil_div(tile.tiles, Traits::kWarpgroups);
  return launch(kernel, grid, Traits::kThreads / 32,
                tile.control_offset + int(sizeof(TileControl<D>)), &tile, p.stream,
                "fa3_prep: launch of the tile kernel");
}
}  // namespace

int launch_tiles(const fa3_prep_params& p, const int* chosen, int count, const Device& device) {
  return p.head_dim == 64 ? launch_tiles_of<64>(p, chosen, count, device)
                          : launch_tiles_of<128>(p, chosen, count, device);
}

// ---- the rotary kernel -----------------------------------------------------------------------

int launch_rotation(const fa3_prep_params& p, const int* chosen, int count, const Device& device) {
  RopeParams rope{};
  const int in_bytes = dtype_bytes(p.in_dtype);
  int heads = 0;
  for (int i = 0; i < count; ++i) {
    const fa3_prep_tensor& tensor = p.tensors[chosen[i]];
    constexpr int kOutBytes = 2;
    rope.tensors[i] = {static_cast<const char*>(tensor.x.ptr),
                       static_cast<char*>(tensor.out.ptr),
                       tensor.x.stride_batch * in_bytes,
                       tensor.x.stride_token * in_bytes,
                       tensor.x.stride_head * in_bytes,
                       tensor.out.stride_batch * kOutBytes,
                       tensor.out.stride_token * kOutBytes,
                       tensor.out.stride_head * kOutBytes,
                       tensor.heads};
    heads += tensor.heads;
  }
  rope.rotation = rotation_of(p, true);
  rope.sequences = sequences_of(p);
  rope.num_tensors = count;
  rope.head_dim = p.head_dim;
  rope.rows = rows_of(p);
  rope.sm_count = device.sm_count;
  rope.direction = p.inverse ? -1.f : 1.f;
  // A warp that walks over more heads loads cos and sin less often; more warps fill the GPU and
  // even out its end.
  constexpr int kWarpsPerSm = 4 * 32, kFewestHeads = 8;
  rope.heads_per_warp = heads;
  while (rope.heads_per_warp > kFewestHeads &&
         rope.rows * ceil_div(heads, rope.heads_per_warp) < int64_t(device.sm_count) * kWarpsPerSm)
    rope.heads_per_warp = ceil_div(rope.heads_per_warp, 2);
  return launch_rope(rope, p.in_dtype, p.out_dtype, static_cast<cudaStream_t>(p.stream));
}

// ---- dequantization --------------------------------------------------------------------------

int launch_codes(const fa3_prep_params& p, const Device& device) {
  DequantizeParams d{};
  for (int t = 0; t < p.num_tensors; ++t) {
    const fa3_prep_tensor& tensor = p.tensors[t];
    constexpr int kOutBytes = 2;
    d.tensors[t] = {static_cast<const char*>(tensor.x.ptr),
                    static_cast<char*>(tensor.out.ptr),
                    tensor.x.stride_batch,
                    tensor.x.stride_token,
                    tensor.x.stride_head,
                    tensor.out.stride_batch * kOutBytes,
                    tensor.out.stride_token * kOutBytes,
                    tensor.out.stride_head * kOutBytes,
                    tensor.descale,
                    tensor.heads};
  }
  d.sequences = sequences_of(p);
  d.num_tensors = p.num_tensors;
  d.head_dim = p.head_dim;
  d.block_tokens = p.block_size;
  d.blocks = slots_of(p, p.block_size);
  d.sm_count = device.sm_count;
  d.rows = rows_of(p);
  return launch_dequantize(d, p.out_dtype, static_cast<cudaStream_t>(p.stream));
}

}  // namespace fa3::prep

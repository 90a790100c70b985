// fa3_prep: checks, choice of kernel and of work distribution.
//
//   e4m3 results                 block kernel (prep/blocks.cuh)
//   16-bit, with a transform     token kernel (prep/tokens.cuh)
//   16-bit, rotation only        rotary kernel (prep/rope.cu)
//   16-bit from e4m3             dequantization (prep/dequantize.cu)
// One launch per kind of result; tensors of a call share it wherever they can.
#include <climits>

#include "host.h"
#include "prep/blocks.cuh"
#include "prep/tokens.cuh"
#include "tile/layout.cuh"

namespace fa3::prep {

#define FA3_PREP_HEAD_DIMS(X) X(64) X(96) X(128) X(192) X(256)
#define FA3_PREP_EXTERN(D)                                          \
  extern template const void* block_kernel_address<D, bf16>();      \
  extern template const void* block_kernel_address<D, fp16>();      \
  extern template const void* token_kernel_address<D, bf16, false>(); \
  extern template const void* token_kernel_address<D, bf16, true>();  \
  extern template const void* token_kernel_address<D, fp16, false>(); \
  extern template const void* token_kernel_address<D, fp16, true>();
FA3_PREP_HEAD_DIMS(FA3_PREP_EXTERN)
#undef FA3_PREP_EXTERN

namespace {

constexpr const char* kFunction = "fa3_prep";
constexpr const char* kTensorNames[kMaxTensors] = {"tensors[0]", "tensors[1]", "tensors[2]"};

// What the host must know of a kernel. rows: of a warp's tile; lanes: of a row; control_bytes: after the buffers.
struct Kernel {
  const void* address = nullptr;
  int warps, rows, lanes, control_bytes;
};

template <int D>
Kernel block_kernel_of(int dtype) {
  using Traits = BlockTraits<D>;
  return {dtype == FA3_FP16 ? block_kernel_address<D, fp16>() : block_kernel_address<D, bf16>(), Traits::kWarps,
          Traits::kRows, Traits::kLanes, sizeof(BlockControl<D>)};
}

template <int D>
Kernel token_kernel_of(int dtype, bool inverse) {
  using Traits = TokenTraits<D>;
  const void* address;
  if (dtype == FA3_FP16)
    address = inverse ? token_kernel_address<D, fp16, true>() : token_kernel_address<D, fp16, false>();
  else
    address = inverse ? token_kernel_address<D, bf16, true>() : token_kernel_address<D, bf16, false>();
  return {address, Traits::kWarps, Traits::kRows, Traits::kLanes, sizeof(TokenControl<D>)};
}

Kernel find_block_kernel(int head_dim, int dtype) {
  switch (head_dim) {
#define FA3_PREP_CASE(D) case D: return block_kernel_of<D>(dtype);
    FA3_PREP_HEAD_DIMS(FA3_PREP_CASE)
#undef FA3_PREP_CASE
    default: return {};
  }
}

Kernel find_token_kernel(int head_dim, int dtype, bool inverse) {
  switch (head_dim) {
#define FA3_PREP_CASE(D) case D: return token_kernel_of<D>(dtype, inverse);
    FA3_PREP_HEAD_DIMS(FA3_PREP_CASE)
#undef FA3_PREP_CASE
    default: return {};
  }
}

bool has_transform(int head_dim) { return find_block_kernel(head_dim, FA3_BF16).address != nullptr; }

int64_t rows_of(const fa3_prep_params& p) { return p.cu_seqlens ? p.total : int64_t(p.batch) * p.seqlen; }

// Descales of a head, per batch entry. Packed: sequence b owns the slots from cu_seqlens[b] / block + b on, so
// total / block + batch hold any packing.
int slots_of(const fa3_prep_params& p) {
  return p.cu_seqlens ? p.total / p.block_size + p.batch : ceil_div(p.seqlen, p.block_size);
}

// ---- checks ----------------------------------------------------------------------------------

// Codes in: the descale is an input, and there is no other stage.
int check_dequantize(const fa3_prep_params& p, int t) {
  const fa3_prep_tensor& tensor = p.tensors[t];
  if (tensor.rope || tensor.hadamard || tensor.quantize || p.inverse)
    return fail(FA3_INVALID_ARGUMENT, "%s: rope, hadamard, quantize and inverse must be 0 with in_dtype e4m3, got %d, %d, %d, %d",
                kFunction, tensor.rope, tensor.hadamard, tensor.quantize, p.inverse);
  if (!has_transform(p.head_dim))
    return fail(FA3_UNSUPPORTED, "%s: head_dim must be 64, 96, 128, 192 or 256 with in_dtype e4m3, got %d", kFunction,
                p.head_dim);
  return check_pointer(kFunction, "descale", tensor.descale, sizeof(float));
}

int check_stages(const fa3_prep_params& p, int t) {
  const fa3_prep_tensor& tensor = p.tensors[t];
  const struct { const char* name; int value; } flags[3] = {
      {"rope", tensor.rope}, {"hadamard", tensor.hadamard}, {"quantize", tensor.quantize}};
  for (const auto& flag : flags)
    if (flag.value != 0 && flag.value != 1)
      return fail(FA3_INVALID_ARGUMENT, "%s: tensors[%d].%s must be 0 or 1, got %d", kFunction, t, flag.name, flag.value);
  if (!tensor.rope && !tensor.hadamard && !tensor.quantize)
    return fail(FA3_INVALID_ARGUMENT, "%s: tensors[%d] has no stage on (rope, hadamard and quantize are 0)", kFunction, t);
  if (p.inverse && tensor.quantize)
    return fail(FA3_INVALID_ARGUMENT, "%s: tensors[%d].quantize must be 0 with inverse (the gradient passes straight "
                "through the quantization), got 1", kFunction, t);
  if ((tensor.descale != nullptr) != (tensor.quantize != 0))
    return fail(FA3_INVALID_ARGUMENT, "%s: tensors[%d].descale must be given exactly with quantize, got %p with quantize %d",
                kFunction, t, static_cast<void*>(tensor.descale), tensor.quantize);
  if ((tensor.hadamard || tensor.quantize) && !has_transform(p.head_dim))
    return fail(FA3_UNSUPPORTED, "%s: head_dim must be 64, 96, 128, 192 or 256 with hadamard or quantize, got %d",
                kFunction, p.head_dim);
  return FA3_OK;
}

int check_rotation(const fa3_prep_params& p) {
  FA3_TRY(check_pointer(kFunction, "cos", p.cos, 16));
  FA3_TRY(check_pointer(kFunction, "sin", p.sin, 16));
  if (p.positions < 1)
    return fail(FA3_INVALID_ARGUMENT, "%s: positions must be at least 1, got %d", kFunction, p.positions);
  if (p.rotary_dim < 2 || p.rotary_dim % 2 != 0 || p.rotary_dim > p.head_dim)
    return fail(FA3_INVALID_ARGUMENT, "%s: rotary_dim must be even, at least 2 and at most head_dim (%d), got %d", kFunction,
                p.head_dim, p.rotary_dim);
  bool rows = false;
  for (int t = 0; t < p.num_tensors; ++t) rows |= p.tensors[t].rope && (p.tensors[t].hadamard || p.tensors[t].quantize);
  const int step = p.interleaved ? 8 : p.head_dim >= 192 ? 32 : 16;
  if (rows && p.rotary_dim % step != 0)
    return fail(FA3_UNSUPPORTED, "%s: rotary_dim must be a multiple of %d with hadamard or quantize at head_dim %d (%s), got %d",
                kFunction, step, p.head_dim, p.interleaved ? "interleaved" : "not interleaved", p.rotary_dim);
  return FA3_OK;
}

int check_arguments(const fa3_prep_params& p) {
  if (p.num_tensors < 1 || p.num_tensors > kMaxTensors)
    return fail(FA3_INVALID_ARGUMENT, "%s: num_tensors must be 1 to %d, got %d", kFunction, kMaxTensors, p.num_tensors);
  if (p.batch < 0 || p.seqlen < 0 || p.total < 0)
    return fail(FA3_INVALID_ARGUMENT, "%s: sizes must not be negative, got batch %d, seqlen %d, total %d", kFunction, p.batch,
                p.seqlen, p.total);
  if (rows_of(p) > INT_MAX)
    return fail(FA3_UNSUPPORTED, "%s: batch * seqlen must stay below 2^31, got %d * %d", kFunction, p.batch, p.seqlen);
  if (p.head_dim < 8 || p.head_dim > 256 || p.head_dim % 8 != 0)
    return fail(FA3_UNSUPPORTED, "%s: head_dim must be a multiple of 8 from 8 to 256, got %d", kFunction, p.head_dim);
  if (p.out_dtype != FA3_BF16 && p.out_dtype != FA3_FP16)
    return fail(FA3_INVALID_ARGUMENT, "%s: out_dtype must be bf16 or fp16, got %s", kFunction, dtype_name(p.out_dtype));
  const bool same = p.in_dtype == p.out_dtype;
  if (!same && p.in_dtype != FA3_E4M3 && !(p.inverse && p.in_dtype == FA3_FP32))
    return fail(FA3_INVALID_ARGUMENT, "%s: in_dtype must be out_dtype (%s), e4m3%s, got %s", kFunction,
                dtype_name(p.out_dtype), p.inverse ? " or fp32" : "", dtype_name(p.in_dtype));
  if (p.block_size != 128 && p.block_size != 64)
    return fail(FA3_UNSUPPORTED, "%s: block_size must be 64 or 128, got %d", kFunction, p.block_size);

  bool rope = false;
  const int64_t batch = p.cu_seqlens ? 1 : p.batch, tokens = p.cu_seqlens ? p.total : p.seqlen;
  for (int t = 0; t < p.num_tensors; ++t) {
    const fa3_prep_tensor& tensor = p.tensors[t];
    if (tensor.heads < 1)
      return fail(FA3_INVALID_ARGUMENT, "%s: tensors[%d].heads must be at least 1, got %d", kFunction, t, tensor.heads);
    FA3_TRY(p.in_dtype == FA3_E4M3 ? check_dequantize(p, t) : check_stages(p, t));
    rope |= tensor.rope != 0;
    if (tensor.hadamard && p.signs != nullptr) FA3_TRY(check_pointer(kFunction, "signs", p.signs, sizeof(float)));
    FA3_TRY(check_tensor(kFunction, kTensorNames[t], tensor.x, p.in_dtype, batch, tokens, tensor.heads, p.head_dim));
    FA3_TRY(check_tensor(kFunction, kTensorNames[t], tensor.out, tensor.quantize ? FA3_E4M3 : p.out_dtype, batch, tokens,
                         tensor.heads, p.head_dim));
  }
  return rope ? check_rotation(p) : FA3_OK;
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

Sequences sequences_of(const fa3_prep_params& p) { return {p.cu_seqlens, p.batch, p.seqlen, p.total}; }

int table_pitch(int rotary_dim, int lanes) {
  if (rotary_dim == 0) return 0;
  return lanes == 1 ? TableRow<1>::pitch(rotary_dim) : TableRow<2>::pitch(rotary_dim);
}

int slab_bytes(int head_dim, int element, int rows) {
  return ceil_div(head_dim * element, kSlabBytes) * rows * kSlabBytes;
}

// (head_dim, head, token, batch), box of `columns` x `heads` x `tokens`.
int encode_rows(CUtensorMap* map, const char* name, const fa3_tensor& tensor, int dtype, const fa3_prep_params& p,
                int head_count, int columns, int heads, int tokens, int swizzle_bytes) {
  const int bytes = dtype_bytes(dtype);
  TensorMapShape shape{};
  shape.rank = 4;
  shape.swizzle_bytes = swizzle_bytes;
  const int64_t dims[4] = {p.head_dim, head_count, p.cu_seqlens ? p.total : p.seqlen, p.cu_seqlens ? 1 : p.batch};
  const int64_t strides[3] = {tensor.stride_head * bytes, tensor.stride_token * bytes, tensor.stride_batch * bytes};
  const int box[4] = {columns, heads, tokens, 1};
  for (int i = 0; i < 4; ++i) shape.dims[i] = dims[i], shape.box[i] = box[i];
  for (int i = 0; i < 3; ++i) shape.strides_bytes[i] = strides[i];
  return encode_tensor_map(map, name, dtype, tensor.ptr, shape);
}

int launch(const Kernel& kernel, int blocks, int warps, int shared_bytes, void* params, void* stream,
           const char* what) {
  FA3_TRY(allow_shared_memory(kernel.address, kSharedBytesPerBlock));
  void* arguments[] = {params};
  return check_cuda(cudaLaunchKernel(kernel.address, dim3(blocks), dim3(warps * 32), arguments, shared_bytes,
                                     static_cast<cudaStream_t>(stream)),
                    what);
}

// ---- the block kernel ------------------------------------------------------------------------

// Into how many items the heads of a block are cut: the makespan of `sm_count` thread blocks that take items in turn, in
// units of one tile per group. An item costs its rounds and `fill` more (barriers, filling the table).
int choose_phases(int64_t blocks, int heads, int groups, int sm_count, int fill) {
  int best = 1;
  int64_t best_cost = INT64_MAX;
  for (int phases = 1; phases <= heads; ++phases) {
    const int64_t waves = (blocks * phases + sm_count - 1) / sm_count;
    const int64_t cost = waves * (ceil_div(ceil_div(heads, phases), groups) + fill);
    if (cost < best_cost) best = phases, best_cost = cost;
  }
  return best;
}

// `chosen`: indices of the tensors of this launch.
int launch_blocks(const fa3_prep_params& p, const int* chosen, int count, const Device& device) {
  const Kernel kernel = find_block_kernel(p.head_dim, p.out_dtype);
  BlockParams block{};
  int heads = 0;
  bool rope = false, hadamard = false;
  for (int i = 0; i < kMaxTensors; ++i) block.first_tile[i] = INT_MAX;
  for (int i = 0; i < count; ++i) {
    const fa3_prep_tensor& tensor = p.tensors[chosen[i]];
    block.tensors[i] = {static_cast<char*>(tensor.out.ptr), tensor.out.stride_token, tensor.out.stride_head,
                        tensor.descale, tensor.heads, tensor.rope, tensor.hadamard};
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
    return fail(FA3_INTERNAL, "%s: no work distribution fits shared memory (head_dim %d, rotary_dim %d)", kFunction,
                p.head_dim, block.rotation.rotary_dim);

  block.blocks = slots_of(p);
  const int64_t blocks = p.cu_seqlens ? block.blocks : int64_t(p.batch) * block.blocks;
  block.phases = choose_phases(blocks, heads, block.groups, device.sm_count, 1);
  if (blocks * block.phases > INT_MAX)
    return fail(FA3_UNSUPPORTED, "%s: %lld blocks of %d tokens are too many", kFunction, static_cast<long long>(blocks),
                p.block_size);
  block.items = static_cast<int>(blocks * block.phases);
  constexpr int kAheadHeads = 4;
  block.ahead_heads = block.phases == 1 ? kAheadHeads : 0;
  for (int i = 0; i < count; ++i) {
    const fa3_prep_tensor& tensor = p.tensors[chosen[i]];
    const char* name = kTensorNames[chosen[i]];
    FA3_TRY(encode_rows(&block.in[i], name, tensor.x, p.in_dtype, p, tensor.heads, kSlabBytes / 2, 1, kernel.rows, kSlabBytes));
    FA3_TRY(encode_rows(&block.out[i], name, tensor.out, FA3_E4M3, p, tensor.heads, kSlabBytes, 1, kernel.rows, kSlabBytes));
    if (block.ahead_heads > 0)
      FA3_TRY(encode_rows(&block.ahead[i], name, tensor.x, p.in_dtype, p, tensor.heads, p.head_dim, block.ahead_heads, kernel.rows, 0));
  }
  const int grid = block.items < device.sm_count ? block.items : device.sm_count;
  return launch(kernel, grid, warps, shared_bytes, &block, p.stream, "fa3_prep: launch of the block kernel");
}

// ---- the token kernel ------------------------------------------------------------------------

// Heads of a warp's tile of `rows` rows: fewest idle lanes, then most heads, which lie together in memory.
int choose_heads_log2(int heads, int rows) {
  constexpr int kFewestLog2 = 3;
  int best = kFewestLog2;
  for (int log2 = kFewestLog2; 1 << log2 <= rows; ++log2)
    if (round_up(heads, 1 << log2) <= round_up(heads, 1 << best)) best = log2;
  return best;
}

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
    const int in_columns = kSlabBytes / dtype_bytes(p.in_dtype);
    FA3_TRY(encode_rows(&token.in[i], name, tensor.x, p.in_dtype, p, tensor.heads, in_columns, 1 << t.heads_log2, 1 << tokens_log2, kSlabBytes));
    FA3_TRY(encode_rows(&token.out[i], name, tensor.out, p.out_dtype, p, tensor.heads, kSlabBytes / 2, 1 << t.heads_log2, 1 << tokens_log2, kSlabBytes));
  }
  for (int i = 0; i < count; ++i) {
    TokenTensor& t = token.tensors[i];
    t.first_tile = token.tiles_per_group;
    token.tiles_per_group += t.head_chunks << (token.group_tokens_log2 - (rows_log2 - t.heads_log2));
  }
  token.rotation = rotation_of(p, rope);
  token.sequences = sequences_of(p);
  token.signs = hadamard ? p.signs : nullptr;
  token.num_tensors = count;
  token.in_fp32 = p.in_dtype == FA3_FP32;
  token.groups_per_batch = ceil_div(p.cu_seqlens ? p.total : p.seqlen, 1 << token.group_tokens_log2);
  const int64_t tiles = int64_t(token.groups_per_batch) * (p.cu_seqlens ? 1 : p.batch) * token.tiles_per_group;
  if (tiles > INT_MAX)
    return fail(FA3_UNSUPPORTED, "%s: %lld tiles are too many", kFunction, static_cast<long long>(tiles));
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
  return launch(kernel, grid, warps, shared_bytes, &token, p.stream, "fa3_prep: launch of the token kernel");
}

// ---- the rotary kernel -----------------------------------------------------------------------

int launch_rotation(const fa3_prep_params& p, const int* chosen, int count, const Device& device) {
  RopeParams rope{};
  const int in_bytes = dtype_bytes(p.in_dtype);
  int heads = 0;
  for (int i = 0; i < count; ++i) {
    const fa3_prep_tensor& tensor = p.tensors[chosen[i]];
    constexpr int kOutBytes = 2;
    rope.tensors[i] = {static_cast<const char*>(tensor.x.ptr), static_cast<char*>(tensor.out.ptr),
                       tensor.x.stride_batch * in_bytes, tensor.x.stride_token * in_bytes,
                       tensor.x.stride_head * in_bytes, tensor.out.stride_batch * kOutBytes,
                       tensor.out.stride_token * kOutBytes, tensor.out.stride_head * kOutBytes, tensor.heads};
    heads += tensor.heads;
  }
  rope.rotation = rotation_of(p, true);
  rope.sequences = sequences_of(p);
  rope.num_tensors = count;
  rope.head_dim = p.head_dim;
  rope.rows = rows_of(p);
  rope.direction = p.inverse ? -1.f : 1.f;
  // A warp that walks over more heads loads cos and sin less often; more warps fill the GPU and even out its end.
  constexpr int kWarpsPerSm = 8 * 32, kFewestHeads = 8;
  rope.heads_per_warp = heads;
  while (rope.heads_per_warp > kFewestHeads &&
         rope.rows * ceil_div(heads, rope.heads_per_warp) < int64_t(device.sm_count) * kWarpsPerSm)
    rope.heads_per_warp = ceil_div(rope.heads_per_warp, 2);
  return launch_rope(rope, p.in_dtype, p.out_dtype, static_cast<cudaStream_t>(p.stream));
}

// ---- dequantization --------------------------------------------------------------------------

int launch_codes(const fa3_prep_params& p) {
  DequantizeParams d{};
  for (int t = 0; t < p.num_tensors; ++t) {
    const fa3_prep_tensor& tensor = p.tensors[t];
    constexpr int kOutBytes = 2;
    d.tensors[t] = {static_cast<const char*>(tensor.x.ptr), static_cast<char*>(tensor.out.ptr),
                    tensor.x.stride_batch, tensor.x.stride_token, tensor.x.stride_head,
                    tensor.out.stride_batch * kOutBytes, tensor.out.stride_token * kOutBytes,
                    tensor.out.stride_head * kOutBytes, tensor.descale, tensor.heads};
  }
  d.sequences = sequences_of(p);
  d.num_tensors = p.num_tensors;
  d.head_dim = p.head_dim;
  d.block_tokens = p.block_size;
  d.blocks = slots_of(p);
  d.rows = rows_of(p);
  return launch_dequantize(d, p.out_dtype, static_cast<cudaStream_t>(p.stream));
}

// ---- kinds of launches -----------------------------------------------------------------------

using Launch = int (*)(const fa3_prep_params&, const int* chosen, int count, const Device&);
constexpr Launch kLaunches[] = {launch_rotation, launch_tokens, launch_blocks, launch_blocks};
constexpr int kKinds = sizeof(kLaunches) / sizeof(kLaunches[0]);

// Index into kLaunches. The block kernel's table of sines holds the signs, so of the rotated tensors those with and without
// the transform part.
int kind_of(const fa3_prep_params& p, const fa3_prep_tensor& tensor) {
  if (!tensor.quantize) return tensor.hadamard ? 1 : 0;
  return p.signs != nullptr && tensor.rope && !tensor.hadamard ? 3 : 2;
}

}  // namespace
}  // namespace fa3::prep

extern "C" int fa3_prep(const fa3_prep_params* params) {
  using namespace fa3;
  using namespace fa3::prep;
  if (params == nullptr) return fail(FA3_INVALID_ARGUMENT, "%s: params is NULL", kFunction);
  const fa3_prep_params& p = *params;
  FA3_TRY(check_arguments(p));
  Device device;
  FA3_TRY(current_device(kFunction, &device));
  if (rows_of(p) == 0) return FA3_OK;
  if (p.in_dtype == FA3_E4M3) return launch_codes(p);
  for (int kind = 0; kind < kKinds; ++kind) {
    int chosen[kMaxTensors], count = 0;
    for (int t = 0; t < p.num_tensors; ++t)
      if (kind_of(p, p.tensors[t]) == kind) chosen[count++] = t;
    if (count > 0) FA3_TRY(kLaunches[kind](p, chosen, count, device));
  }
  return FA3_OK;
}

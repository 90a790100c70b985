// fa3_prep: checks, choice of kernel and of work distribution.
//
// 16-bit results without a Hadamard transform go to the elementwise rotary kernel (prep/rope.cu), everything else to the
// row kernel (prep/rows.cuh). One launch per kind of result; tensors of a call share it wherever they can.
#include <climits>

#include "host.h"
#include "prep/rows.cuh"
#include "tile/layout.cuh"

namespace fa3::prep {

#define FA3_PREP_ROW_KERNELS(X) X(64) X(96) X(128) X(192) X(256)
#define FA3_PREP_EXTERN(D)                                               \
  extern template const void* row_kernel_address<D, bf16, false>();      \
  extern template const void* row_kernel_address<D, bf16, true>();       \
  extern template const void* row_kernel_address<D, fp16, false>();      \
  extern template const void* row_kernel_address<D, fp16, true>();
FA3_PREP_ROW_KERNELS(FA3_PREP_EXTERN)
#undef FA3_PREP_EXTERN

namespace {

constexpr const char* kFunction = "fa3_prep";
constexpr const char* kTensorNames[kMaxTensors] = {"tensors[0]", "tensors[1]", "tensors[2]"};

struct RowKernel {
  const void* address = nullptr;
  int threads, rows, control_bytes, lanes;  // of a block at most; of a warp; of RowControl; lanes a row
};

template <int D>
RowKernel row_kernel_of(int dtype, bool inverse) {
  RowKernel k;
  if (dtype == FA3_FP16)
    k.address = inverse ? row_kernel_address<D, fp16, true>() : row_kernel_address<D, fp16, false>();
  else
    k.address = inverse ? row_kernel_address<D, bf16, true>() : row_kernel_address<D, bf16, false>();
  k.threads = RowTraits<D>::kThreads;
  k.rows = RowTraits<D>::kRows;
  k.lanes = RowTraits<D>::kLanes;
  k.control_bytes = sizeof(RowControl<D>);
  return k;
}

RowKernel find_row_kernel(int head_dim, int dtype, bool inverse) {
  switch (head_dim) {
#define FA3_PREP_CASE(D) case D: return row_kernel_of<D>(dtype, inverse);
    FA3_PREP_ROW_KERNELS(FA3_PREP_CASE)
#undef FA3_PREP_CASE
    default: return {};
  }
}

int64_t rows_of(const fa3_prep_params& p) { return p.cu_seqlens ? p.total : int64_t(p.batch) * p.seqlen; }

// ---- checks ----------------------------------------------------------------------------------

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
  if ((tensor.hadamard || tensor.quantize) && find_row_kernel(p.head_dim, FA3_BF16, false).address == nullptr)
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
  if (!same && !(p.inverse && p.in_dtype == FA3_FP32))
    return fail(FA3_INVALID_ARGUMENT, "%s: in_dtype must be out_dtype (%s)%s, got %s", kFunction, dtype_name(p.out_dtype),
                p.inverse ? " or fp32" : "", dtype_name(p.in_dtype));
  if (p.block_size != 128 && p.block_size != 64)
    return fail(FA3_UNSUPPORTED, "%s: block_size must be 64 or 128, got %d", kFunction, p.block_size);

  bool rope = false;
  const int64_t batch = p.cu_seqlens ? 1 : p.batch, tokens = p.cu_seqlens ? p.total : p.seqlen;
  for (int t = 0; t < p.num_tensors; ++t) {
    const fa3_prep_tensor& tensor = p.tensors[t];
    if (tensor.heads < 1)
      return fail(FA3_INVALID_ARGUMENT, "%s: tensors[%d].heads must be at least 1, got %d", kFunction, t, tensor.heads);
    FA3_TRY(check_stages(p, t));
    rope |= tensor.rope != 0;
    if (tensor.hadamard && p.signs != nullptr) FA3_TRY(check_pointer(kFunction, "signs", p.signs, sizeof(float)));
    FA3_TRY(check_tensor(kFunction, kTensorNames[t], tensor.x, p.in_dtype, batch, tokens, tensor.heads, p.head_dim));
    FA3_TRY(check_tensor(kFunction, kTensorNames[t], tensor.out, tensor.quantize ? FA3_E4M3 : p.out_dtype, batch, tokens,
                         tensor.heads, p.head_dim));
  }
  return rope ? check_rotation(p) : FA3_OK;
}

// ---- the row kernel --------------------------------------------------------------------------

// Geometry of a launch: how many tokens share a table, how many warps fit.
struct RowPlan {
  int block_tokens = 0, warps = 0, groups = 0, group_warps = 0;
  int stage_in = 0, stage_out = 0, pitch = 0, table = 0, control = 0, shared_bytes = 0;
};

int slab_bytes(int head_dim, int element, int rows) {
  return ceil_div(head_dim * element, kSlabBytes) * rows * kSlabBytes;
}

RowPlan plan_rows(const RowKernel& kernel, int head_dim, int rotary_dim, int in_bytes, bool quantize, int block_size) {
  RowPlan best;
  // Scale blocks fix the size of an item; 16-bit results take the one that lets most warps fit.
  for (int tokens = quantize ? block_size : 128; tokens >= (quantize ? block_size : kernel.rows); tokens /= 2) {
    RowPlan plan;
    plan.block_tokens = tokens;
    plan.group_warps = tokens / kernel.rows;
    plan.stage_in = slab_bytes(head_dim, in_bytes, kernel.rows);
    plan.stage_out = slab_bytes(head_dim, quantize ? 1 : 2, kernel.rows);
    plan.pitch = rotary_dim == 0        ? 0
                 : kernel.lanes == 1    ? TableRow<1>::pitch(rotary_dim)
                                        : TableRow<2>::pitch(rotary_dim);
    const int table = 2 * tokens * plan.pitch;
    for (plan.groups = kernel.threads / 32 / plan.group_warps; plan.groups > 0; --plan.groups) {
      plan.warps = plan.groups * plan.group_warps;
      plan.table = plan.warps * (plan.stage_in + plan.stage_out);
      plan.control = round_up(plan.table + table, 16);
      plan.shared_bytes = plan.control + kernel.control_bytes;
      if (plan.shared_bytes <= kSharedBytesPerBlock) break;
    }
    if (plan.groups > 0 && plan.warps > best.warps) best = plan;
  }
  return best;
}

// Into how many ranges the heads of a block are cut: the makespan of `sm_count` blocks that take items in turn, in units of
// one tile per group. An item costs its rounds and about one more (barriers, filling the table).
int choose_phases(int64_t blocks, int heads, int groups, int sm_count) {
  int best = 1;
  int64_t best_cost = INT64_MAX;
  for (int phases = 1; phases <= heads; ++phases) {
    const int per_item = ceil_div(heads, phases);
    if (ceil_div(heads, per_item) != phases) continue;
    const int64_t waves = (blocks * phases + sm_count - 1) / sm_count;
    const int64_t cost = waves * (ceil_div(per_item, groups) + 1);
    if (cost < best_cost) best = phases, best_cost = cost;
  }
  return best;
}

int encode_rows(CUtensorMap* map, const char* name, const fa3_tensor& tensor, int dtype, const fa3_prep_params& p, int heads,
                int rows) {
  const int bytes = dtype_bytes(dtype);
  TensorMapShape shape{};
  shape.rank = 4;
  shape.swizzle_bytes = kSlabBytes;
  const int64_t dims[4] = {p.head_dim, p.cu_seqlens ? p.total : p.seqlen, heads, p.cu_seqlens ? 1 : p.batch};
  const int64_t strides[3] = {tensor.stride_token * bytes, tensor.stride_head * bytes, tensor.stride_batch * bytes};
  const int box[4] = {kSlabBytes / bytes, rows, 1, 1};
  for (int i = 0; i < 4; ++i) shape.dims[i] = dims[i], shape.box[i] = box[i];
  for (int i = 0; i < 3; ++i) shape.strides_bytes[i] = strides[i];
  return encode_tensor_map(map, name, dtype, tensor.ptr, shape);
}

// `chosen`: indices of the tensors of this launch.
int launch_rows(const fa3_prep_params& p, const int* chosen, int count, const Device& device) {
  const bool quantize = p.tensors[chosen[0]].quantize != 0;
  const RowKernel kernel = find_row_kernel(p.head_dim, p.out_dtype, p.inverse != 0);
  RowParams row{};
  int heads = 0;
  bool rope = false, hadamard = false;
  for (int i = 0; i < kMaxTensors; ++i) row.first_tile[i] = INT_MAX;
  for (int i = 0; i < count; ++i) {
    const fa3_prep_tensor& tensor = p.tensors[chosen[i]];
    const int out_dtype = quantize ? FA3_E4M3 : p.out_dtype, out_bytes = dtype_bytes(out_dtype);
    const char* name = kTensorNames[chosen[i]];
    FA3_TRY(encode_rows(&row.in[i], name, tensor.x, p.in_dtype, p, tensor.heads, kernel.rows));
    FA3_TRY(encode_rows(&row.out[i], name, tensor.out, out_dtype, p, tensor.heads, kernel.rows));
    row.tensors[i] = {static_cast<char*>(tensor.out.ptr), tensor.out.stride_token * out_bytes,
                      tensor.out.stride_head * out_bytes, tensor.descale, tensor.heads, tensor.rope, tensor.hadamard};
    row.first_tile[i] = heads;
    heads += tensor.heads;
    rope |= tensor.rope != 0;
    hadamard |= tensor.hadamard != 0;
  }
  row.cos = rope ? p.cos : nullptr;
  row.sin = rope ? p.sin : nullptr;
  row.signs = hadamard ? p.signs : nullptr;
  row.position_ids = p.position_ids;
  row.cu_seqlens = p.cu_seqlens;
  row.num_tensors = count;
  row.batch = p.batch;
  row.seqlen = p.seqlen;
  row.total = p.total;
  row.positions = p.positions;
  row.rotary_dim = rope ? p.rotary_dim : 0;
  row.interleaved = p.interleaved;
  row.partial_neox = !p.interleaved && p.rotary_dim < p.head_dim;
  row.quantize = quantize;
  row.in_fp32 = p.in_dtype == FA3_FP32;

  const RowPlan plan =
      plan_rows(kernel, p.head_dim, row.rotary_dim, dtype_bytes(p.in_dtype), quantize, p.block_size);
  if (plan.groups == 0)
    return fail(FA3_INTERNAL, "%s: no work distribution fits shared memory (head_dim %d, rotary_dim %d)", kFunction,
                p.head_dim, row.rotary_dim);
  row.block_tokens = plan.block_tokens;
  row.groups = plan.groups;
  row.group_warps = plan.group_warps;
  row.stage_in_bytes = plan.stage_in;
  row.stage_out_bytes = plan.stage_out;
  row.table_pitch = plan.pitch;
  row.table_offset = plan.table;
  row.control_offset = plan.control;
  row.heads_total = heads;
  // Packed: sequence b owns the slots from cu_seqlens[b] / block + b on, so total / block + batch hold any packing.
  row.blocks = p.cu_seqlens ? p.total / plan.block_tokens + p.batch : ceil_div(p.seqlen, plan.block_tokens);
  const int64_t blocks = p.cu_seqlens ? row.blocks : int64_t(p.batch) * row.blocks;
  row.phases = choose_phases(blocks, heads, plan.groups, device.sm_count);
  row.heads_per_phase = ceil_div(heads, row.phases);
  if (blocks * row.phases > INT_MAX)
    return fail(FA3_UNSUPPORTED, "%s: %lld blocks of %d tokens are too many", kFunction, static_cast<long long>(blocks),
                plan.block_tokens);
  row.items = static_cast<int>(blocks * row.phases);

  FA3_TRY(allow_shared_memory(kernel.address, kSharedBytesPerBlock));
  void* arguments[] = {&row};
  const dim3 grid(row.items < device.sm_count ? row.items : device.sm_count);
  return check_cuda(cudaLaunchKernel(kernel.address, grid, dim3(plan.warps * 32), arguments, plan.shared_bytes,
                                     static_cast<cudaStream_t>(p.stream)),
                    "fa3_prep: launch of the row kernel");
}

// ---- the elementwise kernel ------------------------------------------------------------------

int launch_elementwise(const fa3_prep_params& p, const int* chosen, int count, const Device& device) {
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
  rope.cos = p.cos;
  rope.sin = p.sin;
  rope.position_ids = p.position_ids;
  rope.cu_seqlens = p.cu_seqlens;
  rope.num_tensors = count;
  rope.batch = p.batch;
  rope.seqlen = p.seqlen;
  rope.total = p.total;
  rope.positions = p.positions;
  rope.head_dim = p.head_dim;
  rope.rotary_dim = p.rotary_dim;
  rope.interleaved = p.interleaved;
  rope.rows = rows_of(p);
  rope.direction = p.inverse ? -1.f : 1.f;
  // Walking over more heads spreads the cost of cos and sin; fewer give more threads. Enough threads come first.
  constexpr int kMostHeads = 16, kFewestHeads = 4, kThreadsPerSm = 4 * 768;
  const int64_t threads_per_head = rope.rows * (p.head_dim / 16 + 1);
  rope.heads_per_block = kMostHeads;
  while (rope.heads_per_block > kFewestHeads &&
         threads_per_head * ceil_div(heads, rope.heads_per_block) < int64_t(device.sm_count) * kThreadsPerSm)
    rope.heads_per_block /= 2;
  return launch_rope(rope, p.in_dtype, p.out_dtype, static_cast<cudaStream_t>(p.stream));
}

// Which launch a tensor can share. Tables of cos and sin hold the signs, so of the rotated tensors those with and without the
// transform part.
int kind_of(const fa3_prep_params& p, const fa3_prep_tensor& tensor) {
  if (!tensor.hadamard && !tensor.quantize) return 0;
  const bool apart = p.signs != nullptr && tensor.rope && !tensor.hadamard;
  return 1 + 2 * tensor.quantize + apart;
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
  constexpr int kKinds = 5;
  for (int kind = 0; kind < kKinds; ++kind) {
    int chosen[kMaxTensors], count = 0;
    for (int t = 0; t < p.num_tensors; ++t)
      if (kind_of(p, p.tensors[t]) == kind) chosen[count++] = t;
    if (count == 0) continue;
    FA3_TRY(kind == 0 ? launch_elementwise(p, chosen, count, device) : launch_rows(p, chosen, count, device));
  }
  return FA3_OK;
}

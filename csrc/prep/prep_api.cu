// fa3_prep: checks, and which launch serves which tensor.
//
//   e4m3 results                 block kernel (prep/blocks.cuh)
//   16-bit                       tile kernel (prep/tiles.cuh), where it serves; else
//   16-bit, with a transform     token kernel (prep/tokens.cuh)
//   16-bit, rotation only        rotary kernel (prep/rope.cu)
//   16-bit from e4m3             dequantization (prep/dequantize.cu)
// One launch per kind of result; tensors of a call share it wherever they can.
#include <climits>

#include "prep/launch.h"
#include "prep/params.h"

namespace fa3::prep {
namespace {

constexpr const char* kTensorNames[kMaxTensors] = {"tensors[0]", "tensors[1]", "tensors[2]"};

// ---- checks ----------------------------------------------------------------------------------

// Codes in: the descale is an input, and there is no other stage.
int check_dequantize(const fa3_prep_params& p, int t) {
  const fa3_prep_tensor& tensor = p.tensors[t];
  if (tensor.rope || tensor.hadamard || tensor.quantize || p.inverse)
    return fail(
        FA3_INVALID_ARGUMENT,
        "%s: rope, hadamard, quantize and inverse must be 0 with in_dtype e4m3, got %d, %d, %d, %d",
        kFunction, tensor.rope, tensor.hadamard, tensor.quantize, p.inverse);
  if (!has_transform(p.head_dim))
    return fail(FA3_UNSUPPORTED,
                "%s: head_dim must be 64, 96, 128, 192 or 256 with in_dtype e4m3, got %d",
                kFunction, p.head_dim);
  return check_pointer(kFunction, "descale", tensor.descale, sizeof(float));
}

int check_stages(const fa3_prep_params& p, int t) {
  const fa3_prep_tensor& tensor = p.tensors[t];
  const struct {
    const char* name;
    int value;
  } flags[3] = {
      {"rope", tensor.rope}, {"hadamard", tensor.hadamard}, {"quantize", tensor.quantize}};
  for (const auto& flag : flags)
    if (flag.value != 0 && flag.value != 1)
      return fail(FA3_INVALID_ARGUMENT, "%s: tensors[%d].%s must be 0 or 1, got %d", kFunction, t,
                  flag.name, flag.value);
  if (!tensor.rope && !tensor.hadamard && !tensor.quantize)
    return fail(FA3_INVALID_ARGUMENT,
                "%s: tensors[%d] has no stage on (rope, hadamard and quantize are 0)", kFunction,
                t);
  if (p.inverse && tensor.quantize)
    return fail(FA3_INVALID_ARGUMENT,
                "%s: tensors[%d].quantize must be 0 with inverse (the gradient passes straight "
                "through the quantization), got 1",
                kFunction, t);
  if ((tensor.descale != nullptr) != (tensor.quantize != 0))
    return fail(
        FA3_INVALID_ARGUMENT,
        "%s: tensors[%d].descale must be given exactly with quantize, got %p with quantize %d",
        kFunction, t, static_cast<void*>(tensor.descale), tensor.quantize);
  if ((tensor.hadamard || tensor.quantize) && !has_transform(p.head_dim))
    return fail(FA3_UNSUPPORTED,
                "%s: head_dim must be 64, 96, 128, 192 or 256 with hadamard or quantize, got %d",
                kFunction, p.head_dim);
  return FA3_OK;
}

int check_rotation(const fa3_prep_params& p) {
  FA3_TRY(check_pointer(kFunction, "cos", p.cos, 16));
  FA3_TRY(check_pointer(kFunction, "sin", p.sin, 16));
  if (p.positions < 1)
    return fail(FA3_INVALID_ARGUMENT, "%s: positions must be at least 1, got %d", kFunction,
                p.positions);
  if (p.rotary_dim < 2 || p.rotary_dim % 2 != 0 || p.rotary_dim > p.head_dim)
    return fail(FA3_INVALID_ARGUMENT,
                "%s: rotary_dim must be even, at least 2 and at most head_dim (%d), got %d",
                kFunction, p.head_dim, p.rotary_dim);
  bool rows = false;
  for (int t = 0; t < p.num_tensors; ++t)
    rows |= p.tensors[t].rope && (p.tensors[t].hadamard || p.tensors[t].quantize);
  const int step = p.interleaved ? 8 : p.head_dim >= 192 ? 32 : 16;
  if (rows && p.rotary_dim % step != 0)
    return fail(FA3_UNSUPPORTED,
                "%s: rotary_dim must be a multiple of %d with hadamard or quantize at head_dim %d "
                "(%s), got %d",
                kFunction, step, p.head_dim, p.interleaved ? "interleaved" : "not interleaved",
                p.rotary_dim);
  return FA3_OK;
}

int check_arguments(const fa3_prep_params& p) {
  if (p.num_tensors < 1 || p.num_tensors > kMaxTensors)
    return fail(FA3_INVALID_ARGUMENT, "%s: num_tensors must be 1 to %d, got %d", kFunction,
                kMaxTensors, p.num_tensors);
  if (p.batch < 0 || p.seqlen < 0 || p.total < 0)
    return fail(FA3_INVALID_ARGUMENT,
                "%s: sizes must not be negative, got batch %d, seqlen %d, total %d", kFunction,
                p.batch, p.seqlen, p.total);
  if (rows_of(p) > INT_MAX)
    return fail(FA3_UNSUPPORTED, "%s: batch * seqlen must stay below 2^31, got %d * %d", kFunction,
                p.batch, p.seqlen);
  if (p.head_dim < 8 || p.head_dim > 256 || p.head_dim % 8 != 0)
    return fail(FA3_UNSUPPORTED, "%s: head_dim must be a multiple of 8 from 8 to 256, got %d",
                kFunction, p.head_dim);
  if (p.out_dtype != FA3_BF16 && p.out_dtype != FA3_FP16)
    return fail(FA3_INVALID_ARGUMENT, "%s: out_dtype must be bf16 or fp16, got %s", kFunction,
                dtype_name(p.out_dtype));
  const bool same = p.in_dtype == p.out_dtype;
  if (!same && p.in_dtype != FA3_E4M3 && !(p.inverse && p.in_dtype == FA3_FP32))
    return fail(FA3_INVALID_ARGUMENT, "%s: in_dtype must be out_dtype (%s), e4m3%s, got %s",
                kFunction, dtype_name(p.out_dtype), p.inverse ? " or fp32" : "",
                dtype_name(p.in_dtype));
  if (p.block_size != 128 && p.block_size != 64)
    return fail(FA3_UNSUPPORTED, "%s: block_size must be 64 or 128, got %d", kFunction,
                p.block_size);
  if (p.options & ~kPlain)
    return fail(FA3_UNSUPPORTED, "%s: options must be 0 or 1, got %d", kFunction, p.options);

  bool rope = false;
  const int64_t batch = p.cu_seqlens ? 1 : p.batch, tokens = p.cu_seqlens ? p.total : p.seqlen;
  for (int t = 0; t < p.num_tensors; ++t) {
    const fa3_prep_tensor& tensor = p.tensors[t];
    if (tensor.heads < 1)
      return fail(FA3_INVALID_ARGUMENT, "%s: tensors[%d].heads must be at least 1, got %d",
                  kFunction, t, tensor.heads);
    FA3_TRY(p.in_dtype == FA3_E4M3 ? check_dequantize(p, t) : check_stages(p, t));
    rope |= tensor.rope != 0;
    if (tensor.hadamard && p.signs != nullptr)
      FA3_TRY(check_pointer(kFunction, "signs", p.signs, sizeof(float)));
    FA3_TRY(check_tensor(kFunction, kTensorNames[t], tensor.x, p.in_dtype, batch, tokens,
                         tensor.heads, p.head_dim));
    FA3_TRY(check_tensor(kFunction, kTensorNames[t], tensor.out,
                         tensor.quantize ? FA3_E4M3 : p.out_dtype, batch, tokens, tensor.heads,
                         p.head_dim));
  }
  return rope ? check_rotation(p) : FA3_OK;
}

// ---- kinds of launches -----------------------------------------------------------------------

using Launch = int (*)(const fa3_prep_params&, const int* chosen, int count, const Device&);

Launch launch_of(const fa3_prep_params& p, const fa3_prep_tensor& tensor) {
  if (takes_tiles(p, tensor)) return launch_tiles;
  if (!tensor.quantize && !tensor.hadamard) return launch_rotation;
  return tensor.quantize ? launch_blocks : launch_tokens;
}

// Whether two tensors can share a launch. The kernels hold one matrix, or one table of signed
// sines, for all rotated tensors of a launch and one for the others; they store one type of result.
bool share(const fa3_prep_params& p, const fa3_prep_tensor& a, const fa3_prep_tensor& b) {
  const Launch launch = launch_of(p, a);
  if (launch != launch_of(p, b) || a.quantize != b.quantize) return false;
  if (launch == launch_tiles) return a.rope == b.rope && a.hadamard == b.hadamard;
  if (launch == launch_rotation || a.rope != b.rope) return true;
  return a.hadamard == b.hadamard || (launch == launch_blocks && (!a.rope || p.signs == nullptr));
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
  if (p.in_dtype == FA3_E4M3) return launch_codes(p, device);
  bool done[kMaxTensors] = {};
  for (int first = 0; first < p.num_tensors; ++first) {
    if (done[first]) continue;
    int chosen[kMaxTensors], count = 0;
    for (int t = first; t < p.num_tensors; ++t) {
      bool fits = !done[t];
      for (int i = 0; i < count; ++i) fits = fits && share(p, p.tensors[chosen[i]], p.tensors[t]);
      if (fits) chosen[count++] = t, done[t] = true;
    }
    FA3_TRY(launch_of(p, p.tensors[first])(p, chosen, count, device));
  }
  return FA3_OK;
}

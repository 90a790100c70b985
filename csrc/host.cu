#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <set>
#include <utility>

#include "host.h"

namespace fa3 {
namespace {

thread_local char error_text[1024] = "";

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The library links no libcuda, so that it loads on machines without a driver; the one driver
// function it needs is looked up when first used.
EncodeTiled find_encode_tiled() {
  constexpr int kIntroducedIn = 12000;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, kIntroducedIn, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<EncodeTiled>(function);
}

CUtensorMapDataType map_type(int dtype) {
  switch (dtype) {
    case FA3_BF16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case FA3_FP16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case FA3_FP32: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    default: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

CUtensorMapSwizzle map_swizzle(int bytes) {
  switch (bytes) {
    case 128: return CU_TENSOR_MAP_SWIZZLE_128B;
    case 64: return CU_TENSOR_MAP_SWIZZLE_64B;
    case 32: return CU_TENSOR_MAP_SWIZZLE_32B;
    default: return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

constexpr int kMaxDevices = 64;

}  // namespace

int fail(fa3_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_text, sizeof(error_text), format, arguments);
  va_end(arguments);
  return status;
}

const char* last_error() {
  return error_text;
}

int check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return FA3_OK;
  cudaGetLastError();  // a launch error is sticky per thread: the next caller must not see it as
                       // its own
  return fail(FA3_CUDA_ERROR, "%s: %s (%s)", what, cudaGetErrorString(error),
              cudaGetErrorName(error));
}

const char* dtype_name(int dtype) {
  switch (dtype) {
    case FA3_BF16: return "bf16";
    case FA3_FP16: return "fp16";
    case FA3_E4M3: return "e4m3";
    case FA3_FP32: return "fp32";
    default: return "unknown";
  }
}

int dtype_bytes(int dtype) {
  switch (dtype) {
    case FA3_BF16:
    case FA3_FP16: return 2;
    case FA3_E4M3: return 1;
    case FA3_FP32: return 4;
    default: return 0;
  }
}

int current_device(const char* function, Device* device) {
  static Device known[kMaxDevices];
  static std::atomic<bool> ready[kMaxDevices];
  int index = 0;
  FA3_TRY(check_cuda(cudaGetDevice(&index), function));
  if (index < 0 || index >= kMaxDevices)
    return fail(FA3_UNSUPPORTED, "%s: device index %d, supported are 0 to %d", function, index,
                kMaxDevices - 1);
  // A thread that has only been told its device so far (torch's autograd threads) has no current
  // context, and encoding a tensor map needs one: cudaSetDevice binds the primary context. Once per
  // thread and device.
  static thread_local int bound = -1;
  if (bound != index) {
    FA3_TRY(check_cuda(cudaSetDevice(index), function));
    bound = index;
  }
  if (!ready[index].load(std::memory_order_acquire)) {
    Device d{index, 0, 0, 0, 0};
    int l2 = 0;
    FA3_TRY(check_cuda(cudaDeviceGetAttribute(&d.sm_count, cudaDevAttrMultiProcessorCount, index),
                       function));
    FA3_TRY(check_cuda(cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, index),
                       function));
    FA3_TRY(check_cuda(cudaDeviceGetAttribute(&d.minor, cudaDevAttrComputeCapabilityMinor, index),
                       function));
    FA3_TRY(check_cuda(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, index), function));
    d.l2_bytes = l2;
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    known[index] = d;
    ready[index].store(true, std::memory_order_release);
  }
  *device = known[index];
  if (device->major != 9 || device->minor != 0)
    return fail(FA3_UNSUPPORTED,
                "%s: device %d has compute capability %d.%d, the kernels need 9.0 (Hopper)",
                function, index, device->major, device->minor);
  return FA3_OK;
}

int allow_shared_memory(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> done;
  int device = 0;
  FA3_TRY(check_cuda(cudaGetDevice(&device), "cudaGetDevice"));
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({kernel, device})) return FA3_OK;
  FA3_TRY(
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                 "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)"));
  done.insert({kernel, device});
  return FA3_OK;
}

int check_pointer(const char* function, const char* name, const void* pointer, int alignment) {
  if (pointer == nullptr) return fail(FA3_INVALID_ARGUMENT, "%s: %s is NULL", function, name);
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
    return fail(FA3_INVALID_ARGUMENT, "%s: %s must be aligned to %d bytes, got address %p",
                function, name, alignment, pointer);
  return FA3_OK;
}

int check_tensor(const char* function, const char* name, const fa3_tensor& tensor, int dtype,
                 int64_t batch, int64_t tokens, int64_t heads, int64_t elements_per_row) {
  constexpr int kAlignment = 16;
  // TMA takes byte strides below 2^40.
  constexpr int64_t kStrideLimitBytes = int64_t(1) << 40;
  const int bytes = dtype_bytes(dtype);
  if (bytes == 0)
    return fail(FA3_INVALID_ARGUMENT, "%s: %s has unknown dtype %d", function, name, dtype);
  if (batch == 0 || tokens == 0 || heads == 0) return FA3_OK;  // nothing is read or written
  FA3_TRY(check_pointer(function, name, tensor.ptr, kAlignment));
  const struct {
    const char* dimension;
    int64_t size, stride;
  } strides[3] = {{"batch", batch, tensor.stride_batch},
                  {"token", tokens, tensor.stride_token},
                  {"head", heads, tensor.stride_head}};
  for (const auto& s : strides) {
    if (s.size == 1) continue;
    if (s.stride < 0 || s.stride * bytes % kAlignment != 0 || s.stride >= kStrideLimitBytes / bytes)
      return fail(FA3_INVALID_ARGUMENT,
                  "%s: %s must have a %s stride that is a non-negative multiple of %d elements (16 "
                  "bytes of %s) "
                  "below 2^40 bytes, got %lld",
                  function, name, s.dimension, kAlignment / bytes, dtype_name(dtype),
                  static_cast<long long>(s.stride));
  }
  if (elements_per_row * bytes % kAlignment != 0)
    return fail(FA3_INVALID_ARGUMENT,
                "%s: the last dimension of %s must be a multiple of %d, got %lld", function, name,
                kAlignment / bytes, static_cast<long long>(elements_per_row));
  return FA3_OK;
}

int check_workspace(const char* function, const void* pointer, int64_t given, int64_t needed,
                    int alignment) {
  if (given < needed)
    return fail(FA3_INVALID_ARGUMENT, "%s: workspace_bytes must be at least %lld, got %lld",
                function, static_cast<long long>(needed), static_cast<long long>(given));
  return needed > 0 ? check_pointer(function, "workspace", pointer, alignment) : FA3_OK;
}

int encode_tensor_map(CUtensorMap* map, const char* name, int dtype, const void* pointer,
                      const TensorMapShape& shape) {
  static const EncodeTiled encode = find_encode_tiled();
  if (encode == nullptr)
    return fail(
        FA3_CUDA_ERROR,
        "the CUDA driver has no cuTensorMapEncodeTiled: a driver for CUDA 12 or newer is needed");
  cuuint64_t dims[5], strides[4];
  cuuint32_t box[5], element_strides[5];
  int64_t packed = shape.dims[0] * dtype_bytes(dtype);
  for (int i = 0; i < shape.rank; ++i) {
    dims[i] = static_cast<cuuint64_t>(shape.dims[i]);
    box[i] = static_cast<cuuint32_t>(shape.box[i]);
    element_strides[i] = 1;
    if (i == 0) continue;
    // The stride of a dimension of size 1 is never used, may hold anything, and is still validated
    // by the driver.
    const bool used = shape.dims[i] > 1;
    strides[i - 1] =
        static_cast<cuuint64_t>(used ? shape.strides_bytes[i - 1] : (packed + 15) / 16 * 16);
  }
  const CUresult result =
      encode(map, map_type(dtype), shape.rank, const_cast<void*>(pointer), dims, strides, box,
             element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, map_swizzle(shape.swizzle_bytes),
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return FA3_OK;
  char text[512];
  int used = 0;
  for (int i = 0; i < shape.rank && used < int(sizeof(text)) - 96; ++i)
    used += std::snprintf(text + used, sizeof(text) - used, "%s%lld (box %d, stride %lld B)",
                          i ? ", " : "", static_cast<long long>(shape.dims[i]), shape.box[i],
                          i ? static_cast<long long>(strides[i - 1]) : 0LL);
  return fail(FA3_CUDA_ERROR,
              "the driver refused a tensor map for %s: error %d, %s, address %p, dims %s", name,
              static_cast<int>(result), dtype_name(dtype), pointer, text);
}

}  // namespace fa3

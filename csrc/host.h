// What every entry point needs on the host: error text, device facts, argument checks, tensor maps.
// Nothing here allocates device memory or synchronises.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "fa3_train.h"

namespace fa3 {

// Stores a message for fa3_last_error() of this thread and returns `status`: `return fail(...)`.
int fail(fa3_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));
const char* last_error();

// FA3_OK, or FA3_CUDA_ERROR with the runtime's own text. `what` names the call.
int check_cuda(cudaError_t error, const char* what);

const char* dtype_name(int dtype);
int dtype_bytes(int dtype);  // 0 for an unknown dtype

struct Device {
  int index;
  int sm_count;
  int major, minor;
  int64_t l2_bytes;
};
// Facts of the current device (read once per device). Anything but compute capability 9.0 is
// FA3_UNSUPPORTED.
int current_device(const char* function, Device* device);

// Lets `kernel` use more than 48 KB of dynamic shared memory. Once per kernel and device; cheap
// after that.
int allow_shared_memory(const void* kernel, int bytes);

// Address (16 bytes) and strides (16 bytes, non-negative where used) of an argument.
// `elements_per_row`: the contiguous last dimension. Strides of dimensions of size 1 are not looked
// at.
int check_tensor(const char* function, const char* name, const fa3_tensor& tensor, int dtype,
                 int64_t batch, int64_t tokens, int64_t heads, int64_t elements_per_row);
int check_pointer(const char* function, const char* name, const void* pointer, int alignment);
int check_workspace(const char* function, const void* pointer, int64_t given, int64_t needed,
                    int alignment);

// A tiled tensor map. dims and box innermost first, in elements; strides in bytes for dimensions 1
// .. rank - 1. swizzle_bytes: 0, 32, 64 or 128. Out-of-range elements load as zeros.
struct TensorMapShape {
  int rank;
  int64_t dims[5];
  int64_t strides_bytes[4];
  int box[5];
  int swizzle_bytes;
};
int encode_tensor_map(CUtensorMap* map, const char* name, int dtype, const void* pointer,
                      const TensorMapShape& shape);

}  // namespace fa3

// Returns early with a status that is not FA3_OK.
#define FA3_TRY(expression)                        \
  do {                                             \
    const int fa3_status_ = (expression);          \
    if (fa3_status_ != FA3_OK) return fa3_status_; \
  } while (0)

// Element types of the tensor cores, and the qualifiers every device header uses.
// Functions that only compute (layouts, masks, schedules) are FA3_HD: a host compiler can test them
// without a GPU.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FA3_DEVICE __device__ __forceinline__
#define FA3_HD __host__ __device__ __forceinline__
#else
#define FA3_HD inline
#endif

namespace fa3 {
#if defined(__CUDACC__)
using bf16 = __nv_bfloat16;
using fp16 = __half;
#endif
struct e4m3 {  // storage only: arithmetic happens in FP32 registers
  uint8_t bits;
};
struct e5m2 {
  uint8_t bits;
};
}  // namespace fa3

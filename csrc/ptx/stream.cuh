// Streaming accesses and warp reductions of the elementwise kernels: one PTX instruction per
// function. Section names are those of the PTX ISA,
// https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once
#include "ptx/types.cuh"

namespace fa3 {

// cp.async: 16 bytes, global -> shared, past L1. Both addresses are multiples of 16.
FA3_DEVICE void cp_async_16(uint32_t dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}

// cp.async.wait_all: this thread's copies have landed.
FA3_DEVICE void cp_async_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// ld.global.nc with L1::no_allocate: data that is read once. 16 bytes.
FA3_DEVICE uint4 load_once(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// The same, 8 bytes.
FA3_DEVICE uint2 load_once_8(const void* address) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(address));
  return v;
}

// max.NaN: the larger one, NaN if either is.
FA3_DEVICE float max_or_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}

// redux.sync.max: over the warp.
FA3_DEVICE uint32_t warp_max(uint32_t x) {
  return __reduce_max_sync(0xffffffffu, x);
}

// rcp.approx: within 1 ulp.
FA3_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fa3

// Dependent launches and global-memory signals: one PTX instruction per function.
// Section names are those of the PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once
#include "ptx/types.cuh"

namespace fa3 {

// griddepcontrol.wait: the grids this one depends on have ended, their writes are visible. No-op
// without them.
FA3_DEVICE void grid_dependency_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// griddepcontrol.launch_dependents: the next grid may start once every block has said so or ended.
FA3_DEVICE void grid_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ld.acquire: what the releasing thread wrote before its release is visible afterwards.
FA3_DEVICE int load_acquire(const int* address) {
  int v;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}

// atom.add, 64 bits: *address before the addition; acquire, or release.
FA3_DEVICE uint64_t fetch_add_acquire(uint64_t* address, uint64_t x) {
  uint64_t v;
  asm volatile("atom.acquire.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(v)
               : "l"(address), "l"(x)
               : "memory");
  return v;
}
FA3_DEVICE uint64_t fetch_add_release(uint64_t* address, uint64_t x) {
  uint64_t v;
  asm volatile("atom.release.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(v)
               : "l"(address), "l"(x)
               : "memory");
  return v;
}
FA3_DEVICE uint64_t load_acquire(const uint64_t* address) {
  uint64_t v;
  asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(address) : "memory");
  return v;
}

// red .v2.f32: address[0] += x, address[1] += y. 8-byte aligned; no order among threads.
FA3_DEVICE void reduce_add_f32x2(float* address, float x, float y) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(x), "f"(y)
               : "memory");
}

}  // namespace fa3

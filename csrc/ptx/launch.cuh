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

// red.release: *address += 1, after everything this thread did or observed before.
FA3_DEVICE void increment_release(int* address) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(address) : "memory");
}

// red .v2.f32: address[0] += x, address[1] += y. 8-byte aligned; no order among threads.
FA3_DEVICE void reduce_add_f32x2(float* address, float x, float y) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(x), "f"(y)
               : "memory");
}

}  // namespace fa3

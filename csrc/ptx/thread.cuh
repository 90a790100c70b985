// Special registers, read again: one PTX instruction per function.
// Section names are those of the PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once
#include "ptx/types.cuh"

namespace fa3 {

// mov %tid.x, at every call: threadIdx.x kept over a long loop costs a register that may not be there.
FA3_DEVICE int current_thread_index() {
  int t;
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(t));
  return t;
}

}  // namespace fa3

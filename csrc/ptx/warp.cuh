// Warps and registers: one PTX instruction per function.
// Section names are those of the PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once
#include "ptx/types.cuh"

namespace fa3 {

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupWarps = 4;

// elect.sync: true in exactly one lane of a converged warp.
FA3_DEVICE bool elect_one() {
  uint32_t mine;
  asm volatile(
      "{\n"
      ".reg .pred mine;\n"
      "elect.sync _|mine, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, mine;\n"
      "}\n"
      : "=r"(mine));
  return mine != 0;
}

// setmaxnreg: all four warps of the warpgroup execute it with the same value. ptxas does not check
// that the shares of all warpgroups fit into the 65,536 registers of the CTA; the traits do.
template <int kRegisters>
FA3_DEVICE void registers_release() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "setmaxnreg range");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FA3_DEVICE void registers_claim() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "setmaxnreg range");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A value that all lanes hold, in a form the compiler knows to be warp-uniform.
FA3_DEVICE int uniform(int x) {
  return __shfl_sync(0xffffffffu, x, 0);
}

}  // namespace fa3

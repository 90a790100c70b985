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

// setmaxnreg: all four warps of the warpgroup execute it with the same value. ptxas does not check that
// the shares of all warpgroups fit into the 65,536 registers of the CTA; the traits do.
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

// shfl.sync.bfly with distance 0: x itself. Unlike an empty asm statement, ptxas cannot look through it,
// so that nothing that depends on the result is scheduled above this point.
FA3_DEVICE float not_before_here(float x) {
  float y;
  asm volatile("shfl.sync.bfly.b32 %0, %1, 0, 0x1f, 0xffffffff;" : "=f"(y) : "f"(x));
  return y;
}

// lop3: x | (y & zero), with a zero the compiler does not know: x itself, but not available before y is. Puts work that
// starts from x into the shadow of the slow operation that makes y. The bits of y never reach the result.
FA3_DEVICE float after(float x, float y, uint32_t zero) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xf8;" : "=r"(r) : "r"(__float_as_uint(x)), "r"(__float_as_uint(y)), "r"(zero));
  return __uint_as_float(r);
}
FA3_DEVICE uint32_t opaque_zero() {
  uint32_t r;
  asm volatile("mov.b32 %0, 0;" : "=r"(r));
  return r;
}

// %tid.x, read again at every call: threadIdx.x kept over a long loop costs a register that may not be there.
FA3_DEVICE int reread_thread_index() {
  int t;
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(t));
  return t;
}

// A value that all lanes hold, in a form the compiler knows to be warp-uniform.
FA3_DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

}  // namespace fa3

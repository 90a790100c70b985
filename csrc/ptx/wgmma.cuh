// Warpgroup matrix multiply (wgmma): order, pinning, and the generated shapes.
// Section names are those of the PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/
// (Asynchronous Warpgroup Level Matrix Instructions).
//
//   Wgmma<Elem, N>::ss     <tnspA, tnspB>(d, descA, descB)       d += A(smem) B(smem)      64 x N x
//   K Wgmma<Elem, N>::ss_zero<tnspA, tnspB>(d, descA, descB)       d  = A(smem) B(smem) Wgmma<Elem,
//   N>::rs     <tnspB>(d, a0, a1, a2, a3, descB)     d += A(registers) B(smem) Wgmma<Elem,
//   N>::rs_zero<tnspB>(d, a0, a1, a2, a3, descB)     d  = A(registers) B(smem)
// K = 16 (bf16, fp16) or 32 (e4m3, e5m2). tnsp = 0: K-major operand, 1: MN-major (16-bit types
// only).
#pragma once
#include "ptx/types.cuh"
#include "wgmma_shapes.cuh"  // written by ptx/gen_wgmma.py when the build is configured

namespace fa3 {

// wgmma.fence: registers written by ordinary code may now be read or accumulated into by wgmma.
FA3_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// wgmma.commit_group
FA3_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// wgmma.wait_group: all but the last N groups are complete.
template <int N>
FA3_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// No instruction. The compiler may not move reads or writes of these registers across this point:
// wgmma touches them asynchronously, which the asm operands alone do not say.
template <int N>
FA3_DEVICE void pin(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int N>
FA3_DEVICE void pin(uint32_t (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

}  // namespace fa3

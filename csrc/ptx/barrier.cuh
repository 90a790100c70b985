// Barriers: one PTX instruction per function.
// Section names are those of the PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/
// Addresses are 32-bit shared-memory addresses (smem_addr).
#pragma once
#include "ptx/types.cuh"

namespace fa3 {

FA3_DEVICE uint32_t smem_addr(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// mbarrier.init: `count` arrivals complete a phase.
FA3_DEVICE void mbar_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

// membar / fence: makes the inits visible to the async proxy (TMA) before its first use of them.
FA3_DEVICE void mbar_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive
FA3_DEVICE void mbar_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// mbarrier.arrive with expect-tx: one arrival, and the phase also waits for `bytes` to land.
FA3_DEVICE void mbar_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}

// cp.async.mbarrier.arrive: arrives when this thread's earlier cp.async copies have landed.
FA3_DEVICE void mbar_arrive_after_cp_async(uint32_t bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

// mbarrier.try_wait: true once the phase of this parity is complete; may suspend the thread.
FA3_DEVICE bool mbar_try_wait(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done != 0;
}

// A loop over try_wait. No watchdog in here: a trap reachable from a wgmma loop makes ptxas spill.
FA3_DEVICE void mbar_wait(uint32_t bar, uint32_t parity) {
  while (!mbar_try_wait(bar, parity)) {
  }
}

// bar.sync: named barrier `id`; `threads` (a multiple of 32) arrivals release all that wait.
FA3_DEVICE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// bar.arrive: counts towards named barrier `id` without waiting.
FA3_DEVICE void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// membar / fence: earlier ordinary shared-memory accesses precede later ones of the async proxy.
FA3_DEVICE void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// membar / fence: the same for global memory.
FA3_DEVICE void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// membar.gl / fence.acq_rel.gpu: orders this thread's global accesses for the whole GPU.
FA3_DEVICE void fence_gpu() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

}  // namespace fa3

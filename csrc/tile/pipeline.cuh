// Circular buffers between a producer and consumers. Each stage has two mbarriers: `full` (bytes
// landed) and `empty` (all consumers done). A side keeps (stage, phase); the phase flips at every
// wrap.
//   consumer: wait(full[stage], phase)       producer: wait(empty[stage], phase ^ 1)
// The producer's first round passes at once: a fresh barrier counts as having completed the phase
// before.
#pragma once
#include "ptx/types.cuh"

namespace fa3 {

template <int kStages>
struct Ring {
  static_assert(kStages >= 1, "a ring has at least one stage");
  uint32_t stage = 0;
  uint32_t phase = 0;

  FA3_HD void advance() {
    if (kStages == 1) {
      phase ^= 1;
    } else if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace fa3

// FP8 forward: what fp8_api.cu knows of the instantiations (fp8.instances.cmake).
#pragma once
#include "host.h"

namespace fa3 {

// Workspace in 32-bit words: the work counter, padding, then (varlen) tiles before each sequence, batch + 1 of them.
constexpr int kFp8PrefixOffset = 4;

template <int kHeadDim, bool kTwoLevel>
int fp8_launch(const fa3_attn_fp8_fwd_params& params, const Device& device);

}  // namespace fa3

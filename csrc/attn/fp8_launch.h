// FP8 forward: what fp8_api.cu knows of the instantiations (fp8.instances.cmake).
#pragma once
#include "host.h"

namespace fa3 {

// Workspace in 32-bit words: the work counter, padding, then (varlen) tiles before each sequence,
// batch + 1 of them.
constexpr int kFp8PrefixOffset = 4;

// How P V and the row sum are accumulated.
enum class Fp8Sums {
  OneLevel,  // O is the accumulator of the tensor core; the row sum takes P before it is rounded
  TwoLevel,  // each block's P V is added to O in FP32; the row sum is a column of P V, rounded and
             // cut as O is
  TwoLevelUnrounded,  // the first half of TwoLevel alone, to show what the second half is worth
};

template <int kHeadDim, Fp8Sums kSums>
int fp8_launch(const fa3_attn_fp8_fwd_params& params, const Device& device);

}  // namespace fa3

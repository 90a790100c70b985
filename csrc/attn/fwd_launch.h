// What the host side of the forward passes to its kernels' translation units.
#pragma once
#include "attn/fwd_traits.cuh"
#include "host.h"

namespace fa3 {

struct FwdLaunch {
  const fa3_attn_fwd_params* call;
  FwdParams kernel;  // tensor maps still missing: their boxes depend on the variant
  Mask mask;
  bool softcap;
  int options;  // FA3_OPT_* that change the kernel
  int grid;
};

// Picks the kernel for mask, softcap and options, encodes the tensor maps and launches. One
// explicit instantiation per translation unit (fwd.instances.cmake).
template <class Elem, int kTileIndex>
int launch_fwd(FwdLaunch& launch);

// The same for a kernel with one of launch.options switched off (fwd_ablation.cu).
int launch_fwd_ablation(FwdLaunch& launch);

// q, k, v, out as {columns, tokens, heads, batch} with boxes of one 128-byte slab.
int encode_fwd_maps(FwdLaunch& launch, int block_n);

}  // namespace fa3

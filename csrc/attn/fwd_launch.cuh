// Definition of launch_fwd for the instantiating translation units.
#pragma once
#include "attn/fwd_kernel.cuh"
#include "attn/fwd_launch.h"

namespace fa3 {

template <class T>
int launch_fwd_variant(FwdLaunch& launch) {
  const auto kernel = attn_fwd_kernel<T>;
  FA3_TRY(encode_fwd_maps(launch, T::BLOCK_N));
  FA3_TRY(allow_shared_memory(reinterpret_cast<const void*>(kernel), sizeof(typename T::Shared)));
  kernel<<<launch.grid, T::kThreads, sizeof(typename T::Shared),
           static_cast<cudaStream_t>(launch.call->stream)>>>(launch.kernel);
  return check_cuda(cudaGetLastError(), "fa3_attn_fwd: kernel launch");
}

template <class Elem, int kTileIndex>
int launch_fwd(FwdLaunch& launch) {
  if (launch.softcap)
    return launch_fwd_variant<FwdTraits<Elem, kTileIndex, Mask::Window, true>>(launch);
  switch (launch.mask) {
    case Mask::None:
      return launch_fwd_variant<FwdTraits<Elem, kTileIndex, Mask::None, false>>(launch);
    case Mask::Causal:
      return launch_fwd_variant<FwdTraits<Elem, kTileIndex, Mask::Causal, false>>(launch);
    default: return launch_fwd_variant<FwdTraits<Elem, kTileIndex, Mask::Window, false>>(launch);
  }
}

}  // namespace fa3

// The kernels that an ablation compares with: the default at d128 bf16 with one technique switched
// off.
#include "attn/fwd_launch.cuh"

namespace fa3 {
namespace {

struct NoWarpSpecialization : FwdDefault {
  static constexpr bool kWarpSpecialized = false;
};
struct NoOverlap : FwdDefault {
  static constexpr bool kOverlap = false;
};
struct NoPingPong : FwdDefault {
  static constexpr bool kPingPong = false;
};
struct NoReallocation : FwdDefault {
  static constexpr bool kReallocate = false;
};

constexpr int kAblationTile = 2;
static_assert(kFwdTiles[kAblationTile].dim_qk == 128 && kFwdTiles[kAblationTile].dim_v == 128);

template <class Options>
int launch_ablation(FwdLaunch& launch) {
  if (launch.mask == Mask::None)
    return launch_fwd_variant<FwdTraits<bf16, kAblationTile, Mask::None, false, Options>>(launch);
  return launch_fwd_variant<FwdTraits<bf16, kAblationTile, Mask::Causal, false, Options>>(launch);
}

}  // namespace

int launch_fwd_ablation(FwdLaunch& launch) {
  switch (launch.options) {
    case FA3_OPT_NO_WARP_SPECIALIZATION: return launch_ablation<NoWarpSpecialization>(launch);
    case FA3_OPT_NO_OVERLAP: return launch_ablation<NoOverlap>(launch);
    case FA3_OPT_NO_PINGPONG: return launch_ablation<NoPingPong>(launch);
    case FA3_OPT_NO_REG_REALLOC: return launch_ablation<NoReallocation>(launch);
    default:
      return fail(FA3_UNSUPPORTED,
                  "fa3_attn_fwd: options 0x%x: one FA3_OPT_ switch at a time has a kernel",
                  launch.options);
  }
}

}  // namespace fa3

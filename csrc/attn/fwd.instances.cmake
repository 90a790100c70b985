# Forward kernels: one translation unit per row of kFwdTiles (fwd_traits.cuh) and dtype, with four
# kernels each.
set(index 0)
foreach(tag d64 d96 d128 d192x128 d192 d256)
  foreach(dtype bf16 fp16)
    fa3_instance(fwd_${tag}_${dtype} "attn/fwd_launch.cuh"
      "template int fa3::launch_fwd<fa3::${dtype}, ${index}>(fa3::FwdLaunch&);")
  endforeach()
  fa3_provides(fwd-${tag})
  math(EXPR index "${index} + 1")
endforeach()

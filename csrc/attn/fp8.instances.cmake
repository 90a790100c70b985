# FP8 forward: one translation unit per (head dim, accumulation). Masks, varlen and the output dtype are run-time values.
foreach(head_dim 64 96 128 192 256)
  foreach(sums OneLevel TwoLevel TwoLevelUnrounded)
    fa3_instance(fp8_fwd_d${head_dim}_${sums} "attn/fp8_launch.cuh"
      "template int fa3::fp8_launch<${head_dim}, fa3::Fp8Sums::${sums}>(const fa3_attn_fp8_fwd_params&, const fa3::Device&);")
  endforeach()
endforeach()
fa3_provides(fp8)

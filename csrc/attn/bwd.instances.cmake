# One translation unit per head-dim bucket and type.
foreach(type bf16 fp16)
  foreach(dim 64 96 128)
    fa3_instance(bwd_d${dim}_${type} "attn/bwd_launch.cuh"
      "template int fa3::launch_bwd_fused<${dim}, fa3::${type}>(const fa3::BwdCall&);")
  endforeach()
  foreach(dims "192, 128" "192, 192" "256, 256")
    string(REPLACE ", " "_" name ${dims})
    fa3_instance(bwd_d${name}_${type} "attn/bwd_launch.cuh"
      "template int fa3::launch_bwd_two_pass<${dims}, fa3::${type}>(const fa3::BwdCall&);")
  endforeach()
endforeach()
fa3_provides(bwd)

# The block and token kernels: one translation unit per head dim and dtype.
foreach(head_dim 64 96 128 192 256)
  foreach(dtype bf16 fp16)
    fa3_instance(prep_d${head_dim}_${dtype} "prep/instances.cuh" "FA3_PREP_INSTANCES(${head_dim}, ${dtype})")
  endforeach()
endforeach()
fa3_provides(prep)

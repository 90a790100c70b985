# The row kernel: one translation unit per head dim and dtype, forward and gradient together.
foreach(head_dim 64 96 128 192 256)
  foreach(dtype bf16 fp16)
    fa3_instance(prep_d${head_dim}_${dtype} "prep/rows.cuh"
      "template const void* fa3::prep::row_kernel_address<${head_dim}, fa3::${dtype}, false>();
template const void* fa3::prep::row_kernel_address<${head_dim}, fa3::${dtype}, true>();")
  endforeach()
endforeach()
fa3_provides(prep)

# Forward kernels: one translation unit per (head dims, dtype), four kernels each (masks; softcap).
foreach(dims "64, 64" "96, 96" "128, 128" "192, 128" "192, 192" "256, 256")
  string(REPLACE ", " "x" tag "${dims}")
  foreach(dtype bf16 fp16)
    fa3_instance(fwd_${tag}_${dtype} "attn/fwd_launch.cuh"
      "template int fa3::launch_fwd<fa3::${dtype}, ${dims}>(fa3::FwdLaunch&);")
  endforeach()
  fa3_provides(fwd-d${tag})
endforeach()

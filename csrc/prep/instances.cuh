// The kernels of one head dim and dtype, by address: launch.cu launches them without compiling
// them.
#pragma once
#include "prep/blocks.cuh"
#include "prep/tiles.cuh"
#include "prep/tokens.cuh"

#define FA3_PREP_INSTANCES(D, Elem)                                            \
  template const void* fa3::prep::block_kernel_address<D, fa3::Elem>();        \
  template const void* fa3::prep::token_kernel_address<D, fa3::Elem, false>(); \
  template const void* fa3::prep::token_kernel_address<D, fa3::Elem, true>();
#define FA3_PREP_TILE_INSTANCES(D, Elem) \
  template const void* fa3::prep::tile_kernel_address<D, fa3::Elem>(bool, bool, bool);

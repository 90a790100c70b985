// Work items of the kernels that keep a block of tokens: which rows, which heads, where results
// belong.
#pragma once
#include "prep/params.h"
#include "ptx/types.cuh"

namespace fa3::prep {

struct Item {
  int token0, batch;            // coordinates of the first token in the tensor maps
  int tokens;                   // of the sequence in this block; 0: unused slot
  int position0, position_row;  // position without ids; index of the first token in position_ids
  int block, batch_out;         // where the descales go
  int phase, count;             // heads phase, phase + phases, ...
};

template <class Params>
FA3_DEVICE Item decode_item(const Params& p, int index) {
  Item it{};
  if (index >= p.items) return it;
  const int block = index / p.phases;
  it.phase = index % p.phases;
  it.count = (p.heads_total - it.phase + p.phases - 1) / p.phases;
  const int32_t* cu = p.sequences.cu_seqlens;
  if (cu == nullptr) {
    it.batch = block / p.blocks;
    it.block = block % p.blocks;
    it.batch_out = it.batch;
    it.token0 = it.block * p.block_tokens;
    it.tokens = min(p.block_tokens, p.sequences.seqlen - it.token0);
    it.position0 = it.token0;
    it.position_row = it.batch * p.sequences.seqlen + it.token0;
    return it;
  }
  // Sequence b owns the slots from cu[b] / block_tokens + b on: find the last b that starts at or
  // before this one.
  int low = 0, high = p.sequences.batch - 1;
  while (low < high) {
    const int mid = (low + high + 1) / 2;
    if (cu[mid] / p.block_tokens + mid <= block)
      low = mid;
    else
      high = mid - 1;
  }
  const int begin = cu[low], end = min(cu[low + 1], p.sequences.total);
  const int inside = (block - begin / p.block_tokens - low) * p.block_tokens;
  it.block = block;
  it.token0 = begin + inside;
  it.tokens = max(0, min(p.block_tokens, end - it.token0));
  it.position0 = inside;
  it.position_row = it.token0;
  return it;
}

}  // namespace fa3::prep

// Which tile comes next.
#pragma once
#include "attn/fp8_keys.cuh"
#include "attn/fp8_traits.cuh"

namespace fa3 {

// Tile number `index` of the launch. Inside a section of heads the tiles with most keys come first (the last rows, where a
// causal mask is); a section's K and V fit into the L2.
template <class T>
FA3_DEVICE Fp8Work locate_work(const Fp8FwdKernelParams& p, int index) {
  Fp8Work w{};
  int tile;
  if (p.cu_q == nullptr) {
    if (index >= p.work) return w.row0 = -1, w;
    const int pairs = p.batch * p.heads_q;
    const int section = index / (p.heads_per_section * p.tiles_per_head);
    const int rest = index - section * p.heads_per_section * p.tiles_per_head;
    const int first = section * p.heads_per_section;
    const int heads = min(p.heads_per_section, pairs - first);
    const int from_end = rest / heads;
    const int pair = first + rest - from_end * heads;
    w.batch = pair / p.heads_q;
    w.head = pair - w.batch * p.heads_q;
    w.len_q = p.seqlen_q;
    w.len_k = p.seqlen_k;
    w.scale_q = pair * p.q_scale_blocks;
    w.scale_k = (w.batch * p.heads_k + w.head / p.group) * p.k_scale_blocks;
    tile = p.tiles_per_head - 1 - from_end;
  } else {
    // Sequence b owns the indices [prefix[b], prefix[b + 1]) * heads_q.
    if (index >= __ldg(p.work_prefix + p.batch) * p.heads_q) return w.row0 = -1, w;
    int low = 0, high = p.batch;  // prefix[low] * heads <= index < prefix[high] * heads
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (__ldg(p.work_prefix + middle) * p.heads_q <= index) low = middle;
      else high = middle;
    }
    const int tiles = __ldg(p.work_prefix + low + 1) - __ldg(p.work_prefix + low);
    const int rest = index - __ldg(p.work_prefix + low) * p.heads_q;
    const int from_end = rest / p.heads_q;
    w.head = rest - from_end * p.heads_q;
    w.token_q = __ldg(p.cu_q + low);
    w.token_k = __ldg(p.cu_k + low);
    w.len_q = __ldg(p.cu_q + low + 1) - w.token_q;
    w.len_k = __ldg(p.cu_k + low + 1) - w.token_k;
    w.scale_q = w.head * p.q_scale_blocks + w.token_q / kFp8ScaleBlock + low;
    w.scale_k = w.head / p.group * p.k_scale_blocks + w.token_k / kFp8ScaleBlock + low;
    tile = tiles - 1 - from_end;
  }
  w.row0 = tile * T::kBlockM;
  const KeyRange blocks = key_blocks(
      visible_keys(w.row0, T::kBlockM, w.len_q, w.len_k, p.window_left, p.window_right));
  w.block_begin = blocks.begin;
  w.block_end = blocks.end;
  return w;
}

}  // namespace fa3

// Which tile comes next.
#pragma once
#include "attn/fp8_keys.cuh"
#include "attn/fp8_traits.cuh"
#include "ptx/memory.cuh"

namespace fa3 {

// One field of a tile in shared memory. The producer has 24 registers: it keeps nothing of a tile
// in them.
#define FA3_FP8_FIELD(name) (at + uint32_t(offsetof(Fp8Work, name)))

// Describes tile number `index` of the launch at shared address `at` and returns whether there is
// one. Inside a section of heads the tiles with most keys come first (the last rows, where a causal
// mask is); the K and V of a section fit into the L2.
template <class T>
FA3_DEVICE bool locate_work(const Fp8FwdKernelParams& p, int index, uint32_t at) {
  int row0;
  if (p.cu_q == nullptr) {
    if (index >= p.work) return sts32(FA3_FP8_FIELD(row0), uint32_t(-1)), false;
    const int per_section = p.heads_per_section * p.tiles_per_head;
    int pair = index / per_section * p.heads_per_section;  // (batch, head), first of the section
    {
      const int rest = index % per_section;
      const int heads = min(p.heads_per_section, p.batch * p.heads_q - pair);
      const int from_end = rest / heads;
      pair += rest - from_end * heads;
      row0 = (p.tiles_per_head - 1 - from_end) * T::kBlockM;
    }
    sts32(FA3_FP8_FIELD(scale_q), pair * p.q_scale_blocks);
    const int batch = pair / p.heads_q, head = pair - batch * p.heads_q, head_k = head / p.group;
    sts32(FA3_FP8_FIELD(batch), batch);
    sts32(FA3_FP8_FIELD(head), head);
    sts32(FA3_FP8_FIELD(head_k), head_k);
    sts32(FA3_FP8_FIELD(scale_k), (batch * p.heads_k + head_k) * p.k_scale_blocks);
    sts32(FA3_FP8_FIELD(token_q), 0);
    sts32(FA3_FP8_FIELD(token_k), 0);
    sts32(FA3_FP8_FIELD(len_q), p.seqlen_q);
    sts32(FA3_FP8_FIELD(len_k), p.seqlen_k);
  } else {
    // Sequence b owns the indices [prefix[b], prefix[b + 1]) * heads_q.
    const int* prefix = p.work_prefix;
    if (index >= __ldg(prefix + p.batch) * p.heads_q)
      return sts32(FA3_FP8_FIELD(row0), uint32_t(-1)), false;
    int b = 0;  // prefix[b] * heads <= index < prefix[end] * heads
    for (int end = p.batch; end - b > 1;) {
      const int middle = (b + end) / 2;
      if (__ldg(prefix + middle) * p.heads_q <= index)
        b = middle;
      else
        end = middle;
    }
    {
      const int before = __ldg(prefix + b), tiles = __ldg(prefix + b + 1) - before;
      const int rest = index - before * p.heads_q;
      const int from_end = rest / p.heads_q, head = rest - from_end * p.heads_q;
      row0 = (tiles - 1 - from_end) * T::kBlockM;
      sts32(FA3_FP8_FIELD(head), head);
      sts32(FA3_FP8_FIELD(head_k), head / p.group);
    }
    const int head = lds32(FA3_FP8_FIELD(head)), head_k = lds32(FA3_FP8_FIELD(head_k));
    const int token_q = __ldg(p.cu_q + b), token_k = __ldg(p.cu_k + b);
    sts32(FA3_FP8_FIELD(batch), 0);
    sts32(FA3_FP8_FIELD(token_q), token_q);
    sts32(FA3_FP8_FIELD(token_k), token_k);
    sts32(FA3_FP8_FIELD(len_q), __ldg(p.cu_q + b + 1) - token_q);
    sts32(FA3_FP8_FIELD(len_k), __ldg(p.cu_k + b + 1) - token_k);
    sts32(FA3_FP8_FIELD(scale_q), head * p.q_scale_blocks + token_q / kFp8ScaleBlock + b);
    sts32(FA3_FP8_FIELD(scale_k), head_k * p.k_scale_blocks + token_k / kFp8ScaleBlock + b);
  }
  sts32(FA3_FP8_FIELD(row0), row0);
  const KeyRange blocks =
      key_blocks(visible_keys(row0, T::kBlockM, lds32(FA3_FP8_FIELD(len_q)),
                              lds32(FA3_FP8_FIELD(len_k)), p.window_left, p.window_right));
  sts32(FA3_FP8_FIELD(block_begin), blocks.begin);
  sts32(FA3_FP8_FIELD(block_end), blocks.end);
  return true;
}

#undef FA3_FP8_FIELD

}  // namespace fa3

// Which keys a query row sees, and which key blocks a query tile therefore visits.
//
// Bottom-right aligned: with shift = Sk - Sq, row i sees key j iff
//   i + shift - left <= j <= i + shift + right   and   0 <= j < Sk;   a negative side is unbounded.
// Blocks are visited from the right, so that the blocks that need a mask on the right come first.
#pragma once
#include "ptx/types.cuh"

namespace fa3 {

enum class Mask {
  None,    // only the end of the sequence
  Causal,  // right = 0
  Window,  // left and right at run time, either may be unbounded; covers the other two
};

struct MaskBounds {
  int seqlen_q, seqlen_k;
  int left, right;  // -1: unbounded; read only by Mask::Window

  // One past the last key that row i sees (may be <= 0) and the first one (may be >= seqlen_k).
  template <Mask kMask>
  FA3_HD int end_of_row(int i) const {
    if (kMask == Mask::None || (kMask == Mask::Window && right < 0)) return seqlen_k;
    const int end = i + seqlen_k - seqlen_q + 1 + (kMask == Mask::Window ? right : 0);
    return end < seqlen_k ? end : seqlen_k;
  }
  template <Mask kMask>
  FA3_HD int begin_of_row(int i) const {
    if (kMask != Mask::Window || left < 0) return 0;
    const int begin = i + seqlen_k - seqlen_q - left;
    return begin > 0 ? begin : 0;
  }
};

// Key blocks [begin, end) that rows [row, row + rows) of the sequence touch; empty where begin >=
// end.
struct BlockRange {
  int begin, end;
  FA3_HD bool empty() const { return begin >= end; }
};
template <Mask kMask>
FA3_HD BlockRange visited_blocks(const MaskBounds& bounds, int row, int rows, int block_n) {
  const int last = (row + rows < bounds.seqlen_q ? row + rows : bounds.seqlen_q) - 1;
  const int keys = bounds.end_of_row<kMask>(last);
  const int first_key = bounds.begin_of_row<kMask>(row);
  const int end = keys > 0 ? (keys + block_n - 1) / block_n : 0;
  return {first_key / block_n, end};
}
// The sub-range in which every one of these rows sees every key: no mask needed there. May be
// empty.
template <Mask kMask>
FA3_HD BlockRange unmasked_blocks(const MaskBounds& bounds, int row, int rows, int block_n) {
  const int keys = bounds.end_of_row<kMask>(row);
  const int first_key = bounds.begin_of_row<kMask>(row + rows - 1);
  return {(first_key + block_n - 1) / block_n, keys > 0 ? keys / block_n : 0};
}

#if defined(__CUDACC__)
// Sets scores outside [begin[i], end[i]) to -inf; i = 0, 1 are the two rows of this thread, and the
// bounds are relative to the first column the thread holds (column 2 * (lane % 4) of the block).
template <bool kLeft, int N>
FA3_DEVICE void mask_scores(float (&s)[N], const int (&begin)[2], const int (&end)[2]) {
#pragma unroll
  for (int r = 0; r < N; ++r) {
    const int col = 8 * (r >> 2) + (r & 1), i = (r >> 1) & 1;
    if (col >= end[i] || (kLeft && col < begin[i])) s[r] = -INFINITY;
  }
}
#endif

}  // namespace fa3

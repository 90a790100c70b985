// FP8 forward: which key blocks a tile of query rows needs, and which of those need no mask.
// Integer arithmetic only: tests/unit compares it with the mask itself.
//
// With shift = len_k - len_q, row i sees key j iff i + shift - window_left <= j <= i + shift +
// window_right and j < len_k.
#pragma once
#include "ptx/types.cuh"

namespace fa3 {

constexpr int kFp8ScaleBlock = 128;  // tokens per descale
constexpr int kFp8BlockN = 128;      // keys per step: one K and one V scale each

struct KeyRange {
  int begin, end;  // keys or key blocks [begin, end)
};

// Keys that at least one of the rows [row, row + rows) sees.
FA3_HD KeyRange visible_keys(int row, int rows, int len_q, int len_k, int window_left,
                             int window_right) {
  const int shift = len_k - len_q;
  const int last = (row + rows < len_q ? row + rows : len_q) - 1;
  const int right = last + shift + window_right + 1;
  const int left = row + shift - window_left;
  KeyRange r{left > 0 ? left : 0, right < len_k ? right : len_k};
  if (last < row || r.end <= r.begin) r = {0, 0};
  return r;
}

FA3_HD KeyRange key_blocks(KeyRange keys) {
  return {keys.begin / kFp8BlockN, (keys.end + kFp8BlockN - 1) / kFp8BlockN};
}

// Key blocks [begin, end) that all rows [row, row + rows) see whole: they need no mask.
FA3_HD KeyRange unmasked_blocks(int row, int rows, int len_q, int len_k, int window_left,
                                int window_right) {
  const int shift = len_k - len_q;
  const int right = row + shift + window_right + 1;  // of the first row
  const int left = row + rows - 1 + shift - window_left;
  const int keys = right < len_k ? right : len_k;
  return {left > 0 ? (left + kFp8BlockN - 1) / kFp8BlockN : 0, keys > 0 ? keys / kFp8BlockN : 0};
}

}  // namespace fa3

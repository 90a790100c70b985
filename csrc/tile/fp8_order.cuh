// Orders in which the FP8 product P V sees keys and columns. Integer arithmetic only: tests/unit
// checks every index.
//
// An 8-bit wgmma takes K-major operands alone, so V [key][d] must become Vt [d][key]. Two orders
// are free to choose and are chosen so that nothing has to move between threads:
//   keys     the scores of a thread, packed as they lie in its accumulator, are the A operand of P
//   V if Vt holds the keys
//            of every 16 in the order 2q, 2q+1, 8+2q, 9+2q (q = 0..3);
//   columns  a transposed 8x8 matrix of 16-bit units yields two 8-bit rows, d even and d odd. Even
//   rows go to the first
//            half of a group of 16, odd rows to the second: stores of 8 neighbouring rows never
//            meet in a bank.
#pragma once
#include "ptx/types.cuh"

namespace fa3 {

// Key (0..15) at byte `position` (0..15) of a 16-key group of a row of Vt.
FA3_HD constexpr int vt_key(int position) {
  return 8 * ((position >> 1) & 1) + 2 * (position >> 2) + (position & 1);
}

// Column d (0..15) of V in row `row` (0..15) of a 16-row group of Vt.
FA3_HD constexpr int vt_column(int row) {
  return row < 8 ? 2 * row : 2 * (row - 8) + 1;
}

// The 8-bit A operand: word w (0..3) of a k-step of 32 keys holds, lowest byte first, these
// accumulator registers of the 16 that a thread has for those 32 keys.
FA3_HD constexpr int p_register(int word, int byte) {
  return 8 * (word >> 1) + 2 * (word & 1) + 4 * (byte >> 1) + (byte & 1);
}

// Accumulator register (of the 8 that a thread has for 16 columns) with column 4 * (lane % 4) + i,
// i = 0..3, of O, for row lane / 4 + 8 * half.
FA3_HD constexpr int o_register(int half, int i) {
  return 2 * half + (i >> 1) + 4 * (i & 1);
}

// One warp moves 32 keys x 16 columns at a time. Lane l reads, by ldmatrix.x4.trans, 16 bytes of
// key `l`, and writes, by stmatrix.x4, 16 bytes of row transposer_row(l) of the group of 16, from
// byte transposer_byte(l) of the 32 keys.
FA3_HD constexpr int transposer_row(int lane) {
  return 8 * ((lane >> 3) & 1) + (lane & 7);
}
FA3_HD constexpr int transposer_byte(int lane) {
  return 16 * (lane >> 4);
}
constexpr uint32_t kEvenBytes =
    0x6420;  // prmt of {keys 8-15, keys 0-7}: the even column of the pair
constexpr uint32_t kOddBytes = 0x7531;

}  // namespace fa3

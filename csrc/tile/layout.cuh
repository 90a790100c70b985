// Where things are: accumulator fragments, swizzled shared-memory tiles, wgmma descriptors.
// Everything here is plain integer arithmetic, tested exhaustively on the host (tests/unit).
//
// A tile of `rows` x `cols` elements lies in shared memory as slabs: [cols * bytes /
// width][rows][width bytes], width = the swizzle width (128, 64 or 32 bytes). Inside a slab the
// 16-byte chunk index is XORed with address bits 7 and up, which is what TMA writes and wgmma reads
// in the mode of that width. Every slab starts at a multiple of 8 * width bytes, so that offsets
// and addresses swizzle alike.
#pragma once
#include "ptx/types.cuh"

namespace fa3 {

constexpr int kSharedBytesPerBlock = 232448;  // what one thread block of sm_90 can have (227 KB)
constexpr int kWarpgroupRows = 64;            // M of every wgmma

FA3_HD constexpr int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}
FA3_HD constexpr int round_up(int a, int b) {
  return ceil_div(a, b) * b;
}

// ---- swizzle ---------------------------------------------------------------------------------
// The hardware XORs address bits 4.. with bits 7..: three bits at width 128, two at 64, one at 32.
template <int kWidth>
FA3_HD constexpr uint32_t swizzle(uint32_t offset) {
  static_assert(kWidth == 128 || kWidth == 64 || kWidth == 32, "swizzle width in bytes");
  constexpr uint32_t kChunks = kWidth / 16 - 1;
  return offset ^ (((offset >> 7) & kChunks) << 4);
}

// Byte offset of element (row, col) of a tile with `rows` rows.
template <int kWidth, int kElemBytes>
FA3_HD constexpr uint32_t tile_offset(int rows, int row, int col) {
  const int byte = col * kElemBytes;
  const int slab = byte / kWidth;
  return swizzle<kWidth>(slab * rows * kWidth + row * kWidth + byte % kWidth);
}

// ---- wgmma matrix descriptor -----------------------------------------------------------------
// Bits 0-13 address / 16, 16-29 leading-dimension offset / 16, 32-45 stride offset / 16, 62-63
// swizzle mode. The parts that do not depend on the address, as a compile-time constant:
//   K-major:  lbo is ignored; sbo = 8 rows = 8 * width. Next k-step inside a slab: + 32 bytes.
//   MN-major: lbo = slab to slab = rows * width (unused when one slab holds N); sbo = 8 k-rows = 8
//   * width.
//             Next k-step of 16 rows: + 16 * width bytes.
// The address sits in the low word and the address field never carries out (shared memory ends
// below 2^18 bytes), so that stepping through a tile is 32-bit arithmetic on the low word; the high
// word is a constant.
template <int kWidth>
FA3_HD constexpr uint32_t descriptor_high() {
  static_assert(kWidth == 128 || kWidth == 64 || kWidth == 32, "swizzle width in bytes");
  constexpr uint32_t kMode = kWidth == 128 ? 1 : kWidth == 64 ? 2 : 3;
  return uint32_t((8 * kWidth) >> 4) | (kMode << 30);
}
FA3_HD constexpr uint32_t descriptor_low(uint32_t addr, uint32_t lbo_bytes) {
  return ((addr & 0x3ffff) >> 4) | (((lbo_bytes >> 4) & 0x3fff) << 16);
}
// The descriptor of the operand `bytes` further on.
template <int kWidth>
FA3_HD constexpr uint64_t descriptor(uint32_t low, uint32_t bytes = 0) {
  return (uint64_t(descriptor_high<kWidth>()) << 32) | (low + (bytes >> 4));
}
// The same in one piece, for code that keeps whole descriptors: form without address, then the
// address.
template <int kWidth>
FA3_HD constexpr uint64_t descriptor_form(uint32_t lbo_bytes) {
  return descriptor<kWidth>(descriptor_low(0, lbo_bytes));
}
FA3_HD constexpr uint64_t descriptor_at(uint64_t form, uint32_t addr) {
  return form | ((addr & 0x3ffff) >> 4);
}
FA3_HD constexpr uint64_t descriptor_step(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// ---- fragments -------------------------------------------------------------------------------
// Accumulator register r of thread t of a warpgroup holds element (acc_row, acc_col) of the 64 x N
// result. Two neighbouring columns share a register pair; a quad (4 lanes) holds a row.
FA3_HD constexpr int acc_row(int t, int r) {
  return 16 * (t / 32) + (t % 32) / 4 + 8 * ((r >> 1) & 1);
}
FA3_HD constexpr int acc_col(int t, int r) {
  return 8 * (r >> 2) + 2 * (t % 4) + (r & 1);
}

// 16-bit A operand from registers: word w (0..3) of k-step j holds columns a_col, a_col + 1 (low
// half first) of row a_row. It is the accumulator layout with pairs packed: word w of k-step j =
// registers 8j + 2w, + 1.
FA3_HD constexpr int a_row(int t, int w) {
  return 16 * (t / 32) + (t % 32) / 4 + 8 * (w & 1);
}
FA3_HD constexpr int a_col(int t, int j, int w) {
  return 16 * j + 8 * (w >> 1) + 2 * (t % 4);
}

// stmatrix x4 of accumulators 8j .. 8j + 7 (packed in pairs): the row and the 8-column chunk that
// lane l of warp w addresses, so that the 64 x 16 piece of k-step j lands row-major.
FA3_HD constexpr int stmatrix_row(int t) {
  return 16 * (t / 32) + t % 16;
}
FA3_HD constexpr int stmatrix_chunk(int t, int j) {
  return 2 * j + (t % 32) / 16;
}

}  // namespace fa3

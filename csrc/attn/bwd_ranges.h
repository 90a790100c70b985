// Which blocks meet which, and in what order: integer arithmetic of the backward, for device and
// host alike. tests/unit/test_bwd_ranges.py compiles this file with a host compiler and checks it
// against brute force.
//
// Queries come in blocks of block_m, keys in blocks of block_n. With shift = Sk - Sq, query i sees
// key j iff
//   i + shift - left <= j <= i + shift + right,
// an absent bound being kUnbounded, which is far beyond any length and still adds without overflow.
#pragma once
#include "tile/layout.cuh"

namespace fa3 {

constexpr int kUnbounded = 1 << 29;
// Of one sequence: |i + shift +- kUnbounded| stays below 2^31, tiles of 128 keys below 2^21.
constexpr int kMaxTokens = (1 << 28) - 128;

constexpr int kBwdKeyTile = 128;  // keys of a tile of bwd_fused

struct BlockShape {
  int block_m, block_n;
};
struct Mask {
  int shift, left, right;
};

// Half-open range of blocks.
struct BlockRange {
  int begin, end;
  FA3_HD int size() const { return end > begin ? end - begin : 0; }
};

FA3_HD int floor_at_zero(int a, int b) {
  return a > 0 ? a / b : 0;
}
FA3_HD int ceil_at_zero(int a, int b) {
  return a > 0 ? (a + b - 1) / b : 0;
}

// Query blocks with a visible key in key block n. Both ends grow with n.
FA3_HD BlockRange query_blocks(BlockShape s, Mask mask, int n, int num_query_blocks) {
  const int begin = floor_at_zero(n * s.block_n - mask.shift - mask.right, s.block_m);
  const int end = ceil_at_zero((n + 1) * s.block_n - mask.shift + mask.left, s.block_m);
  return {begin, end < num_query_blocks ? end : num_query_blocks};
}

// Key blocks n whose query_blocks() contain m: contiguous, because both ends grow with n.
FA3_HD BlockRange key_blocks(BlockShape s, Mask mask, int m, int num_key_blocks) {
  const int begin = floor_at_zero(m * s.block_m + mask.shift - mask.left, s.block_n);
  const int last = (m + 1) * s.block_m - 1 + mask.shift + mask.right;
  const int end = last < 0 ? 0 : last / s.block_n + 1;
  return {begin, end < num_key_blocks ? end : num_key_blocks};
}

// True if block (m, n) holds a pair that the right (left) bound hides: only then is it compared
// element by element.
FA3_HD bool right_bound_cuts(BlockShape s, Mask mask, int m, int n) {
  return (n + 1) * s.block_n - 1 > m * s.block_m + mask.shift + mask.right;
}
FA3_HD bool left_bound_cuts(BlockShape s, Mask mask, int m, int n) {
  return n * s.block_n < (m + 1) * s.block_m - 1 + mask.shift - mask.left;
}

// ---- padded block numbers of packed sequences ---------------------------------------------------
// Sequence b of packed tokens begins at block first_block(start, b, block): a formula in its own
// start alone, so that no prefix sum is needed. Each sequence has at least ceil(length / block)
// numbers; at most one per sequence is spare.
FA3_HD int first_block(int start, int b, int block) {
  return (start + b * block) / block;
}
FA3_HD int packed_blocks(int total, int batch, int block) {
  return total / block + batch;
}

// ---- order of the key tiles ---------------------------------------------------------------------
// Index -> (key block, head). Heads come in sections that share L2; within one, all heads of a key
// block are neighbours, and key blocks ascend (causal: longest first) or descend. A deterministic
// sum over key blocks adds in index order; tiles are handed out by ascending index, so whoever
// waits waits for a tile that is already running.
struct TileOrder {
  int num_heads;       // dense: batch * heads; packed: heads
  int num_key_blocks;  // dense: of one sequence; packed: packed_blocks()
  int section;         // heads
  int descending;
};
struct TileName {
  int key_block, head;
};
FA3_HD int tile_count(TileOrder o) {
  return o.num_heads * o.num_key_blocks;
}
FA3_HD TileName tile_name(TileOrder o, int index) {
  const int per_section = o.section * o.num_key_blocks;
  const int s = index / per_section, rest = index - s * per_section;
  const int left = o.num_heads - s * o.section;
  const int width = left < o.section ? left : o.section;  // the last section may be narrower
  const int n = rest / width;
  return {o.descending ? o.num_key_blocks - 1 - n : n, s * o.section + rest - n * width};
}

// ---- dQ sums of a row block ---------------------------------------------------------------------
// 64 bits, changed by additions alone: tickets drawn (21 bits), closed (1), arrivals (21), arrivals
// expected (21).
struct DqState {
  static constexpr uint64_t kArrival = uint64_t(1) << 21, kClosed = uint64_t(1) << 42,
                            kTicket = uint64_t(1) << 43;
  static FA3_HD uint32_t expected(uint64_t s) { return uint32_t(s) & 0x1fffff; }
  static FA3_HD uint32_t arrivals(uint64_t s) { return uint32_t(s >> 21) & 0x1fffff; }
  static FA3_HD bool closed(uint64_t s) { return s & kClosed; }
  static FA3_HD uint32_t tickets(uint64_t s) { return uint32_t(s >> 43); }
};
// Which thread block finishes a row block: groups of four, dealt out in turn. Number `i` of those
// of thread block `owner` among `owners`.
FA3_HD int owned_row_block(int i, int owner, int owners) {
  return (i / 4 * owners + owner) * 4 + i % 4;
}

// ---- row statistics -----------------------------------------------------------------------------
// Place of query row r in its block's statistics where scores are computed transposed (queries are
// accumulator columns): within 16 rows, the four values that one thread needs (columns 2q, 2q+1,
// 8+2q, 9+2q) are neighbours.
FA3_HD int statistics_slot(int r) {
  return (r & ~15) | ((r & 6) << 1) | ((r & 8) >> 2) | (r & 1);
}

}  // namespace fa3

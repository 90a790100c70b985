// The integer arithmetic of csrc/tile as a host library: what tests/unit/test_tile.py checks by
// brute force.
#include "tile/layout.cuh"
#include "tile/mask.cuh"
#include "tile/pipeline.cuh"
#include "tile/scheduler.cuh"

using namespace fa3;

namespace {

template <class F>
auto with_mask(int mask, F f) {
  switch (mask) {
    case 0: return f(std::integral_constant<Mask, Mask::None>{});
    case 1: return f(std::integral_constant<Mask, Mask::Causal>{});
    default: return f(std::integral_constant<Mask, Mask::Window>{});
  }
}

}  // namespace

extern "C" {

int64_t tile_offset_of(int width, int elem_bytes, int rows, int row, int col) {
  if (width == 128)
    return elem_bytes == 1   ? tile_offset<128, 1>(rows, row, col)
           : elem_bytes == 2 ? tile_offset<128, 2>(rows, row, col)
                             : tile_offset<128, 4>(rows, row, col);
  if (width == 64)
    return elem_bytes == 1   ? tile_offset<64, 1>(rows, row, col)
           : elem_bytes == 2 ? tile_offset<64, 2>(rows, row, col)
                             : tile_offset<64, 4>(rows, row, col);
  return elem_bytes == 1   ? tile_offset<32, 1>(rows, row, col)
         : elem_bytes == 2 ? tile_offset<32, 2>(rows, row, col)
                           : tile_offset<32, 4>(rows, row, col);
}
uint64_t descriptor_of(int width, uint32_t addr, uint32_t lbo, uint32_t step) {
  const uint32_t low = descriptor_low(addr, lbo);
  return width == 128  ? descriptor<128>(low, step)
         : width == 64 ? descriptor<64>(low, step)
                       : descriptor<32>(low, step);
}
uint64_t descriptor_whole(int width, uint32_t addr, uint32_t lbo, uint32_t step) {
  const uint64_t form = width == 128  ? descriptor_form<128>(lbo)
                        : width == 64 ? descriptor_form<64>(lbo)
                                      : descriptor_form<32>(lbo);
  return descriptor_step(descriptor_at(form, addr), step);
}
void acc_position(int thread, int reg, int* row, int* col) {
  *row = acc_row(thread, reg), *col = acc_col(thread, reg);
}
void a_position(int thread, int step, int word, int* row, int* col) {
  *row = a_row(thread, word), *col = a_col(thread, step, word);
}
void stmatrix_position(int thread, int step, int* row, int* chunk) {
  *row = stmatrix_row(thread), *chunk = stmatrix_chunk(thread, step);
}

void row_bounds(int mask, int sq, int sk, int left, int right, int row, int* begin, int* end) {
  const MaskBounds b{sq, sk, left, right};
  with_mask(mask, [&](auto m) {
    *begin = b.begin_of_row<m.value>(row);
    *end = b.end_of_row<m.value>(row);
    return 0;
  });
}
void block_ranges(int mask, int sq, int sk, int left, int right, int row, int rows, int block_n,
                  int* out) {
  const MaskBounds b{sq, sk, left, right};
  with_mask(mask, [&](auto m) {
    const BlockRange v = visited_blocks<m.value>(b, row, rows, block_n),
                     u = unmasked_blocks<m.value>(b, row, rows, block_n);
    out[0] = v.begin, out[1] = v.end, out[2] = u.begin, out[3] = u.end;
    return 0;
  });
}
void tile_at(int index, int tiles, int heads, int section, int* m, int* head) {
  const TilePosition at = longest_first(index, tiles, heads, section);
  *m = at.m, *head = at.head;
}
int snake_index(int round, int cta, int ctas) {
  return snake(round, cta, ctas);
}
int section_heads(int64_t bytes, int group, int64_t budget) {
  return heads_per_section(bytes, group, budget);
}
void ring_after(int stages, int steps, uint32_t* stage, uint32_t* phase) {
  const auto run = [&](auto ring) {
    for (int i = 0; i < steps; ++i) ring.advance();
    *stage = ring.stage, *phase = ring.phase;
  };
  stages == 1 ? run(Ring<1>{}) : stages == 2 ? run(Ring<2>{}) : run(Ring<3>{});
}

}  // extern "C"

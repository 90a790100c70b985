// In which order query tiles are worked off. Host-testable arithmetic; the kernel adds the atomic
// counter.
//
// Tiles of a group of heads ("section") whose keys and values fit into L2 together are neighbours
// in the order; inside a section the last query tiles come first, because under a causal mask they
// are the longest and a long tile at the end of the launch would leave the other SMs idle.
#pragma once
#include <cstdint>

#include "ptx/types.cuh"

namespace fa3 {

struct TilePosition {
  int m;     // query tile of the head
  int head;  // counts over everything that was scheduled together (dense: batch * heads)
};
FA3_HD TilePosition longest_first(int index, int tiles_per_head, int heads, int section) {
  const int per_section = section * tiles_per_head;
  const int s = index / per_section, rest = index - s * per_section;
  const int left = heads - s * section, width = section < left ? section : left;
  const int back = rest / width;
  return {tiles_per_head - 1 - back, s * section + rest - back * width};
}

// Static schedule of CTA `cta` of `ctas`: its index in round `round`. Every other round runs
// backwards, so that with costs that fall along the order no CTA gets the longer tile of every
// round.
FA3_HD int snake(int round, int cta, int ctas) {
  return round * ctas + ((round & 1) ? ctas - 1 - cta : cta);
}

// Query heads per section: the largest power of two of KV heads whose keys and values fit into
// `budget` bytes.
FA3_HD int heads_per_section(int64_t bytes_per_kv_head, int group, int64_t budget) {
  int64_t kv_heads = 1;
  while (2 * kv_heads * bytes_per_kv_head <= budget && kv_heads < (1 << 20)) kv_heads *= 2;
  return static_cast<int>(kv_heads * group < (1 << 24) ? kv_heads * group : (1 << 24));
}

}  // namespace fa3

// Tiles that lie together in memory: all heads of a token, or of a few tokens where heads are few.
#pragma once
#include "prep/row_io.cuh"

namespace fa3::prep {

// Coordinates of a tile.
struct Tile {
  int tensor, head, token, batch;
};

template <class Params>
FA3_DEVICE Tile locate_tile(const Params& p, int rows_log2, int index) {
  Tile tile;
  const int group = index / p.tiles_per_group, inside = index - group * p.tiles_per_group;
  tile.tensor = (inside >= p.tensors[1].first_tile) + (inside >= p.tensors[2].first_tile);
  const TokenTensor& tensor = p.tensors[tile.tensor];
  const int local = inside - tensor.first_tile;
  const int step = local / tensor.head_chunks, chunk = local - step * tensor.head_chunks;
  tile.batch = group / p.groups_per_batch;
  tile.token = ((group - tile.batch * p.groups_per_batch) << p.group_tokens_log2) +
               (step << (rows_log2 - tensor.heads_log2));
  tile.head = chunk << tensor.heads_log2;
  return tile;
}

// Row of the tables for token `token` of batch entry `batch`; -1: outside.
template <class Params>
FA3_DEVICE int position_of(const Params& p, int batch, int token) {
  const Sequences& s = p.sequences;
  const int32_t* cu = s.cu_seqlens;
  token = min(token, (cu ? s.total : s.seqlen) -
                         1);  // rows past the end are zeros and must meet finite angles
  int position = token;
  if (p.rotation.position_ids) {
    position = p.rotation.position_ids[(cu ? 0 : batch * s.seqlen) + token];
  } else if (cu) {
    int low = 0, high = s.batch - 1;  // the last sequence that starts at or before the token
    while (low < high) {
      const int mid = (low + high + 1) / 2;
      if (cu[mid] <= token)
        low = mid;
      else
        high = mid - 1;
    }
    position = token - cu[low];
    if (token >= cu[low + 1]) position = 0;  // a row of no sequence
  }
  return checked_position(position, p.rotation.positions);
}

}  // namespace fa3::prep

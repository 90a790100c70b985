// The launchers of fa3_prep: arguments are checked, `chosen` are indices of the tensors that share
// the launch.
#pragma once
#include "host.h"

namespace fa3::prep {

constexpr const char* kFunction = "fa3_prep";
constexpr int kPlain = 1;  // fa3_prep_params.options: FP32 arithmetic only, no tensor cores

inline int64_t rows_of(const fa3_prep_params& p) {
  return p.cu_seqlens ? p.total : int64_t(p.batch) * p.seqlen;
}

bool has_transform(int head_dim);
// Whether the tile kernel serves a tensor of the call.
bool takes_tiles(const fa3_prep_params& p, const fa3_prep_tensor& tensor);

int launch_blocks(const fa3_prep_params& p, const int* chosen, int count, const Device& device);
int launch_tokens(const fa3_prep_params& p, const int* chosen, int count, const Device& device);
int launch_tiles(const fa3_prep_params& p, const int* chosen, int count, const Device& device);
int launch_rotation(const fa3_prep_params& p, const int* chosen, int count, const Device& device);
int launch_codes(const fa3_prep_params& p, const Device& device);

}  // namespace fa3::prep

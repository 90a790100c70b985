// The integer arithmetic of the FP8 forward as a host library: what tests/unit/test_fp8_layout.py checks by brute force.
#include "attn/fp8_keys.cuh"
#include "tile/fp8_order.cuh"
#include "tile/layout.cuh"

extern "C" {

int vt_key_of(int position) { return fa3::vt_key(position); }
int vt_column_of(int row) { return fa3::vt_column(row); }
int p_register_of(int word, int byte) { return fa3::p_register(word, byte); }
int o_register_of(int half, int i) { return fa3::o_register(half, i); }
int transposer_row_of(int lane) { return fa3::transposer_row(lane); }
int transposer_byte_of(int lane) { return fa3::transposer_byte(lane); }
uint32_t even_bytes() { return fa3::kEvenBytes; }
uint32_t odd_bytes() { return fa3::kOddBytes; }
int acc_row_of(int thread, int reg) { return fa3::acc_row(thread, reg); }
int acc_col_of(int thread, int reg) { return fa3::acc_col(thread, reg); }

// out: visible keys begin, end; their blocks begin, end; unmasked blocks begin, end.
void key_ranges(int row, int rows, int len_q, int len_k, int left, int right, int* out) {
  const fa3::KeyRange keys = fa3::visible_keys(row, rows, len_q, len_k, left, right), blocks = fa3::key_blocks(keys);
  const fa3::KeyRange whole = fa3::unmasked_blocks(row, rows, len_q, len_k, left, right);
  const int values[6] = {keys.begin, keys.end, blocks.begin, blocks.end, whole.begin, whole.end};
  for (int i = 0; i < 6; ++i) out[i] = values[i];
}

}  // extern "C"

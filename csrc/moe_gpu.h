// Arguments of mixture-of-experts layers on NVIDIA GPUs. An assignment is a token and one of its places: number
// token * places + place. Nothing here depends on how many tokens an expert got, but for which block does what.
//
// A product is the matmul family's: bf16 and fp16 on the matrix unit, one fp32 accumulator, k ascending in the steps of 16
// of the instruction, from +0; then the bias in fp32. It is rounded to the dtype, or kept in fp32.
#pragma once
#include <cstdint>

namespace detinfer {

// Sorts assignments by expert and cuts each expert's into tiles of `tile_rows`. An expert outside of 0 .. experts - 1 is
// left out. tiles: their number, then for each its expert, first and end in `order`.
struct GpuMoeGroup {
  const int64_t* chosen;
  int32_t* order;
  int32_t* tiles;
  int64_t assignments;
  int32_t experts, tile_rows;
};

enum class GpuMoePath : int32_t { kReference = 0, kTile };

// out[a, n] = sum_k x[a / places, k] * w[expert of a, n, k] + bias[expert of a, n], out contiguous.
struct GpuMoeProduct {
  int32_t dtype;      // kBFloat16 or kFloat16
  int32_t path;       // GpuMoePath
  int32_t tile_rows;  // 16, 32, 64 or 128, as the tiles were cut. No choice changes a bit.
  int32_t unrounded;  // 1: out is fp32
  int64_t assignments, places, n, k, most_tiles;
  int64_t x_row, w_expert, w_n, w_k, bias_expert;  // strides in elements; k is contiguous in x
  const void* x;
  const void* w;
  const void* bias;       // of `dtype`, or null
  const int64_t* chosen;  // the plain path's; null: expert 0 for all
  const int32_t* order;   // null: one expert, assignments in order
  const int32_t* tiles;
  void* out;
};

// out[t] = w_0 * e_0, then + (w_r * e_r) for each place r, then + shared; one rounding. An assignment to no expert gives NaN.
struct GpuMoeCombine {
  int32_t dtype, weight_dtype, experts, reserved;
  int64_t tokens, places, width;
  const int64_t* chosen;
  const void* weights;   // [tokens, places]
  const float* outputs;  // [tokens, places, width]
  const float* shared;   // [tokens, width], or null
  void* out;
};

// The `count` greatest (or least) of n <= 1024 elements, equal ones by the lower index; NaN is greater than any number.
struct GpuMoeTopK {
  int32_t dtype, count, largest, n;
  int64_t rows, row_stride;
  const void* x;
  void* values;
  int64_t* indices;
};

}  // namespace detinfer

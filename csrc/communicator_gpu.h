// Collectives between GPUs of one host: the C interface of the GPU library (detinfer/collectives/cuda_native.py).
#pragma once
#include <cstdint>

namespace detinfer {

static constexpr int32_t kGpuAbi = 4;

enum class GpuCollective : int32_t { kAllReduce = 0, kReduceScatter, kAllGather, kAllReduceRmsNorm };
enum class GpuPath : int32_t { kPush = 0, kPushTiles, kPull, kTwoShot };

// The geometry of a communicator: the same on every rank.
struct GpuConfig {
  int32_t rank, ranks;
  int32_t push_channels;     // blocks of a push at most
  int32_t push_bytes;        // of data a rank may push through one channel
  int32_t push_threads;      // of a block
  int32_t tile_channels;     // blocks of the other paths at most
  int32_t tile_bytes;        // of one rank in one slot of push_tiles and pull
  int32_t part_bytes;        // of one tile of two_shot, over all its parts
  int32_t least_tile_bytes;  // tiles are not made smaller than this to employ more blocks
  int32_t overlap;           // set a kernel up while the one before it runs
  uint32_t first_sequence;   // for tests: what every channel has counted before the first call
  int32_t tile_threads;      // of a block of the other paths
  int32_t row_blocks;        // that may share a row of all_reduce_rms_norm: 1, 2, 4 or 8
  double time_limit_s;
};

struct GpuCall {
  int32_t collective;  // GpuCollective
  int32_t path;        // GpuPath
  int32_t dtype;       // DType; all_gather: ignored
  int32_t op;          // ReduceOp
  int32_t order;       // RankOrder
  int32_t weight_dtype, weight_mode, residual_mode;
  int32_t blocks;      // of tiles at most; 0: as many as there are channels
  int32_t tile_bytes;  // of one rank in one slot at most; 0: all that a slot holds
  int64_t count;  // elements of the result of an all_reduce, of a slice of a reduce_scatter; bytes of a part of all_gather
  int64_t inner;  // all_gather: bytes of a part that lie side by side in `out`; all_reduce_rms_norm: elements of a row
  int64_t width;  // all_reduce_rms_norm: elements of a row that count, the others being zeros behind them; 0: all
  double eps;
  const void* in;
  void* out;
  const void* residual;
  void* residual_out;
  const void* weight;
  void* stream;
};

}  // namespace detinfer

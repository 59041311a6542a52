// Collectives between the processes of one host, over one anonymous shared mapping.
#pragma once
#include <cstdint>

#include "all_reduce.h"

namespace detinfer {

// detinfer/collectives/calls.py has the same numbers and fields.
enum class Collective : int32_t { kBarrier = 0, kAllReduce, kReduceScatter, kAllGather, kAllReduceRmsNorm };
enum class ReducePath : int32_t { k1Stage = 0, k2Stage };

// What the ranks of one call have to agree on: compared byte by byte, so it has no padding.
struct CollectiveCall {
  int32_t collective;   // Collective
  int32_t dtype;        // DType, or a number that stands for another dtype of `item` bytes (all_gather)
  int32_t item;         // bytes of an element
  int32_t op;           // ReduceOp
  int32_t order;        // RankOrder
  int32_t path;         // ReducePath
  int32_t mode;         // ResidualMode
  int32_t weight_mode;  // WeightMode
  int32_t weight_dtype; // DType, or -1: no weight
  int32_t dim;          // the dimension that is scattered or gathered; the kernel sees it moved to the front
  int64_t count;        // elements of a rank's input
  int64_t n;            // all_reduce_rms_norm: elements of a row; else 0
  double eps;
};

struct CollectiveArgs {
  CollectiveCall call;
  const void* in;        // `count` elements
  void* out;             // all_reduce: may be `in`. reduce_scatter: count / ranks elements. all_gather: count * ranks
  const void* residual;  // all_reduce_rms_norm: `count` elements, the same on every rank
  const void* weight;    // all_reduce_rms_norm: n elements, the same on every rank
  void* residual_out;
};

struct Communicator;

}  // namespace detinfer

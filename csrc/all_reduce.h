// Arguments of the all_reduce family: the reduction of N ranks' elements that lie in this process's memory.
#pragma once
#include <cstdint>

#include "order.h"

namespace detinfer {

// detinfer/collectives/calls.py has the same numbers.
enum class ReduceOp : int32_t { kSum = 0, kAvg, kMax, kMin };
enum class RankOrder : int32_t { kLinear = 0, kTree };

struct AllReduceArgs {
  int32_t dtype;  // DType
  int32_t op;     // ReduceOp; AVG of floating-point dtypes only
  int32_t order;  // RankOrder: of SUM and AVG
  int32_t ranks;  // 2 to kMostRanks
  int64_t count;  // elements
  const void* parts[kMostRanks];
  void* out;  // may be one of `parts`, from its first element on
};

}  // namespace detinfer

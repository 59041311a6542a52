// The CPU kernels' table: one entry a family, one table an instruction set.
#pragma once

#include "../all_reduce.h"
#include "../attention.h"
#include "../elementwise.h"
#include "../matmul.h"
#include "../platform.h"
#include "../rows.h"
#include "../sampling.h"

namespace detinfer {

struct Kernels {
  int (*matmul)(const MatmulArgs&);
  int (*attention)(const AttentionSinksArgs&);
  int (*elementwise)(const ElementwiseArgs&);
  int (*rows)(const RowsArgs&);
  int (*all_reduce)(const AllReduceArgs&);
  int (*sampling)(const SamplingArgs&);
};

#define DETINFER_DECLARE(level)              \
  namespace level {                          \
  int matmul(const MatmulArgs&);             \
  int attention(const AttentionSinksArgs&);  \
  int elementwise(const ElementwiseArgs&);   \
  int rows(const RowsArgs&);                 \
  int all_reduce(const AllReduceArgs&);      \
  int sampling(const SamplingArgs&);         \
  }
DETINFER_DECLARE(baseline)
DETINFER_DECLARE(avx2)
DETINFER_DECLARE(avx512)
DETINFER_DECLARE(avx512_bf16)
#undef DETINFER_DECLARE

const Kernels& kernels();  // of the current instruction set

}  // namespace detinfer

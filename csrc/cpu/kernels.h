// The CPU kernels' table: one entry a family, one table an instruction set.
#pragma once

#include "../attention.h"
#include "../elementwise.h"
#include "../matmul.h"
#include "../platform.h"
#include "../rows.h"

namespace detinfer {

struct Kernels {
  int (*matmul)(const MatmulArgs&);
  int (*attention)(const AttentionArgs&);
  int (*elementwise)(const ElementwiseArgs&);
  int (*rows)(const RowsArgs&);
};

#define DETINFER_DECLARE(level)              \
  namespace level {                          \
  int matmul(const MatmulArgs&);             \
  int attention(const AttentionArgs&);       \
  int elementwise(const ElementwiseArgs&);   \
  int rows(const RowsArgs&);                 \
  }
DETINFER_DECLARE(baseline)
DETINFER_DECLARE(avx2)
DETINFER_DECLARE(avx512)
DETINFER_DECLARE(avx512_bf16)
#undef DETINFER_DECLARE

}  // namespace detinfer

// Arguments of the attention family: scaled dot product attention of every query row over its unmasked keys.
//
// For one query row and its unmasked keys j_0 < j_1 < ...: s_j = (chain of FMAs over depth, ascending, from +0) * scale,
// plus the mask's value if it has values; m = the greatest s_j; p_j = exp(s_j - m); l = row_sum of p_j with lanes
// counted over the unmasked keys (a masked one takes no lane); o = chain of FMAs over unmasked keys, ascending,
// from +0, of p_j * v_j; out = o / l, rounded once to the dtype. All of it in fp32. K and V of a masked key are never
// used; a row without an unmasked key gives +0.
//
// A sink of a query head is a score without a key: m is the greatest of it and the s_j, and l = row_sum + exp(sink - m).
#pragma once
#include <cstdint>

namespace detinfer {

// A bool mask holds one byte a key, 0 = masked. Any other mask is added; -inf = masked.
enum AttentionMask : int32_t { kMaskNone = 0, kMaskBool = 1, kMaskFloat32 = 2, kMaskBFloat16 = 3, kMaskFloat16 = 4 };

// Strides counted in elements. The last dimension of every tensor is contiguous; a stride of 0 broadcasts.
struct AttentionStrides {
  int64_t batch, head, row;
};

// Sizes and strides. The caller may keep a plan and use it for many calls, from many threads.
struct AttentionPlan {
  int32_t dtype;
  int32_t mask_kind;
  int32_t causal;  // 1: query row i sees the keys 0..i alone
  float scale;
  int64_t batch, heads, kv_heads;  // query head h reads key and value head h / (heads / kv_heads)
  int64_t queries, keys, depth, value_depth;
  AttentionStrides q, k, v, mask, out;
};

struct AttentionArgs {
  const AttentionPlan* plan;
  const void* q;
  const void* k;
  const void* v;
  const void* mask;  // null when mask_kind is kMaskNone
  void* out;
};

// The same with one sink for each query head, fp32.
struct AttentionSinksArgs {
  AttentionArgs call;
  const float* sinks;
};

}  // namespace detinfer

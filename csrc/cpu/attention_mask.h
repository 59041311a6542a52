// Masks of attention: what is added to a score, and from which key to which a row has to look.
#pragma once

#include "../attention.h"
#include "math.h"
#include "matmul_problem.h"

namespace detinfer {
namespace {

inline F minus_infinity() { return splat(bits_to_float(0xff800000u)); }

// Lanes below `count`, which may be larger than kLanes.
inline I lanes_below(int64_t count) {
  I lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  return lane < static_cast<int32_t>(least(count, kLanes));
}

// A row of the mask: element i belongs to key i, `keys` of them may be read.
struct MaskRow {
  int32_t kind;
  const void* data;
  int64_t keys;
};

inline MaskRow mask_row(const AttentionPlan& plan, const void* mask, int64_t batch, int64_t head, int64_t query) {
  if (plan.mask_kind == kMaskNone) return {kMaskNone, nullptr, plan.keys};
  const int64_t offset = batch * plan.mask.batch + head * plan.mask.head + query * plan.mask.row;
  const int64_t bytes = plan.mask_kind == kMaskBool ? 1 : plan.mask_kind == kMaskFloat32 ? 4 : 2;
  return {plan.mask_kind, static_cast<const char*>(mask) + offset * bytes, plan.keys};
}

template <DType T> inline F added(const MaskRow& mask, int64_t key) {
  const auto* p = static_cast<const typename Storage<T>::type*>(mask.data) + key;
  const int64_t left = mask.keys - key;
  return left >= kLanes ? load_as<T>(p) : load_some<T>(p, static_cast<int>(left), bits_to_float(0xff800000u));
}

// What is added to the scores of the keys from `key` on: -inf where masked, +0 for the other keys of a bool mask.
inline F mask_values(const MaskRow& mask, int64_t key) {
  switch (mask.kind) {
    case kMaskFloat32: return added<kFloat32>(mask, key);
    case kMaskBFloat16: return added<kBFloat16>(mask, key);
    case kMaskFloat16: return added<kFloat16>(mask, key);
    default: break;
  }
  typedef uint8_t B __attribute__((vector_size(DETINFER_LANES)));
  const uint8_t* p = static_cast<const uint8_t*>(mask.data) + key;
  B bytes = {};
  if (mask.keys - key >= kLanes) std::memcpy(&bytes, p, sizeof bytes);
  else std::memcpy(&bytes, p, mask.keys - key);
  return __builtin_convertvector(bytes, I) != 0 ? F{} : minus_infinity();
}

inline I unmasked(F mask_value) { return mask_value != minus_infinity(); }

// From the row's first unmasked key to behind its last one; `holes`: a key between them is masked.
struct Range {
  int64_t low, high;
  bool holes;
  bool empty() const { return low >= high; }
};

inline uint64_t word(const uint8_t* p) {
  uint64_t w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

inline Range range_of_bytes(const uint8_t* mask, int64_t keys) {
  int64_t low = 0, high = keys;
  while (low + 8 <= high && word(mask + low) == 0) low += 8;
  while (low < high && mask[low] == 0) low++;
  while (low + 32 <= high &&
         (word(mask + high - 8) | word(mask + high - 16) | word(mask + high - 24) | word(mask + high - 32)) == 0)
    high -= 32;
  while (low + 8 <= high && word(mask + high - 8) == 0) high -= 8;
  while (low < high && mask[high - 1] == 0) high--;
  int64_t i = low;
  constexpr uint64_t ones = 0x0101010101010101u;  // torch writes true as 1; any other byte is looked at alone
  while (i + 32 <= high && (word(mask + i) & word(mask + i + 8) & word(mask + i + 16) & word(mask + i + 24)) == ones)
    i += 32;
  while (i + 8 <= high && word(mask + i) == ones) i += 8;
  while (i < high && mask[i] != 0) i++;
  return {low, high, i < high};
}

inline Range range_of_values(const MaskRow& mask, int64_t keys) {
  Range range = {keys, 0, false};
  I count = {};
  for (int64_t key = 0; key < keys; key += kLanes) {
    const I kept = unmasked(mask_values(mask, key)) & lanes_below(keys - key);
    if (!any(kept)) continue;
    count -= kept;
    for (int i = 0; range.empty() && i < kLanes; i++)
      if (kept[i] != 0) range.low = key + i, range.high = keys;
    range.high = key + kLanes;
    while (kept[range.high - key - 1] == 0) range.high--;
  }
  int64_t found = 0;
  for (int i = 0; i < kLanes; i++) found += count[i];
  range.holes = found != range.high - range.low;
  return range;
}

// The range of a row that may see the first `keys` keys and has this mask on them.
inline Range range_of(const MaskRow& mask, int64_t keys) {
  if (mask.kind == kMaskNone) return {0, keys, false};
  if (mask.kind == kMaskBool) return range_of_bytes(static_cast<const uint8_t*>(mask.data), keys);
  return range_of_values(mask, keys);
}

}  // namespace
}  // namespace detinfer

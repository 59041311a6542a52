// Arguments of the attention family.
#pragma once
#include <cstdint>

namespace detinfer {
struct AttentionArgs {
  int32_t dtype;
};
}  // namespace detinfer

// Arguments of the elementwise family.
#pragma once
#include <cstdint>

namespace detinfer {
struct ElementwiseArgs {
  int32_t dtype;
};
}  // namespace detinfer

// Arguments of the matmul family.
#pragma once
#include <cstdint>

namespace detinfer {
struct MatmulArgs {
  int32_t dtype;
};
}  // namespace detinfer

// Arguments of the rows family.
#pragma once
#include <cstdint>

namespace detinfer {
struct RowsArgs {
  int32_t dtype;
};
}  // namespace detinfer

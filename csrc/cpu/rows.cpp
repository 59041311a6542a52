#include "vec.h"
#include "kernels.h"

namespace detinfer {
namespace DETINFER_LEVEL {
int rows(const RowsArgs&) { return fail(kNotSupported, "rows: not built yet"); }
}  // namespace DETINFER_LEVEL
}  // namespace detinfer

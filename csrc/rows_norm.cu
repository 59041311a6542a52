// RMSNorm and LayerNorm on GPUs.
#include "gpu/rows_norm.h"
#include "gpu/rows_shapes.h"

namespace detinfer {
namespace gpu {
namespace {

template <class T> struct Norm {
  static int on(const GpuRowsArgs& p, Stream stream) {
    return with_shape<T, false>(p, [&](auto shape) {
      using Shape = typename decltype(shape)::Type;
      const int blocks = blocks_for<Shape>(p.rows);
      if (blocks < 0) return refuse_rows(kBadArgument, kTooManyRows);
      const auto kernel = p.op == kLayerNorm        ? norm<Shape, kCentered>
                          : p.residual != nullptr ? norm<Shape, kAdded>
                                                  : norm<Shape, kPlain>;
      return launched(launch(kernel, blocks, Shape::kThreads, 0, stream, false, p));
    });
  }
};

}  // namespace

int run_norm(const GpuRowsArgs& p, Stream stream) { return by_dtype<Norm>(p, stream); }

}  // namespace gpu
}  // namespace detinfer

// Softmax and log_softmax on GPUs.
#include "gpu/rows_cluster.h"
#include "gpu/rows_shapes.h"
#include "gpu/rows_softmax.h"

namespace detinfer {
namespace gpu {
namespace {

template <class T> struct Softmax {
  static int on(const GpuRowsArgs& p, Stream stream) {
    const bool chosen = p.shape == static_cast<int32_t>(GpuRowsShape::kChosen), long_rows = p.n > 8192;
    const bool pays = p.n > 65536 || p.rows <= (p.n > 16384 ? 128 : 32);
    if (p.shape == static_cast<int32_t>(GpuRowsShape::kCluster) || (chosen && long_rows && pays && cluster_takes(p)))
      return run_cluster<T>(p, stream);
    return with_shape<T, true>(p, [&](auto shape) {
      using Shape = typename decltype(shape)::Type;
      const int blocks = blocks_for<Shape>(p.rows);
      if (blocks < 0) return refuse_rows(kBadArgument, kTooManyRows);
      if (p.op == kSoftmax) return launched(launch(softmax<Shape, false>, blocks, Shape::kThreads, 0, stream, false, p));
      return launched(launch(softmax<Shape, true>, blocks, Shape::kThreads, 0, stream, false, p));
    });
  }
};

}  // namespace

int run_softmax(const GpuRowsArgs& p, Stream stream) { return by_dtype<Softmax>(p, stream); }

}  // namespace gpu
}  // namespace detinfer

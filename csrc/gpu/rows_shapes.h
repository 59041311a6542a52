// The shapes of rows_gpu.h as types, and the choice among them.
#pragma once

#include "rows_row.h"

namespace detinfer {
namespace gpu {

int refuse_rows(Status status, const char* why);  // rows.cu
int launched(Code code);
int run_norm(const GpuRowsArgs& p, Stream stream);  // rows_norm.cu
int run_softmax(const GpuRowsArgs& p, Stream stream);  // rows_softmax.cu

template <class Shape> struct ShapeIs {
  using Type = Shape;
};

static inline bool on_16(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

// Whether every row of every tensor starts on a 16-byte boundary and ends on one.
static inline bool rows_are_aligned(const GpuRowsArgs& p) {
  const int64_t elements = p.dtype == kFloat32 ? 4 : 8;
  return p.n % elements == 0 && p.x_row % elements == 0 && p.residual_row % elements == 0 && on_16(p.x) &&
         on_16(p.residual) && on_16(p.weight) && on_16(p.bias) && (p.op <= kMin || on_16(p.out)) && on_16(p.residual_out);
}

static inline bool is_softmax(const GpuRowsArgs& p) { return p.op == kSoftmax || p.op == kLogSoftmax; }

static inline GpuRowsShape chosen_shape(const GpuRowsArgs& p) {
  if (!rows_are_aligned(p)) return p.n <= 1024 ? GpuRowsShape::kAnyWarp : GpuRowsShape::kAnyBlock;
  const bool wide = p.dtype == kFloat32, soft = is_softmax(p);
  if (p.n <= 128) return p.rows <= 2112 ? GpuRowsShape::kPartOfWarp : GpuRowsShape::kFewThreads;
  if (p.n <= 1024) return p.rows <= 2112 || (wide && !soft) ? GpuRowsShape::kBlock1024 : GpuRowsShape::kWarp;
  if (p.n <= 2048) return GpuRowsShape::kBlock2048;
  if (p.n <= 4096) return p.op == kSoftmax && p.rows <= 132 ? GpuRowsShape::kManyThreads : GpuRowsShape::kBlock4096;
  if (p.n <= 8192) return soft && p.rows <= (wide ? 1056 : 264) ? GpuRowsShape::kManyThreads : GpuRowsShape::kBlock8192;
  if (p.n <= 16384) return GpuRowsShape::kBlock16384;
  return p.rows < 264 ? GpuRowsShape::kStreamWide : GpuRowsShape::kStream;
}

// visit(ShapeIs<Shape>()) for the shape that p asks for or that fits it; a shape that cannot take the rows is refused.
template <class T, bool kManyThreads, class Visit> static inline int with_shape(const GpuRowsArgs& p, const Visit& visit) {
  constexpr int kPack = 16 / T::kBytes;
  const auto wanted = static_cast<GpuRowsShape>(p.shape);
  const GpuRowsShape shape = wanted == GpuRowsShape::kChosen ? chosen_shape(p) : wanted;
  if (shape > GpuRowsShape::kAnyBlock && !rows_are_aligned(p))
    return refuse_rows(kNotSupported, "rows: this shape wants rows that start and end on 16-byte boundaries");
  switch (shape) {
    case GpuRowsShape::kAnyWarp:
      if (p.n <= 1024) return visit(ShapeIs<RowShape<T, 32, 1, kPack, 32 / kPack, false>>());
      break;
    case GpuRowsShape::kAnyBlock: return visit(ShapeIs<RowShape<T, 32, 16, 2, 0, false>>());
    case GpuRowsShape::kPartOfWarp:
      if (p.n <= 128) return visit(ShapeIs<RowShape<T, 32, 1, 4, 1, true>>());
      break;
    case GpuRowsShape::kFewThreads:
      if (p.n <= 128) return visit(ShapeIs<RowShape<T, 64 / kPack, 1, kPack, 2, true>>());
      break;
    case GpuRowsShape::kWarp:
      if (p.n <= 1024) return visit(ShapeIs<RowShape<T, 32, 1, kPack, 32 / kPack, true>>());
      break;
    case GpuRowsShape::kBlock1024:
      if (p.n <= 1024) return visit(ShapeIs<RowShape<T, 32, 4, kPack, 8 / kPack, true>>());
      break;
    case GpuRowsShape::kBlock2048:
      if (p.n <= 2048) return visit(ShapeIs<RowShape<T, 32, 4, kPack, 16 / kPack, true>>());
      break;
    case GpuRowsShape::kBlock4096:
      if (p.n <= 4096) return visit(ShapeIs<RowShape<T, 32, 4, kPack, 32 / kPack, true>>());
      break;
    case GpuRowsShape::kBlock8192:
      if (p.n <= 8192) return visit(ShapeIs<RowShape<T, 32, 4, kPack, 64 / kPack, true>>());
      break;
    case GpuRowsShape::kManyThreads:
      if constexpr (kManyThreads)
        if (p.n <= 8192) return visit(ShapeIs<RowShape<T, 32, 16, 2, 8, true>>());
      break;
    case GpuRowsShape::kBlock16384:
      if (p.n <= 16384) return visit(ShapeIs<RowShape<T, 32, 8, 4, 16, true>>());
      break;
    case GpuRowsShape::kStream: return visit(ShapeIs<RowShape<T, 32, 4, kPack, 0, true>>());
    case GpuRowsShape::kStreamWide: return visit(ShapeIs<RowShape<T, 32, 16, 2, 0, true>>());
    default: break;
  }
  return refuse_rows(kNotSupported, "rows: this shape cannot take rows of this length");
}

// Blocks for all rows, or -1 where they are too many for one launch.
template <class Shape> static inline int blocks_for(int64_t rows) {
  const int64_t blocks = (rows + Shape::kRows - 1) / Shape::kRows;
  return blocks > 0x7fffffff ? -1 : static_cast<int>(blocks);
}
static constexpr const char* kTooManyRows = "rows: more than 2,147,483,647 blocks of rows in one call";

template <template <class> class Run> static inline int by_dtype(const GpuRowsArgs& p, Stream stream) {
  if (p.dtype == kFloat32) return Run<Float32>::on(p, stream);
  if (p.dtype == kBFloat16) return Run<BFloat16>::on(p, stream);
  return Run<Float16>::on(p, stream);
}

}  // namespace gpu
}  // namespace detinfer

// The collectives as data movement between meetings; every sum is kernels().all_reduce's, whose order no schedule here
// can change. Tensors larger than the staging area go in pieces.
#include <cstring>

#include "communicator.h"
#include "kernels.h"

namespace detinfer {
namespace {

const uint8_t* bytes_of(const void* p) { return static_cast<const uint8_t*>(p); }
uint8_t* bytes_of(void* p) { return static_cast<uint8_t*>(p); }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void copy(void* to, const void* from, int64_t bytes) {
  if (bytes > 0 && to != from) std::memcpy(to, from, static_cast<size_t>(bytes));
}

// Elements [begin, end) of a piece that rank `rank` of `size` reduces in the 2-stage path: whole cache lines, and the
// last ones may get none.
struct Slice {
  int64_t begin, end;
};
Slice slice_of(int64_t count, int64_t item, int rank, int size) {
  const int64_t line = 64 / item;
  const int64_t part = ((count + size - 1) / size + line - 1) / line * line;
  return {least(rank * part, count), least((rank + 1) * part, count)};
}

// Elements of one piece: a multiple of a cache line's.
int64_t piece_of(int64_t bytes, int64_t item) { return bytes / 64 * 64 / item; }

AllReduceArgs reduction(const Communicator& c, const CollectiveCall& call, int64_t count, void* out) {
  AllReduceArgs args = {};
  args.dtype = call.dtype;
  args.op = call.op;
  args.order = call.order;
  args.ranks = size_of(c);
  args.count = count;
  args.out = out;
  return args;
}

// Every rank reads all and adds them itself.
int one_stage(Communicator& c, const CollectiveCall& call, const void* in, void* out) {
  const int64_t item = call.item, piece = piece_of(staging_of(c), item);
  const int rank = rank_of(c), size = size_of(c);
  for (int64_t begin = 0; begin == 0 || begin < call.count; begin += piece) {
    const int64_t count = least(piece, call.count - begin);
    copy(next_bank(c).staged, bytes_of(in) + begin * item, count * item);
    if (const int status = meet(c)) return status;
    AllReduceArgs args = reduction(c, call, count, bytes_of(out) + begin * item);
    for (int r = 0; r < size; r++) args.parts[r] = last_bank(c, r).staged;
    args.parts[rank] = bytes_of(in) + begin * item;
    if (const int status = kernels().all_reduce(args)) return status;
  }
  return kOk;
}

// Each rank adds its slice of a piece, then all gather the slices. One meeting does for two pieces: what comes out of
// one piece is shared together with what goes into the next.
int two_stage(Communicator& c, const CollectiveCall& call, const void* in, void* out) {
  const int64_t item = call.item, piece = piece_of(staging_of(c), item);
  const int rank = rank_of(c), size = size_of(c);
  int64_t before = 0;  // elements of the piece before this one
  for (int64_t begin = 0;; begin += piece) {
    const int64_t count = begin < call.count ? least(piece, call.count - begin) : 0;
    const Bank mine = next_bank(c);
    if (before > 0) {
      const Slice own = slice_of(before, item, rank, size);
      const int64_t from = (begin - piece + own.begin) * item;
      AllReduceArgs args = reduction(c, call, own.end - own.begin, mine.results);
      for (int r = 0; r < size; r++) args.parts[r] = last_bank(c, r).staged + own.begin * item;
      args.parts[rank] = bytes_of(in) + from;
      if (const int status = kernels().all_reduce(args)) return status;
      copy(bytes_of(out) + from, mine.results, args.count * item);
    }
    if (count > 0) {
      const Slice own = slice_of(count, item, rank, size);  // which nobody else reads
      copy(mine.staged, bytes_of(in) + begin * item, own.begin * item);
      copy(mine.staged + own.end * item, bytes_of(in) + (begin + own.end) * item, (count - own.end) * item);
    }
    if (const int status = meet(c)) return status;
    for (int r = 0; r < size && before > 0; r++) {
      const Slice theirs = slice_of(before, item, r, size);
      if (r != rank)
        copy(bytes_of(out) + (begin - piece + theirs.begin) * item, last_bank(c, r).results,
             (theirs.end - theirs.begin) * item);
    }
    if (count == 0) return kOk;
    before = count;
  }
}

// At one rank every collective is a copy of bytes.
int all_reduce(Communicator& c, const CollectiveArgs& args) {
  if (size_of(c) == 1) {
    copy(args.out, args.in, args.call.count * args.call.item);
    return kOk;
  }
  const bool one = args.call.path == static_cast<int32_t>(ReducePath::k1Stage);
  return one ? one_stage(c, args.call, args.in, args.out) : two_stage(c, args.call, args.in, args.out);
}

// A piece is the same range of every rank's slice; each rank stages all ranks' ranges side by side.
int reduce_scatter(Communicator& c, const CollectiveArgs& args) {
  const CollectiveCall& call = args.call;
  const int rank = rank_of(c), size = size_of(c);
  const int64_t item = call.item, width = call.count / size, room = piece_of(staging_of(c) / size, item);
  for (int64_t begin = 0; begin == 0 || begin < width; begin += room) {
    const int64_t count = least(room, width - begin);
    uint8_t* staged = next_bank(c).staged;
    for (int r = 0; r < size; r++)
      if (r != rank) copy(staged + r * room * item, bytes_of(args.in) + (r * width + begin) * item, count * item);
    if (const int status = meet(c)) return status;
    AllReduceArgs sum = reduction(c, call, count, bytes_of(args.out) + begin * item);
    for (int r = 0; r < size; r++) sum.parts[r] = last_bank(c, r).staged + rank * room * item;
    sum.parts[rank] = bytes_of(args.in) + (rank * width + begin) * item;
    if (const int status = kernels().all_reduce(sum)) return status;
  }
  return kOk;
}

int all_gather(Communicator& c, const CollectiveArgs& args) {
  const int rank = rank_of(c), size = size_of(c);
  const int64_t all = args.call.count * args.call.item, piece = staging_of(c);
  for (int64_t begin = 0; begin == 0 || begin < all; begin += piece) {
    const int64_t count = least(piece, all - begin);
    copy(next_bank(c).staged, bytes_of(args.in) + begin, count);
    if (const int status = meet(c)) return status;
    for (int r = 0; r < size; r++) {
      const uint8_t* from = r == rank ? bytes_of(args.in) + begin : last_bank(c, r).staged;
      copy(bytes_of(args.out) + r * all + begin, from, count);
    }
  }
  return kOk;
}

// all_reduce, then add + RMSNorm on the rows of the result: each rank norms all rows, in place.
int all_reduce_rms_norm(Communicator& c, const CollectiveArgs& args) {
  if (const int status = all_reduce(c, args)) return status;
  RowsArgs rows = {};
  rows.op = kRmsNorm;
  rows.dtype = rows.out_dtype = args.call.dtype;
  rows.weight_dtype = args.call.weight_dtype < 0 ? kFloat32 : args.call.weight_dtype;
  rows.weight_mode = args.call.weight_mode;
  rows.residual_mode = args.call.mode;
  rows.n = args.call.n;
  rows.rows = args.call.n == 0 ? 0 : args.call.count / args.call.n;
  rows.inner = 1;
  rows.x = rows.out = args.out;
  rows.residual = args.residual;
  rows.weight = args.weight;
  rows.residual_out = args.residual_out;
  rows.eps = args.call.eps;
  return kernels().rows(rows);
}

}  // namespace

int collective(Communicator& c, const CollectiveArgs& args) {
  if (args.call.count < 0 || args.call.item <= 0 || args.call.item > 64)
    return fail(kBadArgument, "collective: bad number or size of elements");
  if (const int status = begin(c, args.call)) return status;
  switch (static_cast<Collective>(args.call.collective)) {
    case Collective::kBarrier: return size_of(c) == 1 ? static_cast<int>(kOk) : meet(c);
    case Collective::kAllReduce: return all_reduce(c, args);
    case Collective::kReduceScatter: return size_of(c) == 1 ? all_reduce(c, args) : reduce_scatter(c, args);
    case Collective::kAllGather: return size_of(c) == 1 ? all_reduce(c, args) : all_gather(c, args);
    case Collective::kAllReduceRmsNorm: return all_reduce_rms_norm(c, args);
  }
  return fail(kBadArgument, "collective: no such collective");
}

}  // namespace detinfer

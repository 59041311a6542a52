// all_reduce and reduce_scatter between GPUs, by every path. Which path, how many blocks and how large the tiles are
// decides the speed and nothing else: each element is the same function of the ranks' elements.
#include "gpu/comm.h"

namespace detinfer {
namespace gpu {

// A block for every 512 units, each with a channel of its own.
PushShape push_shape(const Comm& comm, int64_t bytes, int unit) {
  const GpuConfig& config = comm.config;
  const int64_t units = divided_up(bytes, unit);
  const int64_t blocks = clamped(divided_up(units, config.push_threads), 1, config.push_channels);
  const int64_t per_channel = divided_up(units, blocks);
  const int64_t threads = clamped(divided_up(per_channel, 32) * 32, 32, config.push_threads);
  return {static_cast<int>(divided_up(units, per_channel)), static_cast<int>(threads), static_cast<int>(per_channel),
          per_channel * unit <= config.push_bytes};
}

namespace {

int element_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

template <class T, int N> int run_push(const Comm& comm, const GpuCall& call, int64_t bytes, bool scatter, Stream stream) {
  constexpr int kUnit = 4 * kPushWords;
  const PushShape shape = push_shape(comm, bytes, kUnit);
  if (!shape.fits)
    return refuse(kBadArgument, "push holds %lld bytes a rank, not %lld",
                static_cast<long long>(comm.config.push_bytes) * comm.config.push_channels, static_cast<long long>(bytes));
  PushArgs args = {};
  args.in = static_cast<const char*>(call.in);
  args.out = static_cast<char*>(call.out);
  args.bytes = bytes;
  args.in_stride = scatter ? bytes : 0;
  args.per_channel = shape.per_channel;
  args.in_aligned = aligned_to(call.in, kUnit) && (!scatter || bytes % kUnit == 0);
  args.out_aligned = aligned_to(call.out, kUnit);
  args.how = {call.op, call.order};
  const Link link = link_of(comm, &comm.state->push[0].epoch, call);
  const bool plain = DETINFER_MUTANT != 6 && !scatter && args.how.op == static_cast<int32_t>(ReduceOp::kSum) &&
                     args.how.order == static_cast<int32_t>(RankOrder::kLinear) && args.in_aligned && args.out_aligned &&
                     bytes % kUnit == 0 && shape.per_channel <= shape.threads;
  return checked(launch(plain ? push_sum<T, N> : push_reduce<T, N>, shape.blocks, shape.threads + kHelpers, 0, stream,
                        comm.config.overlap != 0, link, comm.regions.blanks, args),
                 "launching push");
}

template <class T, int N> int run_tiles(const Comm& comm, const GpuCall& call, int64_t bytes, Stream stream) {
  const GpuConfig& config = comm.config;
  TileArgs args = {};
  args.in = static_cast<const char*>(call.in);
  args.out = static_cast<char*>(call.out);
  args.bytes = bytes;
  const TileShape shape = tile_shape(comm, call, comm.regions.tiles);
  args.tile_bytes = clamped(divided_up(divided_up(bytes, shape.channels), 512) * 512, config.least_tile_bytes, shape.most);
  args.in_aligned = aligned_to(call.in, 16);
  args.out_aligned = aligned_to(call.out, 16);
  args.how = {call.op, call.order};
  const int64_t blocks = clamped(divided_up(bytes, args.tile_bytes), 1, shape.channels);
  const int64_t threads = clamped(divided_up(args.tile_bytes / kPackBytes, 32) * 32, 32, config.tile_threads);
  const Link link = link_of(comm, comm.state->tiles, call);
  const auto kernel = call.path == static_cast<int32_t>(GpuPath::kPull) ? one_shot_reduce<T, N, true> : one_shot_reduce<T, N, false>;
  return checked(launch(kernel, static_cast<int>(blocks), static_cast<int>(threads) + Desk::kHelpers, 0, stream,
                        config.overlap != 0, link, comm.regions.tiles, args),
                 "launching tiles");
}

template <class T, int N, bool kScatter>
int run_parts(const Comm& comm, const GpuCall& call, int64_t bytes, Stream stream) {
  const GpuConfig& config = comm.config;
  PartArgs args = {};
  args.in = static_cast<const char*>(call.in);
  args.out = static_cast<char*>(call.out);
  args.bytes = bytes;
  const int64_t tile = kScatter ? 1 : N;  // parts of the message in a tile
  const TileShape shape = tile_shape(comm, call, comm.regions.parts);
  args.part_bytes = clamped(divided_up(divided_up(bytes, tile * shape.channels), 512) * 512,
                            config.least_tile_bytes / N / 16 * 16, shape.most);
  args.gather_counters = comm.state->sums;
  args.in_aligned = aligned_to(call.in, 16) && (!kScatter || bytes % 16 == 0);
  args.out_aligned = aligned_to(call.out, 16);
  args.how = {call.op, call.order};
  const int64_t blocks = clamped(divided_up(bytes, tile * args.part_bytes), 1, shape.channels);
  const int64_t threads = clamped(divided_up(args.part_bytes / kPackBytes, 32) * 32, 32, config.tile_threads);
  const Link link = link_of(comm, comm.state->parts, call);
  return checked(launch(two_shot_reduce<T, N, kScatter>, static_cast<int>(blocks), static_cast<int>(threads) + Desk::kHelpers, 0, stream,
                        config.overlap != 0, link, comm.regions.parts, comm.regions.sums, args),
                 "launching two_shot");
}

int load_all(const Comm& comm) {
  for (int dtype : {kFloat32, kBFloat16, kFloat16}) {
    const int status = with_dtype(dtype, [&](auto type) {
      return with_ranks(comm.config.ranks, [&](auto ranks) {
        using T = decltype(type);
        constexpr int N = decltype(ranks)::value;
        const GpuConfig& config = comm.config;
        const int tile_threads = config.tile_threads + Desk::kHelpers;
        for (auto kernel : {push_reduce<T, N>, push_sum<T, N>})
          if (const int status = ready(kernel, config.push_channels, config.push_threads + kHelpers, 0, "push")) return status;
        for (auto kernel : {one_shot_reduce<T, N, false>, one_shot_reduce<T, N, true>})
          if (const int status = ready(kernel, config.tile_channels, tile_threads, 0, "push_tiles and pull")) return status;
        for (auto kernel : {two_shot_reduce<T, N, false>, two_shot_reduce<T, N, true>})
          if (const int status = ready(kernel, config.tile_channels, tile_threads, 0, "two_shot")) return status;
        return static_cast<int>(kOk);
      });
    });
    if (status != kOk) return status;
  }
  return kOk;
}

}  // namespace

int all_reduce(const Comm& comm, const GpuCall* call, Stream stream) {
  if (call == nullptr) return load_all(comm);
  return with_dtype(call->dtype, [&](auto type) {
    return with_ranks(comm.config.ranks, [&](auto ranks) {
      using T = decltype(type);
      constexpr int N = decltype(ranks)::value;
      const int64_t bytes = call->count * element_bytes(call->dtype);
      switch (static_cast<GpuPath>(call->path)) {
        case GpuPath::kPush: return run_push<T, N>(comm, *call, bytes, false, stream);
        case GpuPath::kPushTiles:
        case GpuPath::kPull: return run_tiles<T, N>(comm, *call, bytes, stream);
        case GpuPath::kTwoShot: return run_parts<T, N, false>(comm, *call, bytes, stream);
      }
      return refuse(kBadArgument, "all_reduce has no path %d", call->path);
    });
  });
}

int reduce_scatter(const Comm& comm, const GpuCall* call, Stream stream) {
  if (call == nullptr) return kOk;  // all_reduce's kernels
  return with_dtype(call->dtype, [&](auto type) {
    return with_ranks(comm.config.ranks, [&](auto ranks) {
      using T = decltype(type);
      constexpr int N = decltype(ranks)::value;
      const int64_t bytes = call->count * element_bytes(call->dtype);
      switch (static_cast<GpuPath>(call->path)) {
        case GpuPath::kPush: return run_push<T, N>(comm, *call, bytes, true, stream);
        case GpuPath::kTwoShot: return run_parts<T, N, true>(comm, *call, bytes, stream);
        default: return refuse(kBadArgument, "reduce_scatter has no path %d", call->path);
      }
    });
  });
}

}  // namespace gpu
}  // namespace detinfer

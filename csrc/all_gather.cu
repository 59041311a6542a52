// all_gather between GPUs: a copy of bytes, by packets or by tiles.
#include "gpu/comm.h"

namespace detinfer {
namespace gpu {

int all_gather(const Comm& comm, const GpuCall* call, Stream stream) {
  return with_ranks(comm.config.ranks, [&](auto ranks) {
    constexpr int N = decltype(ranks)::value;
    if (call == nullptr) {
      if (const int status = ready(push_gather<N>, comm.config.push_channels, comm.config.push_threads, 0, "push")) return status;
      return ready(tile_gather<N>, comm.config.tile_channels, comm.config.tile_threads + Desk::kHelpers, 0, "push_tiles");
    }
    const GpuConfig& config = comm.config;
    const auto fits = [&](int64_t pack) {
      return aligned_to(call->out, pack) && call->inner % pack == 0;
    };
    if (call->path == static_cast<int32_t>(GpuPath::kPush)) {
      const PushShape shape = push_shape(comm, call->count, kPacketBytes);
      if (!shape.fits) return refuse(kBadArgument, "push does not hold %lld bytes", static_cast<long long>(call->count));
      PushArgs args = {};
      args.in = static_cast<const char*>(call->in);
      args.out = static_cast<char*>(call->out);
      args.bytes = call->count;
      args.inner = call->inner;
      args.per_channel = shape.per_channel;
      args.in_aligned = aligned_to(call->in, 8);
      args.out_aligned = fits(8);
      return checked(launch(push_gather<N>, shape.blocks, shape.threads, 0, stream, config.overlap != 0,
                            link_of(comm, comm.state->gathers, *call), comm.regions.packets, args),
                     "launching push");
    }
    if (call->path != static_cast<int32_t>(GpuPath::kPushTiles)) return refuse(kBadArgument, "all_gather has no path %d", call->path);
    TileArgs args = {};
    args.in = static_cast<const char*>(call->in);
    args.out = static_cast<char*>(call->out);
    args.bytes = call->count;
    args.inner = call->inner;
    const TileShape shape = tile_shape(comm, *call, comm.regions.tiles);
    args.tile_bytes = clamped(divided_up(divided_up(call->count, shape.channels), 512) * 512, config.least_tile_bytes, shape.most);
    args.in_aligned = aligned_to(call->in, 16);
    args.out_aligned = fits(16);
    const int64_t blocks = clamped(divided_up(call->count, args.tile_bytes), 1, shape.channels);
    const int64_t threads = clamped(divided_up(args.tile_bytes / kPackBytes, 32) * 32, 32, config.tile_threads);
    return checked(launch(tile_gather<N>, static_cast<int>(blocks), static_cast<int>(threads) + Desk::kHelpers, 0, stream,
                          config.overlap != 0, link_of(comm, comm.state->tiles, *call), comm.regions.tiles, args),
                   "launching tiles");
  });
}

}  // namespace gpu
}  // namespace detinfer

// all_reduce, then the residual's addition and RMSNorm: one kernel for few rows, two for many; the same bits.
#include "gpu/comm.h"

namespace detinfer {
namespace gpu {
namespace {

// How many packs of a thread are waited for at a time: as many as the registers hold.
template <int N, int K> constexpr int kAtATime = N == 2 || K == 1 ? K : N <= 4 ? 2 : 1;

// A group of blocks takes a row, and then the row as many further as there are groups.
template <class T, int N, int K>
__global__ void __launch_bounds__(kRowBound, 1)
    push_rms_norm(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Blanks blanks, const char* in,
                  DETINFER_PARAMETER NormArgs args) {
  constexpr int U = kAtATime<N, K>;
  using Channel = BlankChannel<N, 2>;
  extern __shared__ __align__(16) char room[];
  __shared__ RowMeeting meeting;
  SharedRow<T, 2, K> norm(args, room, meeting, Channel::workers() / 32);
  const int64_t groups = gridDim.x / args.blocks;
  const int length = Channel::workers() * K;  // room for a row's packs of this block
  const int place = static_cast<int>(threadIdx.x / 32 * (32 * K) + threadIdx.x % 32);
  const auto load = [&](int64_t row, Pack<2>(&data)[K]) {
#pragma unroll
    for (int u = 0; u < K; u++)
      if (norm.has(u)) data[u] = *reinterpret_cast<const Pack<2>*>(in + norm.place(row, u));
  };
  const int64_t first = blockIdx.x / args.blocks;
  int64_t row = first;
  int slot = place;
  Channel channel(link, blanks);
  wait_for_previous_kernel();
  Pack<2> mine[K];
  if (!channel.helps()) load(row, mine);
  channel.open();
  if (channel.helps()) {
    channel.tidy();
    norm.meet();
  } else {
    for (int64_t other = row;;) {
#pragma unroll
      for (int u = 0; u < K; u++) {
        if (!norm.has(u)) continue;
#pragma unroll
        for (int step = 1; step < N; step++) channel.send(after<N>(link.rank, step), slot + u * 32, mine[u]);
      }
      other += groups, slot += length;
      if (other >= args.rows) break;
      load(other, mine);
    }
    channel.tidy();
    norm.load_residual(row);
    norm.load_weight();
    if (row + groups < args.rows) load(row, mine);
    norm.meet();
    slot = place;
    for (uint32_t turn = 0; row < args.rows; row += groups, slot += length, turn++) {
      if (turn != 0) {
        norm.load_residual(row);
        load(row, mine);
      }
      bool good = true;
#pragma unroll
      for (int k = 0; k < K; k += U) {
        Pack<2> own[U], got[U][N];
#pragma unroll
        for (int u = 0; u < U; u++) own[u] = mine[k + u];
        good = channel.template receive<U>(slot + k * 32, norm.count() - k, own, got) && good;
#pragma unroll
        for (int u = 0; u < U; u++)
          if (norm.has(k + u))
            norm.add(row, k + u, good ? sum_pack<T, N, 2>([&](int r) { return got[u][r]; }) : poison<2>());
      }
      const float r = norm.inverse_root_of_row(turn);
      norm.put(row, r, good);
    }
  }
  channel.close((args.rows - first + groups - 1) / groups * length);
}

// A row is a tile.
template <class T, int N>
__global__ void __launch_bounds__(kOwnThreads<T> + Desk::kHelpers, 2)
    tile_rms_norm(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Ring ring, const char* in,
                  DETINFER_PARAMETER NormArgs args) {
  constexpr int U = N == 2 ? 4 : N <= 4 ? 2 : 1;
  extern __shared__ __align__(16) char room[];
  __shared__ alignas(16) float lanes[2][kLeftLanes];
  __shared__ Desk desk;
  desk.clear();
  OwnRow<T, false> norm(args, room, lanes, &desk);
  wait_for_previous_kernel();
  const TileChannel<N> channel(link, ring);
  const uint32_t first = link.counters[blockIdx.x] + 1;
  const int64_t mine = tiles_of(args.rows, blockIdx.x, gridDim.x);
  const int64_t length = static_cast<int64_t>(args.hidden) * T::kBytes;
  struct Ranks {
    Pack<4> of[N];
  };
  exchange_tiles<N>(
      channel, desk, first, mine,
      [&](int64_t k, uint32_t sequence) {
        send_tile<T, N, false>(channel, in + (blockIdx.x + k * gridDim.x) * length, length, true, link.rank, sequence);
      },
      [&](int64_t k, uint32_t sequence, bool good) {
        const int64_t row = blockIdx.x + k * gridDim.x;
        const float squares = norm.template take<U>(
            row, static_cast<uint32_t>(k),
            [&](int at) {
              Ranks ranks;
#pragma unroll
              for (int r = 0; r < N; r++)
                ranks.of[r] = *reinterpret_cast<const Pack<4>*>(
                    (r == link.rank ? in + row * length : channel.slot(link.rank, sequence, r)) + at);
              return ranks;
            },
            [&](const Ranks& ranks) {
              return good ? sum_pack<T, N, 4>([&](int r) { return ranks.of[r]; }) : poison<4>();
            });
        norm.put(row, squares, good);
      });
}

// The same of rows that are reduced already.
template <class T, bool kWide>
__global__ void __launch_bounds__(kOwnThreads<T>, 768 / kOwnThreads<T>)
    rms_norm(const char* in, DETINFER_PARAMETER NormArgs args) {
  extern __shared__ __align__(16) char room[];
  __shared__ alignas(16) float lanes[2][kLeftLanes];
  OwnRow<T, kWide> norm(args, room, lanes, nullptr);
  wait_for_previous_kernel();
  uint32_t turn = 0;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x, turn++) {
    const char* from = in + row * args.hidden * T::kBytes;
    const float squares = norm.template take<4>(
        row, turn, [&](int at) { return *reinterpret_cast<const Pack<4>*>(from + at); },
        [](const Pack<4>& pack) { return pack; });
    norm.put(row, squares, true);
  }
}

NormArgs norm_args(const GpuCall& call) {
  NormArgs args = {};
  args.residual = static_cast<const char*>(call.residual);
  args.weight = static_cast<const char*>(call.weight);
  args.residual_out = static_cast<char*>(call.residual_out);
  args.out = static_cast<char*>(call.out);
  args.rows = call.count / call.inner;
  args.hidden = static_cast<int32_t>(call.inner);
  args.width = static_cast<int32_t>(call.width > 0 ? call.width : call.inner);
  args.weight_mode = call.weight_mode;
  args.residual_mode = call.residual_mode;
  args.weight_fp32 = call.weight_dtype == kFloat32;
  args.blocks = 1;
  args.eps = static_cast<float>(call.eps);
  return args;
}

// body(integral constant K), K the packs of a thread.
template <int K> struct Packs {
  static constexpr int value = K;
};
template <class Body> int with_packs(int packs, const Body& body) {
  return packs == 1 ? body(Packs<1>{}) : packs == 2 ? body(Packs<2>{}) : body(Packs<4>{});
}

// Blocks of `threads` that push rows in groups, at most: what fits at once. Groups need room that lies together.
int row_channels(const Comm& comm, int group, int threads) {
  const int fit = threads <= kSmallRowThreads ? 256 : group > 1 ? 96 : 128;
  return comm.config.push_channels < fit ? comm.config.push_channels : fit;
}

template <class T, int N, int K> int load(const Comm& comm) {
  const auto kernel = push_rms_norm<T, N, K>;
  const int shared = kMostFused * static_cast<int>(sizeof(float));
  for (int group = comm.row_blocks; group > 1; group /= 2)
    for (int threads : {kSmallRowThreads, kRowThreads})
      if (const int status =
              ready_groups(kernel, group, row_channels(comm, group, threads), threads + kHelpers, shared / group, "push of rows"))
        return status;
  return ready(kernel, row_channels(comm, 1, kRowThreads), kRowThreads + kHelpers, shared, "push of rows");
}

int load_all(const Comm& comm) {
  for (int dtype : {kFloat32, kBFloat16, kFloat16}) {
    const int status = with_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      for (auto kernel : {rms_norm<T, false>, rms_norm<T, true>})
        if (const int status = checked(load_kernel(kernel, own_row_bytes(kMostHidden)), "loading rms_norm")) return status;
      return with_ranks(comm.config.ranks, [&](auto ranks) {
        constexpr int N = decltype(ranks)::value;
        for (int packs : {1, 2, 4}) {
          const int status = with_packs(packs, [&](auto k) { return load<T, N, decltype(k)::value>(comm); });
          if (status != kOk) return status;
        }
        return ready(tile_rms_norm<T, N>, comm.config.tile_channels, kOwnThreads<T> + Desk::kHelpers, own_row_bytes(kMostFused),
                     "push_tiles of rows");
      });
    });
    if (status != kOk) return status;
  }
  return kOk;
}

// As many blocks for a row as there is room for, of 512 bytes at least.
template <class T> RowShape push_rows_shape(const Comm& comm, const NormArgs& args) {
  for (int blocks = comm.row_blocks; blocks > 1; blocks /= 2)
    for (int threads : {kRowThreads, kSmallRowThreads}) {
      const RowShape shape = row_shape(args.hidden, 2 * T::kPerWord, blocks, threads);
      const bool room = shape.fits && args.rows * blocks <= row_channels(comm, blocks, shape.threads);
      if (room && shape.packs <= 2 && args.hidden * T::kBytes >= blocks * 512) return shape;
    }
  return row_shape(args.hidden, 2 * T::kPerWord, 1, kRowThreads);
}

// Groups of blocks for the rows; 0: push does not hold them.
int64_t groups_for(const Comm& comm, const NormArgs& args, const RowShape& shape) {
  const int64_t groups = clamped(args.rows, 1, row_channels(comm, shape.blocks, shape.threads) / shape.blocks);
  const int64_t packs = divided_up(args.rows, groups) * shape.threads * shape.packs;  // of a block, whole warps of them
  return shape.fits && packs * 8 <= comm.regions.blanks.capacity ? groups : 0;
}

template <class T, int N> int run_push(const Comm& comm, const GpuCall& call, NormArgs args, Stream stream) {
  const RowShape shape = push_rows_shape<T>(comm, args);
  args.blocks = shape.blocks;
  const int64_t groups = groups_for(comm, args, shape);
  if (groups == 0)
    return refuse(kBadArgument, "push does not hold %lld rows of %d elements", static_cast<long long>(args.rows), args.hidden);
  return with_packs(shape.packs, [&](auto k) {
    constexpr int K = decltype(k)::value;
    return checked(launch_groups(push_rms_norm<T, N, K>, shape.blocks, static_cast<int>(groups * shape.blocks), shape.threads + kHelpers,
                                 shape.shared_bytes, stream, comm.config.overlap != 0, link_of(comm, &comm.state->push[0].epoch, call),
                                 comm.regions.blanks, static_cast<const char*>(call.in), args),
                   "launching push");
  });
}

template <class T, int N> int run_tiles(const Comm& comm, const GpuCall& call, const NormArgs& args, Stream stream) {
  const int64_t blocks = clamped(args.rows, 1, comm.config.tile_channels);
  return checked(launch(tile_rms_norm<T, N>, static_cast<int>(blocks), kOwnThreads<T> + Desk::kHelpers,
                        own_row_bytes(args.hidden), stream, comm.config.overlap != 0, link_of(comm, comm.state->tiles, call), comm.regions.tiles,
                        static_cast<const char*>(call.in), args),
                 "launching push_tiles");
}

// Rows that `out` holds, reduced; each is read whole before it is written.
template <class T> int run_norm(const GpuCall& call, const NormArgs& args, Stream stream) {
  const auto kernel = args.weight_fp32 && T::kPerWord != 1 ? rms_norm<T, true> : rms_norm<T, false>;
  const int64_t blocks = clamped(args.rows, 1, 1 << 20);  // these wait for nobody
  // Not set up early: its blocks would take the room of kernels that others wait for.
  return checked(launch(kernel, static_cast<int>(blocks), kOwnThreads<T>, own_row_bytes(args.hidden), stream, false,
                        static_cast<const char*>(call.out), args),
                 "launching rms_norm");
}

}  // namespace

bool push_holds_rows(const Comm& comm, const GpuCall& call) {
  const NormArgs args = norm_args(call);
  return with_dtype(call.dtype, [&](auto type) {
           return static_cast<int>(groups_for(comm, args, push_rows_shape<decltype(type)>(comm, args)));
         }) > 0;
}

int all_reduce_rms_norm(const Comm& comm, const GpuCall* call, Stream stream) {
  if (call == nullptr) return load_all(comm);
  const GpuConfig& config = comm.config;
  if (call->inner < 8 || call->inner % 8 != 0 || call->inner > kMostHidden)
    return refuse(kNotSupported, "all_reduce_rms_norm: rows of %lld elements; a multiple of 8 up to %d is supported",
                  static_cast<long long>(call->inner), kMostHidden);
  for (const void* at : {call->in, const_cast<const void*>(call->out), call->residual, const_cast<const void*>(call->residual_out), call->weight})
    if (!aligned_to(at, 16)) return refuse(kBadArgument, "all_reduce_rms_norm: a tensor is not aligned to 16 bytes");
  const NormArgs args = norm_args(*call);
  const bool plain = call->order == static_cast<int32_t>(RankOrder::kLinear) &&
                     (call->weight == nullptr || call->weight_dtype == call->dtype) && call->inner <= kMostFused;
  return with_dtype(call->dtype, [&](auto type) {
    using T = decltype(type);
    const bool push = call->path == static_cast<int32_t>(GpuPath::kPush);
    const bool tiles = call->path == static_cast<int32_t>(GpuPath::kPushTiles) &&
                       call->inner * T::kBytes <= static_cast<int64_t>(comm.regions.tiles.slot_bytes);
    if (plain && (push || tiles))
      return with_ranks(config.ranks, [&](auto ranks) {
        constexpr int N = decltype(ranks)::value;
        return push ? run_push<T, N>(comm, *call, args, stream) : run_tiles<T, N>(comm, *call, args, stream);
      });
    // The sum lands in `out`; the norm is done there.
    if (const int failed = all_reduce(comm, call, stream)) return failed;
    return run_norm<T>(*call, args, stream);
  });
}

}  // namespace gpu
}  // namespace detinfer

// all_reduce, then the residual's addition and RMSNorm: one kernel for few rows, two for many; the same bits.
#include "gpu/comm.h"

namespace detinfer {
namespace gpu {
namespace {

// How many packets of a thread are waited for at a time: as many as the registers hold.
template <class T, int N> constexpr int kAtATime = (N == 2 ? 4 : N <= 4 ? 2 : 1) * T::kPerWord;

// A block takes the rows blockIdx.x, blockIdx.x + gridDim.x, ...
template <class T, int N, int kMost>
__global__ void __launch_bounds__(kNormThreads<T>, 1)
    push_rms_norm(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Packets packets, const char* in,
                  DETINFER_PARAMETER NormArgs args) {
  using Norm = RowNorm<T, kMost, false>;
  constexpr int U = kAtATime<T, N> < Norm::kHold ? kAtATime<T, N> : Norm::kHold, kThreads = Norm::kThreads;
  __shared__ alignas(16) float lanes[kRowLanes];
  wait_for_previous_kernel();
  PacketChannel<N> channel(link, packets);
  const int64_t length = args.hidden / Norm::kElements;  // packets of a row
  int64_t slot = 0;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x, slot += length) {
    for (int64_t p = threadIdx.x; p < length; p += U * kThreads) {
      Pack<2> data[U];
#pragma unroll
      for (int u = 0; u < U; u++)
        if (p + u * kThreads < length) data[u] = load_packet(in + (row * length + p + u * kThreads) * 8);
#pragma unroll
      for (int u = 0; u < U; u++) {
        if (p + u * kThreads >= length) continue;
#pragma unroll
        for (int step = 1; step < N; step++) channel.send(after<N>(link.rank, step), slot + p + u * kThreads, data[u]);
      }
    }
  }
  Norm norm(args, lanes);
  slot = 0;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x, slot += length) {
    norm.load_residual(row);
    bool good = true;
#pragma unroll
    for (int k = 0; k < norm.kHold; k += U) {
      if (k * kThreads >= length) continue;  // the same for every thread
      Pack<2> mine[U] = {}, got[U][N];
#pragma unroll
      for (int u = 0; u < U; u++)
        if (norm.has(k + u)) mine[u] = load_packet(in + norm.place(row, k + u));
      good = channel.template receive<U>(slot + norm.packet(k), kThreads, slot + length, got) && good;
#pragma unroll
      for (int u = 0; u < U; u++)
        if (norm.has(k + u))
          norm.add(row, k + u,
                   good ? sum_pack<T, N, 2>([&](int r) { return r == link.rank ? mine[u] : got[u][r]; }) : poison<2>());
    }
    const float r = norm.inverse_root_of_row();
    norm.put(row, r, good);
  }
  channel.close();
}

// A row is a tile.
template <class T, int N, int kMost>
__global__ void __launch_bounds__(kNormThreads<T>, 1)
    tile_rms_norm(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Ring ring, const char* in,
                  DETINFER_PARAMETER NormArgs args) {
  using Norm = RowNorm<T, kMost, false>;
  constexpr int U = kAtATime<T, N> < Norm::kHold ? kAtATime<T, N> : Norm::kHold;
  __shared__ alignas(16) float lanes[kRowLanes];
  wait_for_previous_kernel();
  const TileChannel<N> channel(link, ring);
  Norm norm(args, lanes);
  const uint32_t first = link.counters[blockIdx.x] + 1;
  const int64_t mine = tiles_of(args.rows, blockIdx.x, gridDim.x);
  const int64_t length = static_cast<int64_t>(args.hidden) * T::kBytes;
  exchange_tiles<N>(
      channel, first, mine,
      [&](int64_t k, uint32_t sequence) {
        send_tile<T, N, false>(channel, in + (blockIdx.x + k * gridDim.x) * length, length, true, link.rank, sequence);
      },
      [&](int64_t k, uint32_t sequence, bool good) {
        const int64_t row = blockIdx.x + k * gridDim.x;
        norm.load_residual(row);
#pragma unroll
        for (int p = 0; p < norm.kHold; p += U) {
          Pack<2> got[U][N];
#pragma unroll
          for (int u = 0; u < U; u++) {
            if (!norm.has(p + u)) continue;
#pragma unroll
            for (int r = 0; r < N; r++) {
              if (r == link.rank) got[u][r] = load_packet(in + norm.place(row, p + u));
              else got[u][r] = *reinterpret_cast<const Pack<2>*>(channel.slot(link.rank, sequence, r) + norm.packet(p + u) * 8);
            }
          }
#pragma unroll
          for (int u = 0; u < U; u++)
            if (norm.has(p + u))
              norm.add(row, p + u, good ? sum_pack<T, N, 2>([&](int r) { return got[u][r]; }) : poison<2>());
        }
        const float r = norm.inverse_root_of_row();
        norm.put(row, r, good);
      });
  __syncthreads();
  if (threadIdx.x == 0) link.counters[blockIdx.x] = first + static_cast<uint32_t>(mine) - 1;
}

// The same of rows that are reduced already.
template <class T, int kMost>
__global__ void __launch_bounds__(kNormThreads<T>, 1) rms_norm(const char* in, DETINFER_PARAMETER NormArgs args) {
  __shared__ alignas(16) float lanes[kRowLanes];
  wait_for_previous_kernel();
  RowNorm<T, kMost, true> norm(args, lanes);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    norm.load_residual(row);
#pragma unroll
    for (int k = 0; k < norm.kHold; k++)
      if (norm.has(k)) norm.add(row, k, load_packet(in + norm.place(row, k)));
    const float r = norm.inverse_root_of_row();
    norm.put(row, r, true);
  }
}

// Rows take more registers than other tiles: at most a block for each of 128 processors.
int row_channels(const GpuConfig& config) { return config.tile_channels < 128 ? config.tile_channels : 128; }

NormArgs norm_args(const GpuCall& call) {
  NormArgs args = {};
  args.residual = static_cast<const char*>(call.residual);
  args.weight = static_cast<const char*>(call.weight);
  args.residual_out = static_cast<char*>(call.residual_out);
  args.out = static_cast<char*>(call.out);
  args.rows = call.count / call.inner;
  args.hidden = static_cast<int32_t>(call.inner);
  args.weight_mode = call.weight_mode;
  args.residual_mode = call.residual_mode;
  args.weight_fp32 = call.weight_dtype == kFloat32;
  args.eps = static_cast<float>(call.eps);
  return args;
}

template <class T, int N, int kMost> int load(const Comm& comm) {
  const GpuConfig& config = comm.config;
  const int threads = RowNorm<T, kMost, false>::kThreads;
  if (const int status = ready(push_rms_norm<T, N, kMost>, config.push_channels, threads, 0, "push of rows")) return status;
  return ready(tile_rms_norm<T, N, kMost>, row_channels(config), threads, 0, "push_tiles of rows");
}

int load_all(const Comm& comm) {
  for (int dtype : {kFloat32, kBFloat16, kFloat16}) {
    const int status = with_dtype(dtype, [&](auto type) {
      return with_ranks(comm.config.ranks, [&](auto ranks) {
        using T = decltype(type);
        constexpr int N = decltype(ranks)::value;
        if (const int status = load<T, N, kMostFused / 2>(comm)) return status;
        if (const int status = load<T, N, kMostFused>(comm)) return status;
        for (auto kernel : {rms_norm<T, kMostFused / 2>, rms_norm<T, kMostFused>, rms_norm<T, kMostHidden>})
          if (const int status = checked(load_kernel(kernel, 0), "loading rms_norm")) return status;
        return static_cast<int>(kOk);
      });
    });
    if (status != kOk) return status;
  }
  return kOk;
}

// The kernels that reduce and normalise; kMost bounds the elements of a row.
template <class T, int N, int kMost> int run_fused(const Comm& comm, const GpuCall& call, const NormArgs& args, Stream stream) {
  using Norm = RowNorm<T, kMost, false>;
  const GpuConfig& config = comm.config;
  const char* in = static_cast<const char*>(call.in);
  if (call.path == static_cast<int32_t>(GpuPath::kPush)) {
    const int64_t blocks = clamped(args.rows, 1, config.push_channels);
    if (divided_up(args.rows, blocks) * (args.hidden / Norm::kElements) > comm.regions.packets.capacity)
      return refuse(kBadArgument, "push does not hold %lld rows of %d elements", static_cast<long long>(args.rows), args.hidden);
    return checked(launch(push_rms_norm<T, N, kMost>, static_cast<int>(blocks), Norm::kThreads, 0, stream, config.overlap != 0,
                          link_of(comm, comm.state->push, call), comm.regions.packets, in, args),
                   "launching push");
  }
  const int64_t blocks = clamped(args.rows, 1, row_channels(config));
  return checked(launch(tile_rms_norm<T, N, kMost>, static_cast<int>(blocks), Norm::kThreads, 0, stream, config.overlap != 0,
                        link_of(comm, comm.state->tiles, call), comm.regions.tiles, in, args),
                 "launching push_tiles");
}

}  // namespace

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
        return args.hidden <= kMostFused / 2 ? run_fused<T, N, kMostFused / 2>(comm, *call, args, stream)
                                             : run_fused<T, N, kMostFused>(comm, *call, args, stream);
      });
    // The sum lands in `out`; the norm is done there, row by row, each read whole before it is written.
    if (const int failed = all_reduce(comm, call, stream)) return failed;
    const int64_t blocks = clamped(args.rows, 1, 1 << 20);  // these wait for nobody
    const auto kernel = args.hidden <= kMostFused / 2 ? rms_norm<T, kMostFused / 2>
                        : args.hidden <= kMostFused   ? rms_norm<T, kMostFused>
                                                      : rms_norm<T, kMostHidden>;
    // Not set up early: its blocks would take the room of kernels that others wait for.
    return checked(launch(kernel, static_cast<int>(blocks), RowNorm<T, kMostHidden, true>::kThreads, 0, stream, false,
                          static_cast<const char*>(call->out), args),
                   "launching rms_norm");
  });
}

}  // namespace gpu
}  // namespace detinfer

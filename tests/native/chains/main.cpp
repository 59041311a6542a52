// Every shape of block of SHAPES (a list of SHAPE(...)) against one chain of FMAs for each output: a line with the number of
// other bytes for each, and the number in which k descending would give others.
#include "matmul_chains.h"

using namespace detinfer::gpu;

template <int XT, int WT, int RX, int RW, int KB, int S, int U, int D, int kBlocks> void check(int64_t m, int64_t n, int64_t k) {
  using Shape = ChainShape<XT, WT, RX, RW, KB, S>;
  const int64_t x_m = k + 8, w_n = k + 4, boxes = k < 32 ? 1 : k / 32;
  uint64_t state = static_cast<uint64_t>(m * 7 + n * 3 + k);
  const auto draw = [&] {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return std::ldexp(static_cast<float>(static_cast<int>(state >> 33) % 127), static_cast<int>(state >> 50) % 9 - 4) *
           (state >> 62 & 1 ? 1.0f : -1.0f);
  };
  std::vector<float> x(m * x_m), w(n * w_n), out(m * n, 12345.0f);
  for (float& value : x) value = draw();
  for (float& value : w) value = draw();
  // A sum of -0: products too small for fp32. Any term that is not there would make it +0.
  for (int64_t i = 0; i < k; i++) x[i] = -1e-30f, w[i] = 1e-30f;
  const GpuMatmulArgs p{m, n, k, x_m, w_n, x.data(), w.data(), out.data()};
  const CUtensorMap x_map{x.data(), m, boxes, x_m, Shape::kRowsX, KB}, w_map{w.data(), n, boxes, w_n, WT, KB};
  for (unsigned block = 0; block < static_cast<unsigned>((m + XT - 1) / XT * ((n + WT - 1) / WT)); block++) {
    blockIdx.x = block;
    barriers.clear();
    std::memset(raw, 0xff, sizeof raw);
    whole_block = std::make_unique<std::barrier<>>(Shape::kThreads);
    warps.clear();
    for (int i = 0; i < Shape::kThreads / 32; i++) warps.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < static_cast<unsigned>(Shape::kThreads); i++)
      threads.emplace_back([&, i] {
        threadIdx.x = i;
        chains_fp32<XT, WT, RX, RW, KB, S, U, D, kBlocks>(x_map, w_map, p);
      });
    for (std::thread& thread : threads) thread.join();
  }
  int64_t other = 0, shows = 0;
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      float up = 0, down = 0;
      for (int64_t q = 0; q < k; q++) up = std::fma(x[i * x_m + q], w[j * w_n + q], up);
      for (int64_t q = k; q-- > 0;) down = std::fma(x[i * x_m + q], w[j * w_n + q], down);
      other += std::memcmp(&up, &out[i * n + j], 4) != 0;
      shows += std::memcmp(&up, &down, 4) != 0;
      if (i == 0 && j == 0 && !(up == 0 && std::signbit(up))) std::abort();
    }
  std::printf("%d %d %d %lld %lld %lld %lld %lld\n", XT, WT, late, static_cast<long long>(m), static_cast<long long>(n),
              static_cast<long long>(k), static_cast<long long>(other), static_cast<long long>(shows));
  std::fflush(stdout);
}

template <int XT, int WT, int RX, int RW, int KB, int S, int... kMore> void check_all() {
  for (const bool now : {false, true}) {
    late = now;
    check<XT, WT, RX, RW, KB, S, kMore...>(XT + 1, WT + 1, (2 * S + 1) * KB * 32 + 40);  // ends inside a stage, and inside a box
    check<XT, WT, RX, RW, KB, S, kMore...>(XT, WT - 1, (S + 1) * KB * 32);
  }
  check<XT, WT, RX, RW, KB, S, kMore...>(2, 3, 20);  // less than a box
}

int main() {
#define SHAPE(...) check_all<__VA_ARGS__>();
  SHAPES
}

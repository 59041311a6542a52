// Draws of tokens: sampling.h has the function. A row is done by one thread; which of two lanes is looked at first changes
// nothing, since a greater score wins and then the lower number.
#include "../sampling.h"

#include "kernels.h"
#include "math64.h"

namespace detinfer {
namespace DETINFER_LEVEL {
namespace {

// Scores of `count` tokens from `first`; -Inf past them.
void scores(const float* log_probabilities, int64_t first, int count, uint64_t seed, uint64_t position, double* to) {
  uint64_t bits[kLanes];
  double values[kLanes];
  for (int i = 0; i < kLanes; i++) bits[i] = upper_52(philox(static_cast<uint32_t>(first + i), position, seed));
  for (int i = 0; i < kLanes; i++) values[i] = i < count ? static_cast<double>(log_probabilities[first + i]) : -kInfinity;
  for (int part = 0; part < kLanes; part += kDoubles) {
    W r;
    D value;
    std::memcpy(&r, bits + part, sizeof r);
    std::memcpy(&value, values + part, sizeof value);
    const D u = (((D)(r | 0x4330000000000000u) - 0x1p52) + 0.5) * 0x1p-52;  // r is below 2^52
    const D noise = -log(-log(u));
    const D score = value + noise;
    std::memcpy(to + part, &score, sizeof score);
  }
}

int64_t draw(const SamplingArgs& args, int64_t row) {
  const float* x = args.log_probabilities + row * args.n;
  const uint64_t seed = static_cast<uint64_t>(args.seeds[row]), position = static_cast<uint64_t>(args.positions[row]);
  Candidate best = nobody();
  for (int64_t first = 0; first < args.n; first += kLanes) {
    const int count = args.n - first < kLanes ? static_cast<int>(args.n - first) : kLanes;
    bool any = false;
    for (int i = 0; i < count; i++) {
      if (x[first + i] != x[first + i]) return -1;
      any = any || x[first + i] > -__builtin_inff();
    }
    if (!any) continue;
    double score[kLanes];
    scores(x, first, count, seed, position, score);
    for (int i = 0; i < count; i++) {
      const Candidate one = {score[i], first + i};
      if (one.score > -kInfinity && wins(one, best)) best = one;
    }
  }
  return best.token;
}

void body(int64_t begin, int64_t end, void* context) {
  const SamplingArgs& args = *static_cast<const SamplingArgs*>(context);
  for (int64_t row = begin; row < end; row++) args.out[row] = draw(args, row);
}

}  // namespace

int sampling(const SamplingArgs& args) {
  if (args.rows < 0 || args.n < 0 || args.n > (static_cast<int64_t>(1) << 32))
    return fail(kBadArgument, "sampling: a size is negative, or a row has more than 4,294,967,296 tokens");
  parallel_for(0, args.rows, 1, body, const_cast<SamplingArgs*>(&args));
  return kOk;
}

}  // namespace DETINFER_LEVEL
}  // namespace detinfer

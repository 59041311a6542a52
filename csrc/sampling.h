// Arguments of the sampling family: one token for each row of log-probabilities.
//
// A token's score is its log-probability plus Gumbel noise, in fp64; the greatest score wins, then the lower number. The
// noise of token v is -log(-log(u)), u = (r + 1/2) / 2^52, r the upper 52 bits of words 0 and 1 of Philox4x32-10 with the
// counter (v, 0, position) and the request's seed as its key. A row with NaN, or with no token above -Inf, gives -1.
#pragma once
#include <cstdint>

#include "platform.h"

namespace detinfer {

static constexpr int64_t kSamplingSplits = 16;  // blocks of a GPU that share a row

struct SamplingArgs {
  int64_t rows, n;                  // n at most 2^32
  const float* log_probabilities;   // [rows, n], contiguous; -Inf: not to be drawn
  const int64_t* seeds;             // one a row
  const int64_t* positions;         // one a row
  int64_t* out;                     // one a row
  void* workspace;                  // GPU: rows * kSamplingSplits Candidates; CPU: null
};

struct Candidate {
  double score;
  int64_t token;
};
DETINFER_HD static inline Candidate nobody() { return {-__builtin_inf(), -1}; }
DETINFER_HD static inline Candidate not_a_number() { return {__builtin_inf(), -1}; }  // wins over everybody

DETINFER_HD static inline bool wins(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

struct PhiloxWords {
  uint32_t first, second;
};

DETINFER_HD static inline void philox_round(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
  const uint64_t p0 = static_cast<uint64_t>(c[0]) * 0xD2511F53u, p1 = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
  c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
  c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
  c[1] = static_cast<uint32_t>(p1);
  c[3] = static_cast<uint32_t>(p0);
}

// The first two words of Philox4x32-10.
DETINFER_HD static inline PhiloxWords philox(uint32_t token, uint64_t position, uint64_t seed) {
  uint32_t c[4] = {token, 0, static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32)};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int i = 0; i < 10; i++) {
    philox_round(c, k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c[0], c[1]};
}

DETINFER_HD static inline uint64_t upper_52(PhiloxWords words) {
  return static_cast<uint64_t>(words.first) << 20 | words.second >> 12;
}

}  // namespace detinfer

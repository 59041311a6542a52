// The protocol as the collectives see it: write your bank, meet, read the others' banks.
//
// Meetings are numbered. What a rank writes before meeting e goes into its bank of parity e & 1, and may be read by all
// between meeting e and each one's arrival at meeting e + 1. A bank written for meeting e is written again for meeting
// e + 2, which its owner begins after meeting e + 1; by then everyone has arrived there and reads it no more.
#pragma once

#include "../communicator.h"
#include "../platform.h"

namespace detinfer {

// Returned besides the codes of platform.h. kPeerLost: a rank died, left or did not arrive; every later call of the
// communicator fails too. kMismatch: the ranks called with different arguments; nothing was written, and the communicator
// is as it was.
enum CommunicatorStatus : int { kPeerLost = 4, kMismatch = 5 };

// A bank holds `staging` bytes for inputs and as many for results.
struct Bank {
  uint8_t* staged;
  uint8_t* results;
};

int rank_of(const Communicator& c);
int size_of(const Communicator& c);
int64_t staging_of(const Communicator& c);

// Starts a call: fails where an earlier one lost a peer.
int begin(Communicator& c, const CollectiveCall& call);

// Rank `rank`'s bank of the next meeting (own rank, before meet) or of the last one (any rank, after meet).
Bank next_bank(Communicator& c);
Bank last_bank(Communicator& c, int rank);

// Waits until all ranks are here. After the first meeting of a call the ranks' arguments are compared.
int meet(Communicator& c);

// Runs one call (cpu/collectives.cpp).
int collective(Communicator& c, const CollectiveArgs& args);

}  // namespace detinfer

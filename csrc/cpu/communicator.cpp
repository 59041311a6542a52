// Ranks of one host that meet in an anonymous shared mapping: meetings, waiting, and what is said of a lost peer.
//
// Memory ordering. A rank's writes to its bank come before its fetch_add (release) on `arrived`; the last one's fetch_add
// (acquire) sees all of them, as read-modify-writes continue the release sequence; it then stores `epoch` (release),
// which everyone reads (acquire) before touching a peer's bank. So whatever was written before a meeting happens before
// whatever is read after it, and whatever was read before a meeting happens before what is written after it.
//
// A sleeper adds itself to `sleepers`, then reads `epoch`; the last one to arrive stores `epoch`, then reads `sleepers`:
// all four are sequentially consistent, so one of the two sees the other, and no wake-up is lost. Sleeps are short
// besides, since a dead peer wakes nobody.
#include "communicator.h"

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace detinfer {

using Word = std::atomic<uint32_t>;

namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kSlice = 5 * 1000 * 1000;  // longest sleep, in nanoseconds, between two looks at the peers

static_assert(Word::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free, "atomics must work across processes");
static_assert(sizeof(CollectiveCall) == 64, "no padding: it is compared byte by byte");

enum Reason : uint8_t { kLate = 1, kDied, kLeft };

// Head::broken: what befell which ranks, and who noticed it in which call. Never 0.
struct Loss {
  uint8_t reason, ranks, noticed_by, collective;
  uint32_t call;
};

int64_t rounded(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
int64_t bank_bytes(int64_t staging) { return rounded(sizeof(CollectiveCall) + 64) + 2 * rounded(staging); }

const char* name_of(int collective) {
  static const char* const names[] = {"barrier", "all_reduce", "reduce_scatter", "all_gather", "all_reduce_rms_norm"};
  return collective >= 0 && collective < 5 ? names[collective] : "collective";
}

}  // namespace

// All zero at first, as a new mapping is. Each word that is written often has a cache line of its own.
struct Head {
  alignas(128) Word epoch;     // meetings that all ranks have reached
  alignas(128) Word arrived;   // ranks that have reached the next one
  alignas(128) Word sleepers;  // ranks asleep on `epoch`
  alignas(128) std::atomic<uint64_t> broken;  // 0, or why every call fails from now on: see Loss
  struct alignas(128) Rank {
    Word posted;  // meetings that the rank has reached: tells who is missing, orders nothing
    Word left;    // 1: it closed its communicator
    Word pid;     // 0: it has not opened it
  } ranks[kMostRanks];
};
static_assert(sizeof(Head) <= kPage, "the head is one page");

struct Communicator {
  Head* head;
  uint8_t* banks;
  int64_t staging, bytes;
  double timeout;
  int rank, size, fd;
  bool mapped;   // here, and not by the caller
  bool crowded;  // more ranks than cores: who spins keeps from running whom it waits for
  uint32_t epoch, calls;
  bool first;  // the next meeting is the first of its call
  CollectiveCall call;
  CollectiveCall seen[kMostRanks];  // of the last call that did not agree
};

namespace {

Word* words(Communicator& c, int rank) { return &c.head->ranks[rank].posted; }

Bank bank_at(const Communicator& c, int rank, uint32_t epoch) {
  uint8_t* start = c.banks + (2 * rank + static_cast<int>(epoch & 1)) * bank_bytes(c.staging);
  uint8_t* data = start + rounded(sizeof(CollectiveCall) + 64);
  return {data, data + rounded(c.staging)};
}
CollectiveCall* call_at(const Communicator& c, int rank, uint32_t epoch) {
  return reinterpret_cast<CollectiveCall*>(c.banks + (2 * rank + static_cast<int>(epoch & 1)) * bank_bytes(c.staging));
}

bool reached(const Communicator& c, uint32_t epoch) {
  return static_cast<int32_t>(c.head->epoch.load(std::memory_order_acquire) - epoch) >= 0;
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

#if defined(__linux__)
int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<int64_t>(t.tv_sec) * 1000000000 + t.tv_nsec;
}

void sleep_on(Word& word, uint32_t value, int64_t nanoseconds) {
  const timespec t = {static_cast<time_t>(nanoseconds / 1000000000), static_cast<long>(nanoseconds % 1000000000)};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, value, &t, nullptr, 0);
}

void wake_all(Word& word) { syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

// Each rank holds a lock on one byte of the mapping's file. The kernel drops it the moment the process ends, however it
// ends and before anybody reaps it.
bool lock_own_byte(int fd, int rank) {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return fcntl(fd, F_SETLK, &lock) == 0;
}

bool dead(const Communicator& c, int rank) {
  const uint32_t pid = c.head->ranks[rank].pid.load(std::memory_order_acquire);
  if (c.fd < 0 || pid == 0 || pid == static_cast<uint32_t>(getpid())) return false;
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return fcntl(c.fd, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
}

int cores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}
#endif

int lost(Communicator& c, uint64_t broken) {
  Loss loss;
  std::memcpy(&loss, &broken, sizeof loss);
  char who[64] = "";
  int length = 0, count = 0;
  for (int r = 0; r < c.size; r++)
    if (loss.ranks >> r & 1) length += std::snprintf(who + length, sizeof who - length, count++ ? ", %d" : "%d", r);
  char what[64] = "died";
  if (loss.reason == kLeft) std::snprintf(what, sizeof what, "closed %s communicator", count > 1 ? "their" : "its");
  if (loss.reason == kLate) std::snprintf(what, sizeof what, "did not arrive within %g s", c.timeout);
  char sentence[400];
  std::snprintf(sentence, sizeof sentence,
                "%s, call %u of this communicator: rank%s %s %s (noticed by rank %d). No further call can succeed: close "
                "the communicator on every rank and connect again",
                name_of(loss.collective), loss.call, count > 1 ? "s" : "", who, what, loss.noticed_by);
  return fail(static_cast<Status>(kPeerLost), sentence);
}

int give_up(Communicator& c, Reason reason, unsigned ranks) {
  const Loss loss = {reason, static_cast<uint8_t>(ranks), static_cast<uint8_t>(c.rank),
                     static_cast<uint8_t>(c.call.collective), c.calls};
  uint64_t mine, first = 0;
  std::memcpy(&mine, &loss, sizeof mine);
  if (c.head->broken.compare_exchange_strong(first, mine)) first = mine;
#if defined(__linux__)
  wake_all(c.head->epoch);
#endif
  return lost(c, first);
}

#if defined(__linux__)
// Ranks that have not reached `epoch` and never will, or 0. A rank may post and then end: `posted` is read last.
unsigned gone(Communicator& c, uint32_t epoch, Reason* reason, unsigned* missing) {
  unsigned died = 0, left = 0, behind = 0, dead_ranks = 0;
  for (int r = 0; r < c.size; r++) {
    if (r == c.rank) continue;
    const bool is_dead = dead(c, r), has_left = c.head->ranks[r].left.load(std::memory_order_acquire) != 0;
    if (is_dead) dead_ranks |= 1u << r;
    if (words(c, r)->load(std::memory_order_acquire) == epoch) continue;
    behind |= 1u << r;
    if (has_left) left |= 1u << r;
    else if (is_dead) died |= 1u << r;
  }
  *missing = behind;
  *reason = died != 0 ? kDied : kLeft;
  if (died != 0) return died;
  if (left != 0) return left;
  // All have posted and yet the meeting does not end: the last one was killed between its two steps.
  *reason = kDied;
  return behind == 0 && !reached(c, epoch) ? dead_ranks : 0;
}

int await(Communicator& c, uint32_t epoch) {
  const int spins = c.crowded ? 32 : 1024, yields = c.crowded ? 16 : 64;
  for (int i = 0; i < spins; i++) {
    if (reached(c, epoch)) return kOk;
    pause();
  }
  for (int i = 0; i < yields; i++) {
    if (reached(c, epoch)) return kOk;
    sched_yield();
  }
  Head& head = *c.head;
  int64_t waited = 0, before = now(), slice = kSlice / 5;
  int status = kOk;
  head.sleepers.fetch_add(1, std::memory_order_seq_cst);
  for (;;) {
    const uint32_t value = head.epoch.load(std::memory_order_seq_cst);
    if (static_cast<int32_t>(value - epoch) >= 0) break;
    if (const uint64_t broken = head.broken.load(std::memory_order_acquire)) {
      status = lost(c, broken);
      break;
    }
    sleep_on(head.epoch, value, slice);
    const int64_t after = now();
    // A process that was itself stopped for a while has not waited for all of it.
    waited += after - before < 4 * slice ? after - before : 4 * slice;
    before = after;
    if (after - before >= slice || waited >= slice) {
      Reason reason;
      unsigned missing;
      if (const unsigned ranks = gone(c, epoch, &reason, &missing)) {
        if (!reached(c, epoch)) status = give_up(c, reason, ranks);
        break;
      }
      if (static_cast<double>(waited) >= c.timeout * 1e9 && !reached(c, epoch)) {
        status = give_up(c, kLate, missing);
        break;
      }
    }
    slice = kSlice;
  }
  head.sleepers.fetch_sub(1, std::memory_order_relaxed);
  return status;
}
#endif

}  // namespace

int rank_of(const Communicator& c) { return c.rank; }
int size_of(const Communicator& c) { return c.size; }
int64_t staging_of(const Communicator& c) { return c.staging; }
Bank next_bank(Communicator& c) { return bank_at(c, c.rank, c.epoch + 1); }
Bank last_bank(Communicator& c, int rank) { return bank_at(c, rank, c.epoch); }

int begin(Communicator& c, const CollectiveCall& call) {
  c.calls++;
  c.call = call;
  c.first = true;
  const uint64_t broken = c.head == nullptr ? 0 : c.head->broken.load(std::memory_order_acquire);
  return broken == 0 ? static_cast<int>(kOk) : lost(c, broken);
}

int meet(Communicator& c) {
#if defined(__linux__)
  Head& head = *c.head;
  const uint32_t epoch = ++c.epoch;
  const bool first = c.first;
  c.first = false;
  if (first) *call_at(c, c.rank, epoch) = c.call;
  head.ranks[c.rank].posted.store(epoch, std::memory_order_release);
  if (head.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(c.size)) {
    head.arrived.store(0, std::memory_order_relaxed);
    head.epoch.store(epoch, std::memory_order_seq_cst);
    if (head.sleepers.load(std::memory_order_seq_cst) != 0) wake_all(head.epoch);
    // Late, and the others have given up meanwhile.
    if (const uint64_t broken = head.broken.load(std::memory_order_acquire)) return lost(c, broken);
  } else if (const int status = await(c, epoch)) {
    return status;
  }
  if (!first) return kOk;
  bool agreed = true;
  for (int r = 0; r < c.size; r++) agreed = agreed && std::memcmp(call_at(c, r, epoch), &c.call, sizeof c.call) == 0;
  if (agreed) return kOk;
  for (int r = 0; r < c.size; r++) c.seen[r] = *call_at(c, r, epoch);
  return fail(static_cast<Status>(kMismatch), "the ranks called with different arguments");
#else
  (void)c;
  return fail(kNotSupported, "collectives between processes need Linux");
#endif
}

}  // namespace detinfer

using namespace detinfer;

// Bytes of the mapping that `size` ranks with `staging` bytes each share: all zero before the first rank opens it.
DETINFER_EXPORT int64_t detinfer_communicator_bytes(int size, int64_t staging) {
  return kPage + 2 * static_cast<int64_t>(size) * bank_bytes(staging);
}

// Opens rank `rank` of `size` on the file `fd` (which the communicator owns from then on), or where `fd` is negative on
// `base`, a mapping that the caller keeps: ranks that are threads of one process. A group of one rank needs neither.
// Returns null on failure.
DETINFER_EXPORT Communicator* detinfer_communicator_open(int fd, void* base, int rank, int size, int64_t staging,
                                                         double timeout) {
#if defined(__linux__)
  if (size < 1 || size > kMostRanks || rank < 0 || rank >= size || staging < 64 * kMostRanks || staging % 64 != 0) {
    fail(kBadArgument, "communicator: 1 to 8 ranks, and a staging area of a multiple of 64 bytes, at least 512");
    return nullptr;
  }
  const int64_t bytes = detinfer_communicator_bytes(size, staging);
  if (fd >= 0) {
    struct stat status;
    if (fstat(fd, &status) != 0 || status.st_size < bytes) {
      fail(kBadArgument, "communicator: the shared file is smaller than the ranks need");
      return nullptr;
    }
    base = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) {
      fail(kOutOfMemory, "communicator: the shared file cannot be mapped");
      return nullptr;
    }
  }
  void* memory = std::calloc(1, sizeof(Communicator));
  if (memory == nullptr || (fd >= 0 && !lock_own_byte(fd, rank))) {
    std::free(memory);
    if (fd >= 0) munmap(base, static_cast<size_t>(bytes));
    fail(kBadArgument, "communicator: another process already has this rank");
    return nullptr;
  }
  Communicator* c = new (memory) Communicator();
  c->head = static_cast<Head*>(base);
  c->banks = static_cast<uint8_t*>(base) + kPage;
  c->staging = staging;
  c->bytes = bytes;
  c->timeout = timeout;
  c->rank = rank;
  c->size = size;
  c->fd = fd;
  c->mapped = fd >= 0;
  c->crowded = size > cores();
  if (c->head != nullptr) c->head->ranks[rank].pid.store(static_cast<uint32_t>(getpid()), std::memory_order_release);
  return c;
#else
  (void)fd, (void)base, (void)rank, (void)size, (void)staging, (void)timeout;
  fail(kNotSupported, "collectives between processes need Linux");
  return nullptr;
#endif
}

// The arguments with which rank `rank` came to the last call that did not agree.
DETINFER_EXPORT void detinfer_communicator_seen(const Communicator* c, int rank, CollectiveCall* call) {
  *call = c->seen[rank];
}

// Number of the last call, counted from 1.
DETINFER_EXPORT uint32_t detinfer_communicator_calls(const Communicator* c) { return c->calls; }

// Frees this rank's side. Ranks that wait for it, or call later, are told that it left.
DETINFER_EXPORT void detinfer_communicator_close(Communicator* c) {
#if defined(__linux__)
  if (c->head != nullptr) {
    c->head->ranks[c->rank].left.store(1, std::memory_order_release);
    wake_all(c->head->epoch);
  }
  if (c->mapped) munmap(c->head, static_cast<size_t>(c->bytes));
  if (c->fd >= 0) close(c->fd);
#endif
  std::free(c);
}

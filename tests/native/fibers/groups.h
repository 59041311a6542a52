// Blocks that give each other values, for csrc/platform.h on fibers: what it has for compute capability 9.0.
static constexpr bool kGroups = true;
static inline void make(Arrival* arrival) {
  __atomic_store_n(&arrival->barrier, uint64_t{0}, __ATOMIC_SEQ_CST);
  char* none = nullptr;  // the first of a block's is where it begins
  fibers::block.group->begin[fibers::block.in_group].compare_exchange_strong(none, reinterpret_cast<char*>(arrival));
}
static inline void meet_begin() {}
static inline void meet_end() {
  for (int i = 0; i < fibers::block.group_size; i++)
    while (fibers::block.group->begin[i].load() == nullptr) fibers::spin();
}
static constexpr uint64_t kExpected = 512;  // bytes of an exchange
static inline void expect(Arrival*, uint32_t bytes) {
  if (bytes != kExpected) abort();
}
static inline void send_floats(float* at, float first, float second, Arrival* arrival, int to) {
  float* place = reinterpret_cast<float*>(fibers::of_block(at, to));
  place[0] = first;
  place[1] = second;
  auto* counted = reinterpret_cast<Arrival*>(fibers::of_block(arrival, to));
  __atomic_fetch_add(&counted->barrier, uint64_t{8}, __ATOMIC_SEQ_CST);
}
static inline void await(Arrival* arrival, uint32_t turn) {
  while ((__atomic_load_n(&arrival->barrier, __ATOMIC_SEQ_CST) / kExpected & 1) == turn) fibers::spin();
}

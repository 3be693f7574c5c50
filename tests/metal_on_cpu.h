// Enough of Metal's language to run a kernel's text on a CPU, one threadgroup after the other.
// A thread is a fiber; all threads of a simdgroup or threadgroup meet at their barriers.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned char uchar;
typedef unsigned short ushort;
#define device
#define constant const
#define threadgroup static

struct uint3 {
  uint x, y, z;
};

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  bfloat16_t(float x) {  // to the nearest, ties to even
    uint32_t word;
    std::memcpy(&word, &x, 4);
    bits = (word + 0x7FFF + (word >> 16 & 1)) >> 16;
  }
  operator float() const {
    uint32_t word = (uint32_t)bits << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
  }
};

template <class To, class From>
To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

namespace metal {
inline float sqrt(float x) { return std::sqrt(x); }
inline float exp(float x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
inline float fabs(float x) { return std::fabs(x); }
inline float rint(float x) { return std::nearbyint(x); }
inline float max(float a, float b) { return a > b ? a : b; }
inline float min(float a, float b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
}  // namespace metal

struct Meeting {  // of the threads of a group
  int expected, arrived = 0;
  long round = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static uint current;  // the fiber that runs
static std::vector<Meeting> simd_meetings;
static Meeting group_meeting;
static float float_slots[1024];
static uint uint_slots[1024];

inline void wait_in(Meeting& meeting) {
  long round = meeting.round;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    meeting.round++;
    return;
  }
  while (meeting.round == round) swapcontext(&fibers[current].context, &scheduler);
}

enum class mem_flags { mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { wait_in(group_meeting); }
inline void simd_meet() { wait_in(simd_meetings[current / 32]); }

template <class T, class Combine>
T simd_combine(T* slots, T x, Combine combine) {
  uint me = current, first = me / 32 * 32;
  slots[me] = x;
  simd_meet();
  T result = slots[first];
  for (uint lane = 1; lane < 32; lane++) result = combine(result, slots[first + lane]);
  simd_meet();
  return result;
}

inline float simd_sum(float x) {
  return simd_combine(float_slots, x, [](float a, float b) { return a + b; });
}
inline float simd_max(float x) {
  return simd_combine(float_slots, x, [](float a, float b) { return a > b ? a : b; });
}
inline uint simd_min(uint x) {
  return simd_combine(uint_slots, x, [](uint a, uint b) { return a < b ? a : b; });
}
inline float simd_shuffle_xor(float x, ushort mask) {
  uint me = current;
  float_slots[me] = x;
  simd_meet();
  float other = float_slots[me ^ mask];
  simd_meet();
  return other;
}

static void (*body)(uint3 position, uint3 group);
static uint3 group_position;

static void enter() {
  body({current, 0, 0}, group_position);
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

static void run_group(uint threads, uint3 position) {
  group_position = position;
  group_meeting = {(int)threads};
  simd_meetings.assign(threads / 32, Meeting{32});
  fibers.resize(threads);
  for (auto& fiber : fibers) {
    fiber.stack.resize(1 << 16);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, enter, 0);
  }
  for (uint left = threads; left;) {
    left = 0;
    for (current = 0; current < threads; current++) {
      if (fibers[current].done) continue;
      swapcontext(&scheduler, &fibers[current].context);
      left += !fibers[current].done;
    }
  }
}

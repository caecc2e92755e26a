// The compiled form of a problem, shared by every search.
//
// Time is cut into slots, one per maximal set of requests alive together, so two
// requests conflict exactly when their slot ranges meet. Sizes and alignments are
// in units (the gcd is divided out); the caller guarantees that the sum of all
// sizes and alignments stays below 2^62, so no addition here can overflow.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

namespace memo {

using Offset = std::int64_t;

struct Instance {
  std::int32_t num_requests = 0;
  std::int32_t num_slots = 0;
  const std::int32_t* first = nullptr;  // first slot of each request
  const std::int32_t* last = nullptr;   // last slot of each request (inclusive)
  const Offset* size = nullptr;
  const Offset* alignment = nullptr;
};

inline Offset align_up(Offset value, Offset alignment) {
  if (alignment <= 1) return value;
  const Offset rest = value % alignment;
  return rest == 0 ? value : value + alignment - rest;
}

// Results of a search; the numbers are part of the C interface.
enum class Outcome : std::int32_t { kInfeasible = 0, kFound = 1, kLimit = 2, kStopped = 3 };

// Says when to give up: another thread's flag, or a deadline. Reads the clock rarely.
class Stopper {
 public:
  Stopper(const std::int32_t* flag, double seconds)
      : flag_(flag),
        deadline_(std::chrono::steady_clock::now() +
                  std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                      std::chrono::duration<double>(seconds < 0 ? 0 : (seconds > 1e6 ? 1e6 : seconds)))) {}

  bool stopped() {
    if (stopped_) return true;
    if ((++calls_ & 63) != 0) return false;
    stopped_ = __atomic_load_n(flag_, __ATOMIC_RELAXED) != 0 ||
               std::chrono::steady_clock::now() >= deadline_;
    return stopped_;
  }

 private:
  const std::int32_t* flag_;
  std::chrono::steady_clock::time_point deadline_;
  std::uint32_t calls_ = 0;
  bool stopped_ = false;
};

// SplitMix64 (Steele, Lea, Flood 2014): the same numbers on every machine.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15ULL); }

  // Uniform in [0, bound); the bias is below bound / 2^64.
  std::uint64_t below(std::uint64_t bound) {
    return static_cast<std::uint64_t>((static_cast<unsigned __int128>(next()) * bound) >> 64);
  }

  static std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  }

 private:
  std::uint64_t state_;
};

}  // namespace memo

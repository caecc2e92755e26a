// Statistics that tell the truth: the native allocator counts the arena as one allocation, this corrects it to what of
// the arena is in use.
//
//     reported = native + planned - arena          peaks: the highest of that at any allocation
#pragma once

#include <c10/core/CachingDeviceAllocator.h>

#include <array>
#include <cstdint>
#include <mutex>

namespace memo_arena {

using c10::CachingDeviceAllocator::DeviceStats;

class Ledger {
 public:
  // From now on peaks are counted here; `native` as it is before the arena is there.
  void begin(const DeviceStats& native);
  // The arena's own block came (`sign` 1) or went (-1): `block` bytes, of which `requested` were asked for.
  void arena(std::int64_t block, std::int64_t requested, int sign);
  // A planned allocation came or went.
  void planned(std::int64_t bytes, std::int64_t requested, int sign);
  // Something was allocated; `native` as it is now.
  void sample(const DeviceStats& native);
  void correct(DeviceStats& native) const;
  void reset_accumulated();
  void reset_peak(const DeviceStats& native);

 private:
  struct Entry {
    std::int64_t current = 0;
    std::int64_t allocated = 0;
    std::int64_t freed = 0;
    std::int64_t peak = 0;
  };
  // By what is counted (allocations, active, allocated bytes, active bytes, requested bytes), then by kind of pool.
  using Entries = std::array<std::array<Entry, 3>, 5>;

  template <typename Body>
  void each(const DeviceStats& native, Body&& body);

  mutable std::mutex mutex_;
  Entries entries_{};
};

}  // namespace memo_arena

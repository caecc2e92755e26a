#include "ledger.hpp"

#include <algorithm>
#include <cstddef>

namespace memo_arena {
namespace {

using c10::CachingAllocator::StatArray;

// Requests of at most this many bytes belong to the native allocator's small pool.
constexpr std::int64_t kSmallBytes = 1 << 20;
constexpr std::size_t kAll = static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE);
constexpr std::size_t kSmallPool = static_cast<std::size_t>(c10::CachingAllocator::StatType::SMALL_POOL);
constexpr std::size_t kLargePool = static_cast<std::size_t>(c10::CachingAllocator::StatType::LARGE_POOL);

template <typename Stats>
auto arrays(Stats& stats) {
  return std::array{&stats.allocation, &stats.active, &stats.allocated_bytes, &stats.active_bytes,
                    &stats.requested_bytes};
}

std::array<std::int64_t, 5> amounts(std::int64_t bytes, std::int64_t requested) {
  return {1, 1, bytes, bytes, requested};
}

}  // namespace

template <typename Body>
void Ledger::each(const DeviceStats& native, Body&& body) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = arrays(native);
  for (std::size_t what = 0; what < entries_.size(); ++what) {
    for (std::size_t pool = 0; pool < entries_[what].size(); ++pool) body(entries_[what][pool], (*found[what])[pool]);
  }
}

void Ledger::begin(const DeviceStats& native) {
  each(native, [](Entry& entry, const auto& stat) { entry.peak = stat.peak; });
}

void Ledger::arena(std::int64_t block, std::int64_t requested, int sign) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto values = amounts(block, requested);
  for (std::size_t what = 0; what < entries_.size(); ++what) {
    for (const std::size_t pool : {kAll, kLargePool}) {
      Entry& entry = entries_[what][pool];
      entry.current -= sign * values[what];
      (sign > 0 ? entry.allocated : entry.freed) -= values[what];
    }
  }
}

void Ledger::planned(std::int64_t bytes, std::int64_t requested, int sign) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto values = amounts(bytes, requested);
  for (std::size_t what = 0; what < entries_.size(); ++what) {
    for (const std::size_t pool : {kAll, bytes <= kSmallBytes ? kSmallPool : kLargePool}) {
      Entry& entry = entries_[what][pool];
      entry.current += sign * values[what];
      (sign > 0 ? entry.allocated : entry.freed) += values[what];
    }
  }
}

void Ledger::sample(const DeviceStats& native) {
  each(native, [](Entry& entry, const auto& stat) { entry.peak = std::max(entry.peak, stat.current + entry.current); });
}

void Ledger::correct(DeviceStats& native) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = arrays(native);
  for (std::size_t what = 0; what < entries_.size(); ++what) {
    for (std::size_t pool = 0; pool < entries_[what].size(); ++pool) {
      const Entry& entry = entries_[what][pool];
      auto& stat = (*found[what])[pool];
      stat.current += entry.current;
      stat.allocated += entry.allocated;
      stat.freed += entry.freed;
      stat.peak = std::max(entry.peak, stat.current);
    }
  }
}

void Ledger::reset_accumulated() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto& pools : entries_) {
    for (Entry& entry : pools) entry.allocated = entry.freed = 0;
  }
}

void Ledger::reset_peak(const DeviceStats& native) {
  each(native, [](Entry& entry, const auto& stat) { entry.peak = stat.current + entry.current; });
}

}  // namespace memo_arena

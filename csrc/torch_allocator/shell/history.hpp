// What the native allocator's history and snapshots lack: the planned allocations.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/util/ApproximateClock.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "arena.hpp"
#include "torch_version.hpp"

namespace memo_arena {

namespace caching = c10::CachingDeviceAllocator;
using Context = std::shared_ptr<c10::GatheredContext>;

// The history of one device's arenas; costs one load where nothing is recorded.
class History {
 public:
  void configure(bool enabled, caching::CreateContextFn recorder, std::size_t most, caching::RecordContext when,
                 bool clear, const std::vector<std::string>& skipped);

  bool on() const { return on_.load(std::memory_order_relaxed); }
  void allocated(int device, std::uint64_t address, std::uint64_t requested, Stream stream);
  void freed(int device, std::uint64_t address, std::uint64_t requested, Stream stream);
#if MEMO_TORCH >= 2014
  void annotated(int device, std::uint64_t address, std::uint64_t requested, Stream stream, const std::string& text);
#endif

  // Adds what was recorded to `entries` in order of time; those of the arena's own block, at `arenas`, are taken out.
  void merge(std::vector<caching::TraceEntry>& entries, const std::vector<std::uint64_t>& arenas) const;
  // Where the live allocation at `address` comes from; none where that was not recorded.
  Context context_of(std::uint64_t address) const;

 private:
  Context gather(caching::RecordContext least) const;
  void add(caching::TraceEntry entry);

  std::atomic<bool> on_{false};
  mutable std::mutex mutex_;
  caching::CreateContextFn recorder_ = nullptr;
  caching::RecordContext when_ = caching::RecordContext::NEVER;
  std::size_t most_ = 0;
  std::vector<caching::TraceEntry::Action> skipped_;
  std::deque<caching::TraceEntry> entries_;
  std::unordered_map<std::uint64_t, Context> contexts_;
  // Compares two clocks now and when it is asked: it has to be older than what it converts.
  mutable c10::ApproximateClockToUnixTimeConverter clock_;
};

// Puts the arena's ranges in the place of its block, `block` bytes at its base.
void show_ranges(std::vector<caching::SegmentInfo>& segments, const Arena& arena, std::uint64_t block,
                 const History& history);

}  // namespace memo_arena

#include "history.hpp"

#include <algorithm>
#include <functional>
#include <iterator>
#include <utility>

namespace memo_arena {
namespace {

using caching::RecordContext;
using caching::TraceEntry;

bool contains(const std::vector<std::uint64_t>& values, std::uint64_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

bool is_of_block(TraceEntry::Action action) {
  return action == TraceEntry::ALLOC || action == TraceEntry::FREE_REQUESTED || action == TraceEntry::FREE_COMPLETED;
}

}  // namespace

void History::configure(bool enabled, caching::CreateContextFn recorder, std::size_t most, RecordContext when,
                        bool clear, const std::vector<std::string>& skipped) {
  const std::lock_guard<std::mutex> lock(mutex_);
  recorder_ = enabled ? recorder : nullptr;
  when_ = enabled ? when : RecordContext::NEVER;
  most_ = std::max<std::size_t>(most, 1);
  skipped_.clear();
  for (const std::string& name : skipped) skipped_.push_back(caching::parseTraceEntryAction(name));
  if (!enabled || clear) entries_.clear();
  if (!enabled) contexts_.clear();
  on_ = enabled;
}

// Outside of the lock: it may run Python.
Context History::gather(RecordContext least) const {
  caching::CreateContextFn recorder = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (when_ >= least) recorder = recorder_;
  }
  return recorder != nullptr ? recorder() : nullptr;
}

void History::add(TraceEntry entry) {
  if (std::find(skipped_.begin(), skipped_.end(), entry.action_) != skipped_.end()) return;
  if (entries_.size() >= most_) entries_.pop_front();
  entries_.push_back(std::move(entry));
}

void History::allocated(int device, std::uint64_t address, std::uint64_t requested, Stream stream) {
  if (!on()) return;
  Context context = gather(RecordContext::STATE);
  const auto now = c10::getApproximateTime();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!on_) return;
  add(TraceEntry(TraceEntry::ALLOC, static_cast<c10::DeviceIndex>(device), address, requested,
                 reinterpret_cast<void*>(stream), {0, 0}, now, when_ >= RecordContext::ALLOC ? context : nullptr));
  if (context != nullptr) contexts_[address] = std::move(context);
}

void History::freed(int device, std::uint64_t address, std::uint64_t requested, Stream stream) {
  if (!on()) return;
  const Context context = gather(RecordContext::ALL);
  const auto now = c10::getApproximateTime();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!on_) return;
  contexts_.erase(address);
  for (const auto action : {TraceEntry::FREE_REQUESTED, TraceEntry::FREE_COMPLETED}) {
    add(TraceEntry(action, static_cast<c10::DeviceIndex>(device), address, requested, reinterpret_cast<void*>(stream),
                   {0, 0}, now, context));
  }
}

#if MEMO_TORCH >= 2014
void History::annotated(int device, std::uint64_t address, std::uint64_t requested, Stream stream,
                        const std::string& text) {
  if (!on()) return;
  Context context = gather(RecordContext::ALLOC);
  const auto now = c10::getApproximateTime();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!on_) return;
  add(TraceEntry(TraceEntry::ANNOTATE, static_cast<c10::DeviceIndex>(device), address, requested,
                 reinterpret_cast<void*>(stream), {0, 0}, now, std::move(context), "", text));
}
#endif

void History::merge(std::vector<TraceEntry>& entries, const std::vector<std::uint64_t>& arenas) const {
  entries.erase(std::remove_if(entries.begin(), entries.end(),
                               [&](const TraceEntry& e) { return is_of_block(e.action_) && contains(arenas, e.addr_); }),
                entries.end());
  std::vector<TraceEntry> own;
  std::function<time_t(c10::approx_time_t)> to_nanoseconds;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    own.assign(entries_.begin(), entries_.end());
    to_nanoseconds = clock_.makeConverter();
  }
  // As the native allocator does for its own: microseconds since the epoch.
  for (TraceEntry& entry : own) entry.time_.t_ = to_nanoseconds(entry.time_.approx_t_) / 1000;
  std::vector<TraceEntry> merged;
  merged.reserve(entries.size() + own.size());
  std::merge(std::make_move_iterator(entries.begin()), std::make_move_iterator(entries.end()),
             std::make_move_iterator(own.begin()), std::make_move_iterator(own.end()), std::back_inserter(merged),
             [](const TraceEntry& a, const TraceEntry& b) { return a.time_.t_ < b.time_.t_; });
  entries = std::move(merged);
}

Context History::context_of(std::uint64_t address) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = contexts_.find(address);
  return found != contexts_.end() ? found->second : nullptr;
}

void show_ranges(std::vector<caching::SegmentInfo>& segments, const Arena& arena, std::uint64_t block,
                 const History& history) {
  for (caching::SegmentInfo& segment : segments) {
    if (arena.base() < segment.address || arena.base() >= segment.address + segment.total_size) continue;
    std::vector<caching::BlockInfo> blocks;
    std::uint64_t at = segment.address;
    for (caching::BlockInfo& one : segment.blocks) {
      const bool is_arena = at == arena.base();
      at += one.size;
      if (!is_arena) {
        blocks.push_back(std::move(one));
        continue;
      }
      segment.allocated_size -= one.size;
      segment.active_size -= one.size;
      segment.requested_size -= one.requested_size;
      for (const LiveRange& range : arena.ranges()) {
        caching::BlockInfo info;
        info.size = range.end - range.begin;
        info.requested_size = range.requested;
        info.allocated = info.active = range.live != 0;
        if (range.live != 0) {
          info.context_when_allocated = history.context_of(range.begin);
          segment.allocated_size += info.size;
          segment.active_size += info.size;
          segment.requested_size += info.requested_size;
        }
        blocks.push_back(std::move(info));
      }
      // What the native allocator gave beyond what was asked for.
      if (block > arena.size()) {
        caching::BlockInfo rest;
        rest.size = block - arena.size();
        blocks.push_back(std::move(rest));
      }
    }
    segment.blocks = std::move(blocks);
  }
}

}  // namespace memo_arena

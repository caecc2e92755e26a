#include "plan.hpp"

#include <algorithm>
#include <iterator>
#include <map>
#include <stdexcept>

namespace memo_arena {
namespace {

[[noreturn]] void refuse(std::size_t index, const std::string& why) {
  throw std::invalid_argument("slot " + std::to_string(index) + " " + why);
}

void check(const Slot& slot, std::size_t index, std::uint64_t capacity) {
  if (slot.size == 0) refuse(index, "has no bytes");
  if (slot.lower >= slot.upper) refuse(index, "ends before it begins");
  if (slot.most != 0 && (slot.least > slot.size || slot.size > slot.most)) {
    refuse(index, "is not between the sizes that it may have");
  }
  if (slot.offset == kNative) return;
  if (slot.offset % kAlignment != 0) {
    refuse(index, "is at offset " + std::to_string(slot.offset) + ", not a multiple of 512");
  }
  if (slot.offset > capacity || slot.room() > capacity - slot.offset || rounded(slot.room()) > capacity - slot.offset) {
    refuse(index, "ends behind the arena of " + std::to_string(capacity) + " bytes");
  }
}

// No two slots may share a byte at one time. In order of time, what is alive is kept by offset.
void check_apart(const std::vector<Slot>& slots) {
  struct Change {
    std::uint64_t time;
    bool begins;
    std::size_t index;
  };
  std::vector<Change> changes;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    if (slots[i].offset == kNative) continue;
    changes.push_back({slots[i].lower, true, i});
    changes.push_back({slots[i].upper, false, i});
  }
  std::sort(changes.begin(), changes.end(), [](const Change& a, const Change& b) {
    return a.time != b.time ? a.time < b.time : a.begins < b.begins;  // lifetimes are half-open
  });
  std::map<std::uint64_t, std::size_t> alive;
  for (const Change& change : changes) {
    const Slot& slot = slots[change.index];
    if (!change.begins) {
      alive.erase(slot.offset);
      continue;
    }
    const auto after = alive.lower_bound(slot.offset);
    if (after != alive.end() && after->first < slot.offset + rounded(slot.room())) {
      refuse(change.index, "shares bytes with slot " + std::to_string(after->second) + ", which lives at that time");
    }
    if (after != alive.begin()) {
      const std::size_t before = std::prev(after)->second;
      if (slots[before].offset + rounded(slots[before].room()) > slot.offset) {
        refuse(change.index, "shares bytes with slot " + std::to_string(before) + ", which lives at that time");
      }
    }
    alive.emplace(slot.offset, change.index);
  }
}

void index_grams(Lane& lane) {
  for (std::size_t at = 0; at + kGram <= lane.count(); ++at) {
    const std::uint64_t hash = gram_hash(&lane.sizes[at]);
    if (hash != 0) lane.grams[hash].push_back(at + kGram - 1);
  }
}

}  // namespace

std::uint64_t gram_hash(const std::uint64_t* sizes) {
  if (std::all_of(sizes, sizes + kGram, [&](std::uint64_t size) { return size == sizes[0]; })) return 0;
  std::uint64_t hash = 1469598103934665603ULL;
  for (std::size_t i = 0; i < kGram; ++i) hash = (hash ^ sizes[i]) * 1099511628211ULL + (hash >> 29);
  return hash == 0 ? 1 : hash;
}

Plan::Plan(const std::vector<Slot>& slots, std::uint64_t capacity) {
  for (std::size_t i = 0; i < slots.size(); ++i) {
    check(slots[i], i, capacity);
    if (i > 0 && slots[i].lower < slots[i - 1].lower) refuse(i, "begins before the one ahead of it");
    if (slots[i].offset != kNative) extent_ = std::max(extent_, slots[i].offset + rounded(slots[i].room()));
  }
  if (extent_ == 0) throw std::invalid_argument("the plan places nothing");
  check_apart(slots);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const Slot& slot = slots[i];
    const bool small = rounded(slot.size) <= kSmall;
    auto lane = std::find_if(lanes_.begin(), lanes_.end(),
                             [&](const Lane& l) { return l.stream == slot.stream && l.small == small; });
    if (lane == lanes_.end()) {
      lanes_.emplace_back();
      lane = std::prev(lanes_.end());
      lane->stream = slot.stream;
      lane->small = small;
    }
    lane->sizes.push_back(rounded(slot.size));
    lane->offsets.push_back(slot.offset);
    lane->least.push_back(rounded(slot.most != 0 ? slot.least : slot.size));
    lane->most.push_back(rounded(slot.room()));
    lane->numbers.push_back(i);
  }
  for (Lane& lane : lanes_) index_grams(lane);
}

}  // namespace memo_arena

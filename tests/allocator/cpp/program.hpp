// A program that follows a plan more or less, with contents that a fake device checks.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "arena.hpp"
#include "fake_device.hpp"

#define CHECK(condition)                                                \
  do {                                                                  \
    if (!(condition)) {                                                 \
      std::fprintf(stderr, "%s:%d: %s\n", __func__, __LINE__, #condition); \
      std::exit(1);                                                     \
    }                                                                   \
  } while (false)


namespace memo_test {

using memo_arena::Arena;
using memo_arena::Plan;
using memo_arena::rounded;
using memo_arena::Slot;

constexpr std::uint64_t kBase = 1ULL << 40;

struct Quiet : memo_arena::Device {
  memo_arena::Event record(Stream) override { return 1; }
  bool wait(Stream, memo_arena::Event) override { return true; }
  void release(memo_arena::Event) override {}
};

// A step of `count` requests on `streams` streams, some of a size that is not certain, placed at the lowest free offset
// (streams share bytes), and how large that is.
std::vector<Slot> random_step(std::mt19937_64& random, std::size_t count, std::size_t streams, std::uint64_t& extent) {
  std::vector<Slot> slots;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t size = 1 + random() % (kAlignment * (random() % 8 == 0 ? 40 : 6));
    slots.push_back({2 * i, 2 * i + 1 + 2 * (random() % (random() % 6 == 0 ? 60 : 8)), size, 0, random() % streams});
    if (random() % 10 == 0) {
      slots.back().least = size - random() % (1 + size / 2);
      slots.back().most = size + random() % (kAlignment * 4);
    }
  }
  extent = 0;
  for (std::size_t i = 0; i < count; ++i) {
    bool moved = true;
    while (moved) {
      moved = false;
      for (std::size_t j = 0; j < i; ++j) {
        const bool together = slots[j].upper > slots[i].lower;
        const bool touching = slots[j].offset < slots[i].offset + rounded(slots[i].room()) &&
                              slots[i].offset < slots[j].offset + rounded(slots[j].room());
        if (together && touching) {
          slots[i].offset = slots[j].offset + rounded(slots[j].room());
          moved = true;
        }
      }
    }
    extent = std::max(extent, slots[i].offset + rounded(slots[i].room()));
  }
  return slots;
}

// A program that follows a plan more or less, with contents that the device checks.
class Program {
 public:
  Program(Arena& arena, FakeDevice& device, std::size_t streams, std::uint64_t seed)
      : arena_(arena), device_(device), streams_(streams), random_(seed), held_(arena.size() / kAlignment, false) {}

  std::uint64_t operations = 0;
  std::uint64_t native = 0;

  // One step; in `wild` of 1,000 events it does something else than the plan.
  void step(const std::vector<Slot>& slots, unsigned wild) {
    arena_.begin_step();
    std::vector<std::pair<std::uint64_t, std::size_t>> ends;
    for (std::size_t i = 0; i < slots.size(); ++i) {
      while (!ends.empty() && ends.front().first <= slots[i].lower) free_planned(ends, wild);
      if (random_() % 1000 < wild) misbehave();
      if (random_() % 1000 < wild) continue;  // a request that does not come
      allocate(size_of(slots[i]), random_() % 1000 < wild ? random_() % streams_ : slots[i].stream, i);
      ends.emplace_back(slots[i].upper, i);
      for (std::size_t at = ends.size() - 1; at > 0 && ends[at].first < ends[at - 1].first; --at) {
        std::swap(ends[at], ends[at - 1]);
      }
      device_.run_some();
    }
    while (!ends.empty()) free_planned(ends, wild);
    if (random_() % 4 != 0) arena_.end_step();
  }

  void free_all() {
    while (!live_.empty()) free_at(live_.size() - 1);
  }

 private:
  std::uint64_t size_of(const Slot& slot) {
    return slot.most == 0 ? slot.size : slot.least + random_() % (slot.most - slot.least + 1);
  }

  struct Tensor {
    std::uint64_t address, end;
    std::uint32_t tag;
    Stream stream;
    std::size_t slot;
  };

  void allocate(std::uint64_t bytes, Stream stream, std::size_t slot) {
    ++operations;
    const std::uint64_t address = arena_.take(bytes, stream);
    if (address == 0) {
      ++native;
      return;
    }
    const Tensor tensor{address, address + rounded(bytes), ++tag_, stream, slot};
    for (auto at = tensor.address; at < tensor.end; at += kAlignment) {
      CHECK(!held_.at((at - kBase) / kAlignment));
      held_[(at - kBase) / kAlignment] = true;
    }
    device_.fill(stream, tensor.address - kBase, tensor.end - kBase, tensor.tag);
    live_.push_back(tensor);
    if (random_() % 16 == 0) use_elsewhere(live_.back());
  }

  // Another stream waits for the owner, reads, and is noted: what record_stream is for.
  void use_elsewhere(const Tensor& tensor) {
    const Stream other = random_() % streams_;
    const memo_arena::Event event = device_.record(tensor.stream);
    if (event == 0) return;
    if (device_.wait(other, event)) {
      device_.check(other, tensor.address - kBase, tensor.end - kBase, tensor.tag);
      CHECK(arena_.note(tensor.address, other));
      ++operations;
    }
    device_.release(event);
  }

  void free_at(std::size_t at) {
    ++operations;
    const Tensor tensor = live_[at];
    device_.check(tensor.stream, tensor.address - kBase, tensor.end - kBase, tensor.tag);
    CHECK(arena_.begin_of(tensor.end - 1) == tensor.address);
    CHECK(arena_.give(tensor.address).ours);
    CHECK(!arena_.give(tensor.address).ours);
    for (auto cell = tensor.address; cell < tensor.end; cell += kAlignment) held_[(cell - kBase) / kAlignment] = false;
    live_[at] = live_.back();
    live_.pop_back();
  }

  void free_planned(std::vector<std::pair<std::uint64_t, std::size_t>>& ends, unsigned wild) {
    const std::size_t slot = ends.front().second;
    ends.erase(ends.begin());
    if (random_() % 1000 < wild) return;  // held for longer
    for (std::size_t at = 0; at < live_.size(); ++at) {
      if (live_[at].slot == slot) return free_at(at);
    }
  }

  void misbehave() {
    switch (random_() % 5) {
      case 0:
        return allocate(1 + random_() % (kAlignment * 8), random_() % streams_, SIZE_MAX);
      case 1:
        if (!live_.empty()) free_at(random_() % live_.size());
        return;
      case 2:
        return device_.capture(random_() % streams_, random_() % 3 == 0);
      case 3:
        for (Stream stream = 0; stream < streams_; ++stream) device_.capture(stream, false);
        return;
      default:
        if (random_() % 20 == 0) free_all();
    }
  }

  Arena& arena_;
  FakeDevice& device_;
  const std::size_t streams_;
  std::mt19937_64 random_;
  std::vector<bool> held_;
  std::vector<Tensor> live_;
  std::uint32_t tag_ = 0;
};

}  // namespace memo_test

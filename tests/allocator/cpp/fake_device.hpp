// A device whose streams are queues that run in any order that events allow, over memory of one number per 512 bytes.
//
// Work is run as late and as mixed up as a real device might, so that a range that is handed on too early is written to
// by its former user while the next one has it, and a check of its contents shows that.
#pragma once

#include <cstdint>
#include <deque>
#include <random>
#include <unordered_map>
#include <vector>

#include "device.hpp"
#include "plan.hpp"

namespace memo_test {

using memo_arena::Event;
using memo_arena::kAlignment;
using memo_arena::Stream;

class FakeDevice : public memo_arena::Device {
 public:
  FakeDevice(std::size_t streams, std::uint64_t bytes, std::uint64_t seed)
      : queues_(streams), captured_(streams, false), cells_(bytes / kAlignment, 0), random_(seed) {}

  Event record(Stream stream) override {
    if (captured_.at(stream)) return 0;
    events_[++last_] = {};
    queues_[stream].push_back({Kind::record, 0, 0, 0, last_});
    return last_;
  }

  bool wait(Stream stream, Event event) override {
    if (captured_.at(stream)) return false;
    if (ignores_waits) return true;
    ++events_.at(event).waiting;
    queues_[stream].push_back({Kind::wait, 0, 0, 0, event});
    return true;
  }

  void release(Event event) override {
    events_.at(event).released = true;
    drop_if_over(event);
  }

  // Work: `stream` writes `tag` to all of [begin, end), or compares.
  void fill(Stream stream, std::uint64_t begin, std::uint64_t end, std::uint32_t tag) {
    queues_[stream].push_back({Kind::fill, begin / kAlignment, end / kAlignment, tag, 0});
  }
  void check(Stream stream, std::uint64_t begin, std::uint64_t end, std::uint32_t tag) {
    queues_[stream].push_back({Kind::check, begin / kAlignment, end / kAlignment, tag, 0});
  }

  // Runs some of what may run.
  void run_some() {
    for (int turns = static_cast<int>(random_() % 6); turns > 0; --turns) {
      auto& queue = queues_[random_() % queues_.size()];
      for (int count = static_cast<int>(random_() % 8); count > 0 && runs(queue); --count) {
      }
    }
  }

  // Runs everything; false where streams wait for each other for ever.
  bool run_all() {
    bool moved = true;
    while (moved) {
      moved = false;
      for (auto& queue : queues_) {
        while (runs(queue)) moved = true;
      }
    }
    for (const auto& queue : queues_) {
      if (!queue.empty()) return false;
    }
    return true;
  }

  void capture(Stream stream, bool on) { captured_.at(stream) = on; }
  std::size_t num_events() const { return events_.size(); }

  std::uint64_t corrupt = 0;  // cells that a check found with another tag
  bool ignores_waits = false;

 private:
  enum class Kind { fill, check, record, wait };
  struct Work {
    Kind kind;
    std::uint64_t begin, end;
    std::uint32_t tag;
    Event event;
  };
  struct State {
    bool done = false;
    bool released = false;
    int waiting = 0;
  };

  bool runs(std::deque<Work>& queue) {
    if (queue.empty()) return false;
    const Work work = queue.front();
    if (work.kind == Kind::wait && !events_.at(work.event).done) return false;
    queue.pop_front();
    switch (work.kind) {
      case Kind::fill:
        for (auto at = work.begin; at < work.end; ++at) cells_[at] = work.tag;
        break;
      case Kind::check:
        for (auto at = work.begin; at < work.end; ++at) corrupt += cells_[at] != work.tag;
        break;
      case Kind::record:
        events_.at(work.event).done = true;
        drop_if_over(work.event);
        break;
      case Kind::wait:
        --events_.at(work.event).waiting;
        drop_if_over(work.event);
        break;
    }
    return true;
  }

  void drop_if_over(Event event) {
    const State& state = events_.at(event);
    if (state.done && state.released && state.waiting == 0) events_.erase(event);
  }

  std::vector<std::deque<Work>> queues_;
  std::vector<bool> captured_;
  std::vector<std::uint32_t> cells_;
  std::unordered_map<Event, State> events_;
  Event last_ = 0;
  std::mt19937_64 random_;
};

}  // namespace memo_test

// The arena on a fake device: what it serves, what it leaves, and that no byte is ever in two hands.
//
//     arena_test [OPERATIONS]      exits with 0, or says what does not hold
//     arena_test --drive           a plan and requests from the standard input; prints what was served in each step

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "arena.hpp"
#include "program.hpp"

namespace {

using namespace memo_test;  // NOLINT: this is the program

// Random plans, followed badly: contents hold, plans are switched and taken away while tensors live.
std::uint64_t torture(std::uint64_t operations, bool ignores_waits, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const std::size_t streams = 3;
  std::uint64_t done = 0, served = 0, requests = 0, waits = 0, jumps = 0, corrupt = 0;
  while (done < operations && corrupt == 0) {
    std::vector<std::vector<Slot>> steps;
    std::vector<std::shared_ptr<const Plan>> plans;
    std::uint64_t size = 0;
    for (int i = 0; i < 3; ++i) {
      std::uint64_t extent = 0;
      steps.push_back(random_step(random, 40 + random() % 160, streams, extent));
      size = std::max(size, extent);
    }
    for (const auto& step : steps) plans.push_back(std::make_shared<const Plan>(step, size));
    FakeDevice device(streams, size, random());
    device.ignores_waits = ignores_waits;
    {
      Arena arena(device, kBase, size);
      Program program(arena, device, streams, random());
      for (int i = 0; i < 60; ++i) {
        const std::size_t which = random() % 3;
        if (random() % 16 == 0) {
          arena.disable();
        } else {
          arena.enable(plans[which]);
        }
        program.step(steps[which], i % 3 == 0 ? 0 : random() % 60);
      }
      program.free_all();
      CHECK(device.run_all());
      CHECK(arena.statistics().live == 0 && arena.statistics().live_bytes == 0);
      const auto total = arena.statistics().total;
      CHECK(total.requests == total.served + total.resident + total.outside + total.other_stream + total.unplanned +
                                  total.occupied + total.unordered);
      CHECK(total.requests - total.served == program.native);
      done += program.operations;
      served += total.served;
      requests += total.requests;
      waits += total.waits;
      jumps += total.jumps;
      arena.settle();
    }
    CHECK(device.num_events() == 0);  // all were released
    corrupt += device.corrupt;
  }
  if (!ignores_waits) {
    CHECK(served * 2 > requests && waits > 0 && jumps > 0);
    std::fprintf(stderr, "%llu operations, %.1f %% of requests served, %llu waits, %llu jumps\n",
                 static_cast<unsigned long long>(done), 100.0 * served / requests,
                 static_cast<unsigned long long>(waits), static_cast<unsigned long long>(jumps));
  }
  return corrupt;
}

void a_step_as_planned_is_served_whole() {
  std::mt19937_64 random(5);
  std::uint64_t extent = 0;
  const auto slots = random_step(random, 400, 1, extent);
  FakeDevice device(1, extent, 1);
  Arena arena(device, kBase, extent);
  arena.enable(std::make_shared<const Plan>(slots, extent));
  for (int step = 0; step < 4; ++step) {
    arena.begin_step();
    std::vector<std::pair<std::uint64_t, std::uint64_t>> live;
    for (const Slot& slot : slots) {
      for (auto at = live.begin(); at != live.end();) {
        if (at->first <= slot.lower) {
          CHECK(arena.give(at->second).ours);
          at = live.erase(at);
        } else {
          ++at;
        }
      }
      CHECK(arena.take(slot.size, 0) == kBase + slot.offset);
      live.emplace_back(slot.upper, kBase + slot.offset);
    }
    for (const auto& one : live) arena.give(one.second);
    arena.end_step();
    const auto counts = arena.statistics().last_step;
    CHECK(counts.requests == slots.size() && counts.served == slots.size());
    CHECK(counts.displaced == 0 && counts.waits == 0);
  }
  CHECK(arena.statistics().steps == 4 && arena.statistics().peak_bytes <= extent);
}

// Slots that never collide: only matching is looked at.
std::vector<Slot> in_a_row(const std::vector<std::uint64_t>& cells) {
  std::vector<Slot> slots;
  std::uint64_t offset = 0;
  for (std::size_t i = 0; i < cells.size(); ++i) {
    slots.push_back({2 * i, 2 * i + 1, cells[i] * kAlignment, offset, 0});
    offset += cells[i] * kAlignment;
  }
  return slots;
}

// What of `asked` (in cells) is not served.
std::vector<std::size_t> missed(const std::vector<std::uint64_t>& planned, const std::vector<std::uint64_t>& asked) {
  Quiet device;
  const auto slots = in_a_row(planned);
  const std::uint64_t size = slots.back().offset + slots.back().size;
  Arena arena(device, kBase, size);
  arena.enable(std::make_shared<const Plan>(slots, size));
  arena.begin_step();
  std::vector<std::size_t> found;
  for (std::size_t i = 0; i < asked.size(); ++i) {
    if (arena.take(asked[i] * kAlignment, 0) == 0) found.push_back(i);
  }
  return found;
}

void deviations_cost_little() {
  using Sizes = std::vector<std::uint64_t>;
  using Places = std::vector<std::size_t>;
  Sizes plan;
  for (std::uint64_t i = 0; i < 100; ++i) plan.push_back(1 + i * 37 % 101);
  CHECK(missed(plan, plan).empty());
  Sizes extra = plan;
  extra.insert(extra.begin() + 50, 200);
  CHECK(missed(plan, extra) == Places{50});
  Sizes fewer = plan;
  fewer.erase(fewer.begin() + 50, fewer.begin() + 54);
  CHECK(missed(plan, fewer).empty());
  Sizes far = plan;
  far.erase(far.begin() + 30, far.begin() + 80);  // the fourth in a row shows the place
  CHECK((missed(plan, far) == Places{30, 31, 32}));
  Sizes swapped = plan;
  std::swap(swapped[10], swapped[12]);
  CHECK(missed(plan, swapped).empty());
  Sizes same(40, 3);  // equal sizes tell nothing: no jump, and all are served
  CHECK(missed(same, same).empty());
  CHECK(missed(plan, Sizes(10, 300)).size() == 10);
}

// Slots of which every one named in `open` may be of half to `more` times its size, in what `asked` (in cells) asks for.
struct Loose {
  std::vector<std::size_t> missed;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> misfits;
};

Loose loosely(const std::vector<std::uint64_t>& planned, const std::vector<std::size_t>& open,
              const std::vector<std::uint64_t>& asked) {
  auto slots = in_a_row(planned);
  for (const std::size_t at : open) {
    slots[at].least = slots[at].size / 2;
    slots[at].most = slots[at].size + slots[at].size / 2;
  }
  std::uint64_t size = 0;
  for (Slot& slot : slots) {
    slot.offset = size;
    size += rounded(slot.room());
  }
  Quiet device;
  Arena arena(device, kBase, size);
  arena.enable(std::make_shared<const Plan>(slots, size));
  Loose found;
  arena.begin_step();
  for (std::size_t i = 0; i < asked.size(); ++i) {
    const std::uint64_t address = arena.take(asked[i] * kAlignment, 0);
    if (address == 0) found.missed.push_back(i);
    CHECK(address == 0 || arena.look(address).bytes == asked[i] * kAlignment);
  }
  CHECK(arena.misfits().empty());  // of the last whole step
  arena.end_step();
  for (const auto& one : arena.misfits()) found.misfits.emplace_back(one.slot, one.bytes / kAlignment);
  return found;
}

void sizes_that_are_not_certain_are_served_where_there_is_room() {
  using Misfits = std::vector<std::pair<std::uint64_t, std::uint64_t>>;
  using Places = std::vector<std::size_t>;
  std::vector<std::uint64_t> plan;
  std::vector<std::size_t> all;
  for (std::uint64_t i = 0; i < 60; ++i) {
    plan.push_back(1000 + i * 37 % 101);
    all.push_back(i);
  }
  auto padded = plan;
  padded[20] = 1499;
  padded[21] = 700;
  padded[40] = 1203;
  auto found = loosely(plan, {20, 21, 40}, padded);
  CHECK(found.missed.empty());
  CHECK((found.misfits == Misfits{{20, 1499}, {21, 700}, {40, 1203}}));
  found = loosely(plan, all, padded);
  CHECK(found.missed.empty() && found.misfits.size() == 3);
  // Without room they are not served, and what they were is known when the next one comes.
  found = loosely(plan, {}, padded);
  CHECK((found.missed == Places{20, 21, 40}));
  CHECK((found.misfits == Misfits{{20, 1499}, {21, 700}, {40, 1203}}));
  // One that does not come, before one that has another size.
  auto fewer = padded;
  fewer.erase(fewer.begin() + 39);
  found = loosely(plan, {40}, fewer);
  CHECK((found.missed == Places{20, 21}));
  CHECK((found.misfits == Misfits{{20, 1499}, {21, 700}, {40, 1203}}));
  // One on top takes a place that is not its own, and costs the one whose that is; nothing is said of either.
  auto extra = plan;
  extra.insert(extra.begin() + 30, 1200);
  found = loosely(plan, all, extra);
  CHECK((found.missed == Places{31}));
  CHECK(found.misfits.empty());
}

// A request of another size than planned may look like one that is planned a little later, and that one's like the next of
// its size: a chain of wrong guesses, which the first row that stands as planned ends.
void a_wrong_guess_does_not_go_on() {
  using Misfits = std::vector<std::pair<std::uint64_t, std::uint64_t>>;
  std::vector<std::uint64_t> plan;
  for (std::uint64_t i = 0; i < 200; ++i) plan.push_back(i % 5 == 4 ? 2000 : 2001 + i * 37 % 101);
  auto asked = plan;
  asked[50] = 2000;
  const auto found = loosely(plan, {}, asked);
  CHECK(found.missed.size() <= 2);
  CHECK((found.misfits == Misfits{{50, 2000}}));
  // A row that stands elsewhere too says nothing where all was as planned until then.
  auto twice = plan;
  std::copy(plan.begin() + 20, plan.begin() + 23, twice.begin() + 120);
  asked = twice;
  asked[123] = plan[23];
  CHECK(loosely(twice, {}, asked).missed == std::vector<std::size_t>{123});
}

// Small requests that come on top look like planned ones, which are found ahead; large ones go on as planned.
void small_requests_on_top_cost_no_large_ones() {
  std::vector<std::uint64_t> plan;
  for (std::uint64_t i = 0; i < 40; ++i) {
    plan.push_back(1 + memo_arena::kSmall / kAlignment + i);
    plan.push_back(1);
  }
  auto asked = plan;
  asked.insert(asked.begin() + 20, 15, 1);
  std::uint64_t large = 0;
  for (const std::size_t at : missed(plan, asked)) large += asked[at] > 1;
  CHECK(large == 0);
}

// What outlives the step has its place in the order, and no bytes.
void residents_are_left_in_their_place() {
  Quiet device;
  const std::uint64_t size = 4 * kAlignment;
  const std::vector<Slot> slots{{0, 1, 512, 0, 0}, {1, 2, 512, memo_arena::kNative, 0}, {2, 3, 512, 512, 0}};
  Arena arena(device, kBase, size);
  arena.enable(std::make_shared<const Plan>(slots, size));
  for (int step = 0; step < 2; ++step) {
    arena.begin_step();
    CHECK(arena.take(512, 0) == kBase);
    CHECK(arena.take(512, 0) == 0);
    CHECK(arena.take(512, 0) == kBase + 512);
    CHECK(arena.give(kBase).ours && arena.give(kBase + 512).ours);
  }
  CHECK(arena.statistics().total.resident == 2 && arena.statistics().total.unplanned == 0);
  const std::vector<Slot> none{{0, 1, 512, memo_arena::kNative, 0}};
  try {
    Plan plan(none, size);
    CHECK(!"a plan of nothing was taken");
  } catch (const std::invalid_argument&) {
  }
}

void what_is_not_planned_is_left() {
  Quiet device;
  const std::vector<Slot> slots{{0, 3, 1000, 0, 7}, {1, 2, 512, 1024, 7}};
  Arena arena(device, kBase, 2048);
  CHECK(arena.take(1000, 7) == 0);  // no plan
  arena.enable(std::make_shared<const Plan>(slots, 2048));
  CHECK(arena.take(1000, 7) == 0);  // no step
  arena.begin_step();
  CHECK(arena.take(1000, 8) == 0);
  CHECK(arena.take(1024, 7) == kBase);
  CHECK(arena.begin_of(kBase + 1023) == kBase && arena.begin_of(kBase + 1024) == 0);
  arena.begin_step();
  CHECK(arena.take(1000, 7) == 0);  // still in use
  CHECK(arena.take(512, 7) == kBase + 1024);
  CHECK(!arena.give(kBase + 512).ours && !arena.give(kBase - 512).ours && !arena.note(kBase + 512, 1));
  const auto ranges = arena.ranges();
  CHECK(ranges.size() == 3 && ranges[0].live && ranges[1].live && !ranges[2].live && ranges[2].end == kBase + 2048);
  CHECK(arena.give(kBase).requested == 1024 && arena.give(kBase + 1024).ours);
  const auto counts = arena.statistics().total;
  CHECK(counts.outside == 2 && counts.other_stream == 1 && counts.occupied == 1 && counts.served == 2);
  arena.disable();
  arena.begin_step();
  CHECK(arena.take(1000, 7) == 0);
}

void refused(const std::vector<Slot>& slots, std::uint64_t capacity, const std::string& part) {
  try {
    Plan(slots, capacity);
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()).find(part) != std::string::npos);
    return;
  }
  CHECK(!"a plan that cannot be was taken");
}

void plans_that_cannot_be_are_refused() {
  refused({}, 1024, "places nothing");
  refused({{0, 1, 0, 0, 0}}, 1024, "no bytes");
  refused({{1, 1, 8, 0, 0}}, 1024, "ends before");
  refused({{0, 1, 8, 100, 0}}, 1024, "multiple of 512");
  refused({{0, 1, 513, 512, 0}}, 1024, "behind the arena");
  refused({{0, 1, 8, 512, 0, 8, 513}}, 1024, "behind the arena");
  refused({{0, 1, 8, 512, 0, 8, ~0ULL}}, 1024, "behind the arena");
  refused({{0, 1, 8, 0, 0, 9, 10}}, 1024, "not between");
  refused({{0, 1, 8, 0, 0, 1, 7}}, 1024, "not between");
  refused({{0, 4, 8, 0, 0, 8, 600}, {1, 2, 8, 512, 0}}, 2048, "slot 1 shares bytes with slot 0");
  refused({{0, 4, 8, 512, 0}, {1, 2, 8, 0, 0, 8, 600}}, 2048, "slot 1 shares bytes with slot 0");
  refused({{0, 1, ~0ULL, 512, 0}}, 1024, "behind the arena");
  refused({{0, 1, 8, ~0ULL - 511, 0}}, 1024, "behind the arena");
  refused({{3, 4, 8, 0, 0}, {1, 2, 8, 0, 0}}, 1024, "begins before");
  refused({{0, 4, 600, 0, 0}, {1, 2, 8, 512, 0}}, 2048, "slot 1 shares bytes with slot 0");
  refused({{0, 4, 8, 512, 0}, {1, 2, 600, 0, 1}}, 2048, "slot 1 shares bytes with slot 0");
  Plan({{0, 1, 600, 0, 0}, {1, 2, 8, 512, 0}}, 2048);  // one after the other is fine
}

void bytes_are_handed_on_between_streams_only_in_order() {
  FakeDevice device(2, 1024, 3);
  {
    Arena arena(device, kBase, 1024);
    arena.enable(std::make_shared<const Plan>(std::vector<Slot>{{0, 1, 1024, 0, 0}, {2, 3, 1024, 0, 1}}, 1024));
    for (int step = 0; step < 2; ++step) {
      arena.begin_step();
      CHECK(arena.take(1024, 0) == kBase);
      CHECK(arena.give(kBase).ours);
      device.capture(0, step == 0);  // nothing can be recorded there
      CHECK(arena.take(1024, 1) == (step == 0 ? 0 : kBase));
      device.capture(0, false);
      if (step == 1) CHECK(arena.give(kBase).ours);
    }
    CHECK(arena.statistics().total.unordered == 1 && arena.statistics().total.waits == 1);
    CHECK(device.run_all());
  }
  CHECK(device.num_events() == 0);
}

// Many threads: every byte has one owner at a time, and nothing is lost.
void threads(std::uint64_t rounds) {
  std::mt19937_64 random(11);
  std::uint64_t extent = 0;
  const auto slots = random_step(random, 120, 4, extent);
  Quiet device;
  Arena arena(device, kBase, extent);
  const auto plan = std::make_shared<const Plan>(slots, extent);
  std::vector<std::atomic<int>> owners(extent / kAlignment);
  std::vector<std::thread> workers;
  std::atomic<std::uint64_t> served{0};
  for (int worker = 0; worker < 4; ++worker) {
    workers.emplace_back([&, worker] {
      std::mt19937_64 own(worker);
      for (std::uint64_t round = 0; round < rounds; ++round) {
        if (own() % 64 == 0) arena.enable(plan);
        if (own() % 64 == 0) arena.begin_step();
        if (own() % 4096 == 0) arena.disable();
        const Slot& slot = slots[own() % slots.size()];
        const std::uint64_t address = arena.take(slot.size, slot.stream);
        if (own() % 128 == 0) arena.ranges();
        if (address == 0) continue;
        ++served;
        for (auto at = address; at < address + slot.size; at += kAlignment) {
          CHECK(owners[(at - kBase) / kAlignment].exchange(1 + worker) == 0);
        }
        CHECK(arena.note(address, own() % 4));
        for (auto at = address; at < address + slot.size; at += kAlignment) owners[(at - kBase) / kAlignment] = 0;
        CHECK(arena.give(address).ours);
      }
    });
  }
  for (auto& worker : workers) worker.join();
  CHECK(served > 0 && arena.statistics().live == 0 && arena.statistics().total.served == served);
}

// Lines: "arena SIZE", "slot LOWER UPPER SIZE OFFSET STREAM", "loose" as "slot" with LEAST and MOST, "begin",
// "alloc ID SIZE STREAM", "free ID", "end", and "misfits": bytes, those that were served, and slots with their true sizes.
int drive() {
  Quiet device;
  std::unique_ptr<Arena> arena;
  std::vector<Slot> slots;
  std::map<std::uint64_t, std::uint64_t> live;
  std::string what;
  std::uint64_t id, size, stream;
  while (std::cin >> what) {
    if (what == "arena") {
      std::cin >> size;
      arena = std::make_unique<Arena>(device, kBase, size);
    } else if (what == "slot") {
      Slot slot{};
      std::cin >> slot.lower >> slot.upper >> slot.size >> slot.offset >> slot.stream;
      slots.push_back(slot);
    } else if (what == "loose") {
      Slot slot{};
      std::cin >> slot.lower >> slot.upper >> slot.size >> slot.offset >> slot.stream >> slot.least >> slot.most;
      slots.push_back(slot);
    } else if (what == "misfits") {
      std::cout << arena->statistics().last_step.bytes << ' ' << arena->statistics().last_step.served_bytes;
      for (const auto& one : arena->misfits()) std::cout << ' ' << one.slot << ' ' << one.bytes;
      std::cout << '\n';
    } else if (what == "begin") {
      arena->enable(std::make_shared<const Plan>(slots, arena->size()));
      arena->begin_step();
    } else if (what == "alloc") {
      std::cin >> id >> size >> stream;
      if (const std::uint64_t address = arena->take(size, stream)) live[id] = address;
    } else if (what == "free") {
      std::cin >> id;
      const auto found = live.find(id);
      if (found == live.end()) continue;
      CHECK(arena->give(found->second).ours);
      live.erase(found);
    } else if (what == "end") {
      arena->end_step();
      const auto counts = arena->statistics().last_step;
      std::cout << counts.requests << ' ' << counts.served << ' ' << counts.displaced << ' ' << counts.unplanned << ' '
                << counts.occupied << ' ' << arena->statistics().peak_bytes << '\n';
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--drive") return drive();
  const std::uint64_t operations = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 200000;
  a_step_as_planned_is_served_whole();
  deviations_cost_little();
  a_wrong_guess_does_not_go_on();
  sizes_that_are_not_certain_are_served_where_there_is_room();
  small_requests_on_top_cost_no_large_ones();
  residents_are_left_in_their_place();
  what_is_not_planned_is_left();
  plans_that_cannot_be_are_refused();
  bytes_are_handed_on_between_streams_only_in_order();
  threads(operations / 100);
  CHECK(torture(operations, false, 17) == 0);
  CHECK(torture(200000, true, 23) > 0);  // this test can fail: without waits, contents are lost
  std::puts("ok");
  return 0;
}

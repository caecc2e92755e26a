#include "interface.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "allocator.hpp"

namespace {

using namespace memo_arena;  // NOLINT: this file is the border

// memo_runtime/allocator/library.py knows the same numbers.
enum Status : std::int32_t { ok = 0, bug = 1, invalid = 2, no_memory = 3, other_torch = 4, unusable = 5 };

std::string& last_error() {
  thread_local std::string text;
  return text;
}

std::int32_t failed(Status status, std::string text) {
  last_error() = std::move(text);
  return status;
}

template <typename Body>
std::int32_t status_of(Body&& body) {
  try {
    return body();
  } catch (const std::invalid_argument& error) {
    return failed(invalid, error.what());
  } catch (const c10::OutOfMemoryError& error) {
    return failed(no_memory, error.what_without_backtrace());
  } catch (const c10::Error& error) {
    return failed(unusable, error.what_without_backtrace());
  } catch (const std::exception& error) {
    return failed(bug, error.what());
  }
}

template <typename Body>
std::int32_t on(std::int32_t device, Body&& body) {
  return status_of([&]() -> std::int32_t {
    PlannedAllocator* allocator = installed();
    if (allocator == nullptr) return failed(unusable, "the planned allocator is not installed");
    body(*allocator, allocator->state(device));
    return ok;
  });
}

constexpr std::size_t kStatistics = sizeof(Statistics) / sizeof(std::uint64_t);

}  // namespace

#define MEMO_EXPORT extern "C" __attribute__((visibility("default")))

MEMO_EXPORT std::int32_t memo_alloc_torch(void) { return MEMO_TORCH; }

MEMO_EXPORT std::int32_t memo_alloc_interface_version(void) { return MEMO_ALLOC_INTERFACE_VERSION; }

MEMO_EXPORT std::int64_t memo_alloc_error(char* text, std::int64_t size) {
  const std::string& from = last_error();
  if (size > 0) {
    const auto count = std::min<std::size_t>(from.size(), static_cast<std::size_t>(size) - 1);
    std::memcpy(text, from.data(), count);
    text[count] = '\0';
  }
  return static_cast<std::int64_t>(from.size());
}

MEMO_EXPORT std::int32_t memo_alloc_install(std::int32_t torch) {
  return status_of([&]() -> std::int32_t {
    if (torch != MEMO_TORCH) {
      return failed(other_torch, "built for torch " + std::to_string(MEMO_TORCH / 1000) + "." +
                                     std::to_string(MEMO_TORCH % 1000) + ", and " + std::to_string(torch / 1000) + "." +
                                     std::to_string(torch % 1000) + " is running");
    }
    install();
    return ok;
  });
}

MEMO_EXPORT std::int32_t memo_alloc_arm(std::int32_t device, const std::uint64_t* slots, std::uint64_t count,
                                        std::uint64_t size) {
  static_assert(sizeof(Slot) == 7 * sizeof(std::uint64_t), "seven numbers each");
  return on(device, [&](PlannedAllocator& allocator, DeviceState&) {
    const auto* first = reinterpret_cast<const Slot*>(slots);
    allocator.arm(device, std::vector<Slot>(first, first + count), size);
  });
}

MEMO_EXPORT std::int32_t memo_alloc_disarm(std::int32_t device, std::uint64_t* alive) {
  return on(device, [&](PlannedAllocator& allocator, DeviceState&) { *alive = allocator.disarm(device); });
}

MEMO_EXPORT std::int32_t memo_alloc_begin_step(std::int32_t device) {
  return on(device, [](PlannedAllocator&, DeviceState& state) {
    if (Ground* ground = state.grounds[0].load()) ground->arena.begin_step();
  });
}

MEMO_EXPORT std::int32_t memo_alloc_end_step(std::int32_t device) {
  return on(device, [](PlannedAllocator&, DeviceState& state) {
    if (Ground* ground = state.grounds[0].load()) ground->arena.end_step();
  });
}

MEMO_EXPORT std::int32_t memo_alloc_statistics(std::int32_t device, std::uint64_t* values, std::int64_t count) {
  return on(device, [&](PlannedAllocator&, DeviceState& state) {
    if (count != static_cast<std::int64_t>(kStatistics + 4)) throw std::invalid_argument("another number of statistics");
    Statistics found{};
    std::uint64_t size = 0;
    if (const Ground* ground = state.grounds[0].load()) {
      found = ground->arena.statistics();
      size = ground->arena.size();
    }
    std::memcpy(values, &found, sizeof(found));
    values[kStatistics] = size;
    values[kStatistics + 1] = state.bypassed;
    values[kStatistics + 2] = state.given_back;
    values[kStatistics + 3] = state.armed ? 1 : 0;
  });
}

MEMO_EXPORT std::int32_t memo_alloc_misfits(std::int32_t device, std::uint64_t* values, std::uint64_t capacity,
                                            std::uint64_t* count) {
  static_assert(sizeof(Misfit) == 2 * sizeof(std::uint64_t), "two numbers each");
  return on(device, [&](PlannedAllocator&, DeviceState& state) {
    std::vector<Misfit> found;
    if (const Ground* ground = state.grounds[0].load()) found = ground->arena.misfits();
    *count = std::min<std::uint64_t>(found.size(), capacity);
    if (*count > 0) std::memcpy(values, found.data(), *count * sizeof(Misfit));
  });
}

MEMO_EXPORT std::int32_t memo_alloc_holds(std::int32_t device, std::uint64_t address, std::int32_t* holds) {
  return on(device, [&](PlannedAllocator&, DeviceState& state) {
    const Ground* ground = state.around(address);
    *holds = ground != nullptr && ground->arena.begin_of(address) != 0 ? 1 : 0;
  });
}

// The core through its C interface, built with sanitizers: random programs from several threads, misuse, refusals.
//
//     core_test FAKE_DRIVER       exits with 0, or says what does not hold

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "c_interface.h"
#include "failure.hpp"
#include "free_list.hpp"

namespace {

using memo_core::Status;

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      char text[256] = {};                                                     \
      memo_core_error(text, sizeof(text));                                     \
      std::fprintf(stderr, "%d: %s (last error: %s)\n", __LINE__, #condition, text); \
      std::exit(1);                                                            \
    }                                                                          \
  } while (false)

std::string driver_path;

struct Fake {
  std::uint64_t (*alloc)(std::uint64_t, int);
  void (*free)(std::uint64_t);
  void* (*stream)();
  void (*stream_end)(void*);
  void (*synchronize)(void*);
  void (*fill)(void*, std::uint64_t, int, std::uint64_t);
  void (*read)(void*, std::uint64_t, void*, std::uint64_t);
  void (*delay)(int);
  void (*fail_copy)(int);
  void (*register_limit)(std::uint64_t);
  std::uint64_t (*registered_bytes)();
  int (*live)();
} fake;

void open_fake() {
  void* library = dlopen(driver_path.c_str(), RTLD_NOW);
  CHECK(library != nullptr);
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    CHECK(function != nullptr);
  };
  find(fake.alloc, "fake_alloc");
  find(fake.free, "fake_free");
  find(fake.stream, "fake_stream");
  find(fake.stream_end, "fake_stream_end");
  find(fake.synchronize, "fake_synchronize");
  find(fake.fill, "fake_fill");
  find(fake.read, "fake_read");
  find(fake.delay, "fake_delay");
  find(fake.fail_copy, "fake_fail_copy");
  find(fake.register_limit, "fake_register_limit");
  find(fake.registered_bytes, "fake_registered_bytes");
  find(fake.live, "fake_live");
}

std::uint64_t handle(void* stream) { return reinterpret_cast<std::uint64_t>(stream); }
std::uint64_t address(const void* pointer) { return reinterpret_cast<std::uint64_t>(pointer); }
int code(Status status) { return static_cast<int>(status); }

memo_core_slab_info make_slab(std::int64_t device, std::uint64_t size, std::uint64_t chunk = 0) {
  memo_core_slab_info info{};
  CHECK(memo_core_slab_create(device, size, chunk, 3, -1, 0, &info) == 0);
  return info;
}

// Submits through one piece of memory, as memo_runtime packs it, under the next number.
std::int64_t submit(std::int64_t engine, std::int32_t direction, const std::vector<memo_core_copy>& copies,
                    std::uint64_t stream, const char* name) {
  static std::atomic<std::int64_t> last{0};
  const memo_core_request head{engine, ++last, stream, direction, static_cast<std::int32_t>(copies.size())};
  std::vector<std::uint64_t> packed((sizeof(head) + copies.size() * sizeof(memo_core_copy)) / 8);
  std::memcpy(packed.data(), &head, sizeof(head));
  if (!copies.empty()) std::memcpy(packed.data() + sizeof(head) / 8, copies.data(), copies.size() * sizeof(memo_core_copy));
  return memo_core_submit(reinterpret_cast<const memo_core_request*>(packed.data()), name);
}

// First fit against a map of bytes.
void free_list() {
  std::mt19937 random(1);
  for (int round = 0; round < 20; ++round) {
    const std::uint64_t size = 200 + random() % 300;
    memo_core::FreeList list(size);
    std::vector<bool> taken(size, false);
    std::vector<std::pair<std::uint64_t, std::uint64_t>> slots;
    for (int step = 0; step < 300; ++step) {
      if (slots.empty() || random() % 2 == 0) {
        const std::uint64_t want = 1 + random() % 60, alignment = 1u << random() % 5;
        std::int64_t expected = -1;
        for (std::uint64_t start = 0; start + want <= size && expected < 0; start += alignment) {
          bool free = true;
          for (std::uint64_t i = start; i < start + want; ++i) free = free && !taken[i];
          if (free) expected = static_cast<std::int64_t>(start);
        }
        const std::int64_t offset = list.take(want, alignment);
        CHECK(offset == expected);
        if (offset < 0) continue;
        for (std::uint64_t i = 0; i < want; ++i) taken[offset + i] = true;
        slots.emplace_back(offset, want);
      } else {
        const std::size_t which = random() % slots.size();
        for (std::uint64_t i = 0; i < slots[which].second; ++i) taken[slots[which].first + i] = false;
        CHECK(list.give(slots[which].first));
        CHECK(!list.give(slots[which].first));
        slots.erase(slots.begin() + static_cast<std::ptrdiff_t>(which));
      }
    }
    for (const auto& slot : slots) CHECK(list.give(slot.first));
    CHECK(list.in_use() == 0);
    CHECK(list.take(size, 1) == 0);
  }
}

// Several threads copy their own memory out and in, whole and by rows; the numbers come back.
void threads_copy() {
  std::int64_t engine = 0;
  CHECK(memo_core_engine_create(0, 3, &engine) == 0);
  const memo_core_slab_info slab = make_slab(0, 64 << 20);
  const auto user = [&](int seed) {
    std::mt19937 random(static_cast<unsigned>(seed));
    for (int round = 0; round < 30; ++round) {
      const std::uint64_t height = 1 + random() % 9, width = 1 + random() % 300'000, pitch = width + random() % 50;
      std::vector<std::uint8_t> source(pitch * height), back(pitch * height, 0);
      for (std::size_t i = 0; i < source.size(); i += 1 + i % 97) source[i] = static_cast<std::uint8_t>(random());
      std::int64_t offset = -1;
      CHECK(memo_core_slab_take(slab.slab, width * height, 64, &offset) == 0 && offset >= 0);
      const std::uint64_t host = slab.base + static_cast<std::uint64_t>(offset);
      const auto copy = [&](int direction, std::vector<std::uint8_t>& memory) {
        return submit(engine, direction, {{host, address(memory.data()), width, height, width, pitch}}, 0, "x");
      };
      const std::int64_t out = copy(0, source);
      CHECK(out > 0);
      CHECK(memo_core_wait(engine, out, 0) == 0);
      CHECK(memo_core_wait(engine, out, 0) == code(Status::invalid));
      const std::int64_t in = copy(1, back);
      CHECK(in > 0);
      std::int32_t prevented = 0;
      if (random() % 4 == 0) {
        CHECK(memo_core_cancel(engine, in, 0, &prevented) == 0);
      } else {
        CHECK(memo_core_wait(engine, in, 0) == 0);
      }
      for (std::uint64_t row = 0; row < height && !prevented; ++row) {
        CHECK(std::memcmp(&source[row * pitch], &back[row * pitch], width) == 0);
      }
      CHECK(memo_core_slab_give(slab.slab, &offset) == 0 && offset == -1);
    }
  };
  std::vector<std::thread> users;
  for (int i = 0; i < 4; ++i) users.emplace_back(user, i);
  for (std::thread& one : users) one.join();
  std::int64_t open = -1;
  CHECK(memo_core_engine_num_open(engine, &open) == 0 && open == 0);
  CHECK(memo_core_slab_destroy(slab.slab) == 0);
  CHECK(memo_core_engine_destroy(engine) == 0);
}

// Compute fills, the engine copies out, compute fills again, the engine copies back, compute reads: with slow copies
// and kernels, and a compute stream per thread.
void cuda_orders() {
  fake.delay(300);
  std::int64_t device = 0, engine = 0;
  CHECK(memo_core_device_open(driver_path.c_str(), 0, &device) == 0);
  CHECK(memo_core_engine_create(device, 0, &engine) == 0);
  const std::uint64_t rows = 6, width = 1000, pitch = 1100, size = rows * pitch;
  const memo_core_slab_info slab = make_slab(device, 5 << 20, 2 << 20);
  CHECK(slab.pinned == 1);
  const auto user = [&](int seed) {
    void* compute = fake.stream();
    const std::uint64_t memory = fake.alloc(size, 0);
    std::vector<std::uint8_t> seen(size);
    for (int step = 0; step < 15; ++step) {
      const int value = (seed * 50 + step) % 251;
      std::int64_t offset = -1;
      CHECK(memo_core_slab_take(slab.slab, rows * width, 64, &offset) == 0 && offset >= 0);
      const std::uint64_t host = slab.base + static_cast<std::uint64_t>(offset);
      const auto copy = [&](int direction) {
        return submit(engine, direction, {{host, memory, width, rows, width, pitch}}, handle(compute), "a");
      };
      fake.fill(compute, memory, value, size);
      const std::int64_t out = copy(0);
      CHECK(out > 0 && memo_core_wait(engine, out, handle(compute)) == 0);
      fake.fill(compute, memory, 255, size);
      const std::int64_t in = copy(1);
      CHECK(in > 0 && memo_core_wait(engine, in, handle(compute)) == 0);
      fake.read(compute, memory, seen.data(), size);
      fake.synchronize(compute);
      for (std::uint64_t row = 0; row < rows; ++row) {
        CHECK(seen[row * pitch] == value && seen[row * pitch + width - 1] == value && seen[row * pitch + width] == 255);
      }
      CHECK(memo_core_slab_give(slab.slab, &offset) == 0 && offset == -1);
    }
    fake.free(memory);
    fake.stream_end(compute);
  };
  std::vector<std::thread> users;
  for (int i = 0; i < 3; ++i) users.emplace_back(user, i);
  for (std::thread& one : users) one.join();
  fake.delay(0);
  CHECK(memo_core_engine_destroy(engine) == 0);
  CHECK(memo_core_slab_destroy(slab.slab) == 0);
  CHECK(memo_core_device_close(device) == 0);
  CHECK(fake.registered_bytes() == 0);
  CHECK(fake.live() == 0);
}

// One thread frees slabs and an engine that others still use: they get errors.
void freed_under_use() {
  std::int64_t device = 0, engine = 0;
  CHECK(memo_core_device_open(driver_path.c_str(), 0, &device) == 0);
  CHECK(memo_core_engine_create(device, 0, &engine) == 0);
  std::vector<memo_core_slab_info> slabs;
  for (int i = 0; i < 8; ++i) slabs.push_back(make_slab(device, 1 << 20));
  const auto user = [&](int seed) {
    std::mt19937 random(static_cast<unsigned>(seed));
    void* compute = fake.stream();
    const std::uint64_t memory = fake.alloc(4096, 0);
    for (int i = 0; i < 200; ++i) {
      const auto& slab = slabs[random() % slabs.size()];
      const std::uint64_t host = slab.base + 4096 * static_cast<std::uint64_t>(seed + 1);
      const auto direction = static_cast<std::int32_t>(random() % 2);
      const std::int64_t ticket = submit(engine, direction, {{host, memory, 4096, 1, 4096, 4096}}, handle(compute), "late");
      if (ticket > 0) memo_core_wait(engine, ticket, handle(compute));
      CHECK(ticket > 0 || ticket == -code(Status::out_of_range) || ticket == -code(Status::closed));
    }
    fake.synchronize(compute);
    fake.free(memory);
    fake.stream_end(compute);
  };
  std::vector<std::thread> users;
  for (int i = 0; i < 3; ++i) users.emplace_back(user, i);
  for (const auto& slab : slabs) CHECK(memo_core_slab_close(slab.slab) == 0);
  CHECK(memo_core_engine_destroy(engine) == 0);
  for (std::thread& one : users) one.join();
  for (const auto& slab : slabs) CHECK(memo_core_slab_destroy(slab.slab) == 0);
  CHECK(memo_core_device_close(device) == 0);
  CHECK(fake.registered_bytes() == 0);
  CHECK(fake.live() == 0);
}

void misuse() {
  std::int64_t device = 0, other = 0, engine = 0;
  CHECK(memo_core_device_open("no such library", 0, &device) == code(Status::unavailable));
  CHECK(memo_core_device_open(driver_path.c_str(), 7, &device) == code(Status::wrong_device));
  CHECK(memo_core_device_open(driver_path.c_str(), 0, &device) == 0);
  CHECK(memo_core_engine_create(device, 0, &engine) == 0);
  const memo_core_slab_info slab = make_slab(device, 10'000);
  const memo_core_slab_info plain = make_slab(0, 10'000);
  CHECK(slab.size == 10'000 && slab.mapped == 12'288);
  const std::uint64_t here = fake.alloc(10'000, 0);
  const auto one = [&](std::uint64_t host, std::uint64_t there, std::uint64_t width, std::uint64_t height = 1,
                       std::uint64_t pitch = 0) {
    return submit(engine, 0, {{host, there, width, height, pitch, pitch}}, 0, "m");
  };
  CHECK(one(slab.base, here, 10'001) == -code(Status::out_of_range));
  CHECK(one(slab.base - 1, here, 10) == -code(Status::out_of_range));
  CHECK(one(slab.base, here, 10, 101, 100) == -code(Status::out_of_range));
  CHECK(one(slab.base, here, 10, ~std::uint64_t{0}, 1 << 20) == -code(Status::out_of_range));
  CHECK(one(slab.base, here, 10, 2, 9) == -code(Status::invalid));
  // What the driver refuses belongs to whoever waits for it.
  CHECK(memo_core_wait(engine, one(slab.base, here + 9'000, 2'000), 0) == code(Status::copy_failed));
  CHECK(memo_core_wait(engine, one(slab.base, slab.base, 10), 0) == code(Status::copy_failed));
  CHECK(submit(engine, 7, {{slab.base, here, 10, 1, 10, 10}}, 0, "m") == -code(Status::invalid));
  CHECK(one(plain.base, here, 10) == -code(Status::invalid));
  CHECK(memo_core_wait(engine, 1'000'000'000, 0) == code(Status::invalid));
  CHECK(memo_core_wait(engine + 50, 1, 0) == code(Status::closed));
  const std::int64_t nothing = submit(engine, 1, {}, 0, nullptr);
  CHECK(nothing > 0 && memo_core_wait(engine, nothing, 0) == 0);
  fake.fail_copy(2);
  const std::vector<memo_core_copy> three = {{slab.base, here, 10, 1, 10, 10}, {slab.base + 10, here, 10, 1, 10, 10},
                                   {slab.base + 20, here, 10, 1, 10, 10}};
  const std::int64_t failing = submit(engine, 0, three, 0, "layer 3");
  CHECK(failing > 0 && memo_core_wait(engine, failing, 0) == code(Status::copy_failed));
  char text[200];
  memo_core_error(text, sizeof(text));
  CHECK(std::strstr(text, "'layer 3'") != nullptr && std::strstr(text, "CUDA_ERROR_ILLEGAL_ADDRESS") != nullptr);
  const std::int64_t next = submit(engine, 0, three, 0, "layer 4");
  CHECK(next > 0 && memo_core_wait(engine, next, 0) == 0);
  CHECK(memo_core_slab_close(slab.slab) == 0 && memo_core_slab_close(slab.slab) == 0);
  CHECK(one(slab.base, here, 10) == -code(Status::out_of_range));
  std::int64_t offset = 0;
  CHECK(memo_core_slab_take(slab.slab, 10, 1, &offset) == code(Status::closed));
  CHECK(memo_core_slab_give(plain.slab, &offset) == code(Status::invalid) && offset == 0);
  CHECK(memo_core_slab_destroy(slab.slab) == 0 && memo_core_slab_destroy(slab.slab) == code(Status::closed));
  CHECK(memo_core_slab_destroy(plain.slab) == 0);
  CHECK(memo_core_device_open(driver_path.c_str(), 1, &other) == 0 && memo_core_device_close(other) == 0);
  CHECK(memo_core_engine_destroy(engine) == 0 && memo_core_engine_destroy(engine) == code(Status::closed));
  CHECK(memo_core_device_close(device) == 0);
  fake.free(here);
}

void refused() {
  std::int64_t device = 0;
  CHECK(memo_core_device_open(driver_path.c_str(), 0, &device) == 0);
  fake.register_limit(5 << 20);
  memo_core_slab_info info{};
  CHECK(memo_core_slab_create(device, 9 << 20, 2 << 20, 2, -1, 0, &info) == code(Status::refused));
  CHECK(fake.registered_bytes() == 0);
  CHECK(memo_core_slab_create(device, 9 << 20, 2 << 20, 2, -1, 1, &info) == 0);
  CHECK(info.size == 4 << 20 && info.mapped == info.size && fake.registered_bytes() == info.size);
  char text[200];
  CHECK(memo_core_slab_refusal(info.slab, text, sizeof(text)) == 0 && std::strstr(text, "OUT_OF_MEMORY") != nullptr);
  std::memset(reinterpret_cast<void*>(info.base), 1, info.size);
  CHECK(memo_core_slab_destroy(info.slab) == 0);
  fake.register_limit(~std::uint64_t{0});
  CHECK(memo_core_slab_create(0, std::uint64_t{1} << 60, 0, 1, -1, 0, &info) == code(Status::refused));
  CHECK(memo_core_slab_create(0, 0, 0, 1, -1, 0, &info) == code(Status::invalid));
  CHECK(memo_core_device_close(device) == 0);
  CHECK(fake.live() == 0);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  driver_path = arguments[1];
  open_fake();
  free_list();
  threads_copy();
  cuda_orders();
  freed_under_use();
  misuse();
  refused();
  std::puts("ok");
  return 0;
}

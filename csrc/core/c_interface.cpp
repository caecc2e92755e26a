#include "c_interface.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <new>
#include <string>
#include <utility>

#include "copies.hpp"
#include "cuda_driver.hpp"
#include "cuda_engine.hpp"
#include "failure.hpp"
#include "handles.hpp"
#include "slab.hpp"
#include "thread_engine.hpp"

static_assert(sizeof(memo_core_copy) == sizeof(memo_core::Copy), "one layout on both sides");
static_assert(sizeof(memo_core_request) == 32, "copies lie behind it without a gap, as memo_runtime packs them");

namespace memo_core {
namespace {

// Never destroyed: at the end of the process other libraries may still call in, and the driver may be gone.
struct Everything {
  Handles<CudaDevice> devices{"device"};
  Handles<Slab> slabs{"slab"};
  Handles<Engine> engines{"copy engine"};
  SlabTable table;
  std::mutex mutex;
  std::map<std::string, std::shared_ptr<const CudaDriver>> drivers;
};

Everything& all() {
  static auto* everything = new Everything;
  return *everything;
}

std::string& last_error() {
  thread_local std::string text;
  return text;
}

template <typename Body>
Status guarded(Body&& body) {
  try {
    body();
    return Status::ok;
  } catch (const Failure& failure) {
    last_error() = failure.what();
    return failure.status;
  } catch (const std::bad_alloc&) {
    last_error() = "the process has no more memory";
    return Status::refused;
  } catch (const std::exception& error) {
    last_error() = error.what();
    return Status::bug;
  }
}

template <typename Body>
std::int32_t status_of(Body&& body) {
  return static_cast<std::int32_t>(guarded(std::forward<Body>(body)));
}

std::int64_t put(const std::string& from, char* text, std::int64_t size) {
  if (size > 0) {
    const auto count = std::min<std::size_t>(from.size(), static_cast<std::size_t>(size) - 1);
    std::memcpy(text, from.data(), count);
    text[count] = '\0';
  }
  return static_cast<std::int64_t>(from.size());
}

std::shared_ptr<const CudaDriver> driver(const std::string& path) {
  const std::lock_guard<std::mutex> lock(all().mutex);
  auto& known = all().drivers[path];
  if (known == nullptr) known = CudaDriver::open(path);
  return known;
}

std::shared_ptr<CudaDevice> device_or_none(std::int64_t device) {
  return device == 0 ? nullptr : all().devices.get(device);
}

void close(const std::shared_ptr<Slab>& slab) {
  if (!slab->open()) return;
  all().table.remove(slab);  // from here on no copy begins on it
  for (const auto& engine : all().engines.all()) engine->drain();
  slab->close();
}

Direction checked(std::int32_t direction) {
  if (direction != 0 && direction != 1) throw Failure(Status::invalid, "a direction is 0 (to host) or 1 (to device)");
  return static_cast<Direction>(direction);
}

std::int64_t submit(const memo_core_request& request, const char* name) {
  const Status status = guarded([&] {
    const Direction where = checked(request.direction);
    if (request.count < 0) throw Failure(Status::invalid, "a negative number of copies");
    const auto* copies = reinterpret_cast<const Copy*>(&request + 1);
    const std::shared_ptr<Engine> target = all().engines.get(request.engine);
    Work work;
    work.pieces.reserve(static_cast<std::size_t>(request.count));
    work.ends.reserve(static_cast<std::size_t>(request.count));
    for (std::int32_t i = 0; i < request.count; ++i) {
      plan_copy(copies[i], all().table, work);
      work.ends.push_back(work.pieces.size());
    }
    target->submit(request.ticket, where, std::move(work), request.stream, name ? name : "");
  });
  return status == Status::ok ? request.ticket : -static_cast<std::int64_t>(status);
}

}  // namespace
}  // namespace memo_core

using namespace memo_core;  // NOLINT: this file is the border between the two

std::int32_t memo_core_interface_version(void) { return MEMO_CORE_INTERFACE_VERSION; }

std::int64_t memo_core_error(char* text, std::int64_t size) { return put(last_error(), text, size); }

std::int32_t memo_core_device_open(const char* path, std::int32_t ordinal, std::int64_t* device) {
  return status_of([&] { *device = all().devices.add(std::make_shared<CudaDevice>(driver(path), ordinal)); });
}

std::int32_t memo_core_device_close(std::int64_t device) {
  return status_of([&] { all().devices.take(device); });
}

std::int32_t memo_core_device_numa_node(std::int64_t device, std::int32_t* node) {
  return status_of([&] { *node = all().devices.get(device)->numa_node(); });
}

std::int32_t memo_core_slab_create(std::int64_t device, std::uint64_t size, std::uint64_t chunk, std::int32_t threads,
                                   std::int32_t numa_node, std::int32_t allow_partial, memo_core_slab_info* info) {
  return status_of([&] {
    SlabRequest request;
    request.size = size;
    request.chunk = chunk;
    request.threads = threads;
    request.numa_node = numa_node;
    request.allow_partial = allow_partial != 0;
    request.device = device_or_none(device);
    const std::shared_ptr<Slab> slab = Slab::make(request);
    all().table.add(slab);
    info->base = reinterpret_cast<std::uint64_t>(slab->base());
    info->size = slab->size();
    info->mapped = slab->mapped();
    info->pinned = slab->pinned();
    info->on_node = slab->on_node();
    info->slab = all().slabs.add(slab);
  });
}

std::int32_t memo_core_slab_refusal(std::int64_t slab, char* text, std::int64_t size) {
  return status_of([&] { put(all().slabs.get(slab)->refusal(), text, size); });
}

std::int32_t memo_core_slab_take(std::int64_t slab, std::uint64_t size, std::uint64_t alignment, std::int64_t* offset) {
  return status_of([&] { *offset = all().slabs.get(slab)->take(size, alignment); });
}

std::int32_t memo_core_slab_give(std::int64_t slab, std::int64_t* offset) {
  return status_of([&] {
    all().slabs.get(slab)->give(static_cast<std::uint64_t>(*offset));
    *offset = -1;
  });
}

std::int32_t memo_core_slab_in_use(std::int64_t slab, std::uint64_t* size) {
  return status_of([&] { *size = all().slabs.get(slab)->in_use(); });
}

std::int32_t memo_core_slab_close(std::int64_t slab) {
  return status_of([&] { close(all().slabs.get(slab)); });
}

std::int32_t memo_core_slab_destroy(std::int64_t slab) {
  return status_of([&] { close(all().slabs.take(slab)); });
}

std::int32_t memo_core_engine_create(std::int64_t device, std::int32_t threads, std::int64_t* engine) {
  return status_of([&] {
    std::shared_ptr<Engine> made;
    if (device == 0) {
      made = std::make_shared<ThreadEngine>(threads);
    } else {
      made = std::make_shared<CudaEngine>(all().devices.get(device));
    }
    *engine = all().engines.add(std::move(made));
  });
}

std::int32_t memo_core_engine_destroy(std::int64_t engine) {
  return status_of([&] { all().engines.take(engine)->drain(); });
}

std::int32_t memo_core_engine_drain(std::int64_t engine) {
  return status_of([&] { all().engines.get(engine)->drain(); });
}

std::int32_t memo_core_engine_stream(std::int64_t engine, std::int32_t direction, std::uint64_t* stream) {
  return status_of([&] { *stream = all().engines.get(engine)->stream(checked(direction)); });
}

std::int32_t memo_core_engine_num_open(std::int64_t engine, std::int64_t* count) {
  return status_of([&] { *count = all().engines.get(engine)->num_open(); });
}

std::int64_t memo_core_submit(const memo_core_request* request, const char* name) { return submit(*request, name); }

std::int32_t memo_core_wait(std::int64_t engine, std::int64_t ticket, std::uint64_t stream) {
  return status_of([&] { all().engines.get(engine)->wait(ticket, stream); });
}

std::int32_t memo_core_cancel(std::int64_t engine, std::int64_t ticket, std::uint64_t stream, std::int32_t* prevented) {
  return status_of([&] { *prevented = all().engines.get(engine)->cancel(ticket, stream); });
}

void memo_core_drop(std::int64_t engine, std::int64_t ticket, std::uint64_t stream, const void*) {
  try {
    const std::shared_ptr<Engine> target = all().engines.get(engine);
    if (target->mine()) target->cancel(ticket, stream);
  } catch (const Failure&) {
    // It was used up, or never begun, or its engine has finished it. Nobody is told, nor is a text of others replaced.
  }
}

std::int32_t memo_core_done(std::int64_t engine, std::int64_t ticket, std::int32_t* done) {
  return status_of([&] { *done = all().engines.get(engine)->done(ticket); });
}

// A CUDA driver without a GPU: the functions that the core calls, with streams that are threads.
//
// Device memory is host memory that is known to be a device's. A copy or a wait runs when its stream comes to it, so
// that a missing event wait shows. What a test needs besides is in the fake_ functions: slow streams, work on a
// compute stream, refusals and failures, a wait that is left out.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#define FAKE extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kInvalidValue = 1, kOutOfMemory = 2, kNoContext = 201, kInvalidHandle = 400, kNotReady = 600;

// One record of an event. Who waits, waits for the record that was the last when it was told to; recording again, on
// any stream, changes nothing for it.
struct Mark {
  std::mutex mutex;
  std::condition_variable changed;
  bool reached = false;
};

struct Event {
  std::mutex mutex;
  std::shared_ptr<Mark> last;

  std::shared_ptr<Mark> get() {
    const std::lock_guard<std::mutex> lock(mutex);
    return last;
  }
  void set(std::shared_ptr<Mark> mark) {
    const std::lock_guard<std::mutex> lock(mutex);
    last = std::move(mark);
  }
};

struct Stream {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  bool busy = false, ending = false;
  std::thread thread{[this] { run(); }};

  void run() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      changed.wait(lock, [this] { return ending || !queue.empty(); });
      if (queue.empty()) return;
      std::function<void()> job = std::move(queue.front());
      queue.pop_front();
      busy = true;
      lock.unlock();
      job();
      lock.lock();
      busy = false;
      changed.notify_all();
    }
  }

  void push(std::function<void()> job) {
    const std::lock_guard<std::mutex> lock(mutex);
    queue.push_back(std::move(job));
    changed.notify_all();
  }

  void synchronize() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return queue.empty() && !busy; });
  }

  void end() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      ending = true;
      changed.notify_all();
    }
    thread.join();
  }
};

struct State {
  std::mutex mutex;
  std::map<std::uint64_t, std::pair<std::uint64_t, int>> memory;   // address -> size, device
  std::map<std::uint64_t, std::uint64_t> registered;               // address -> size
  std::uint64_t registered_bytes = 0, register_limit = ~std::uint64_t{0};
  std::atomic<int> copies{0}, copies_2d{0}, waits{0}, fail_copy{0}, skip_wait{0}, skip_period{1}, crossing{0}, delay_us{0}, live{0};
  std::atomic<std::uint64_t> random{1};
};

State& state() {
  static auto* one = new State;
  return *one;
}

thread_local std::uintptr_t current_context = 0;

Stream* legacy_stream() {
  static auto* stream = new Stream;
  return stream;
}

Stream* stream_of(void* handle) { return handle == nullptr ? legacy_stream() : static_cast<Stream*>(handle); }

// Whether [address, address + size) lies in one registration: real drivers refuse copies that cross.
bool registered(const void* pointer, std::uint64_t size) {
  const auto address = reinterpret_cast<std::uint64_t>(pointer);
  const std::lock_guard<std::mutex> lock(state().mutex);
  auto after = state().registered.upper_bound(address);
  if (after == state().registered.begin()) return false;
  --after;
  return address + size <= after->first + after->second;
}

bool on_device(std::uint64_t address, std::uint64_t size, int* device) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  auto after = state().memory.upper_bound(address);
  if (after == state().memory.begin()) return false;
  --after;
  if (device != nullptr) *device = after->second.second;
  return address + size <= after->first + after->second.first;
}

void dawdle() {
  const int most = state().delay_us;
  if (most == 0) return;
  const std::uint64_t drawn = state().random.fetch_add(0x9E3779B97F4A7C15ull);
  std::this_thread::sleep_for(std::chrono::microseconds((drawn >> 33) % static_cast<std::uint64_t>(most)));
}

int copy(std::uint64_t target, std::uint64_t source, std::uint64_t size, void* stream) {
  if (current_context == 0) return kNoContext;
  if (state().fail_copy > 0 && state().fail_copy.fetch_sub(1) == 1) return 700;
  ++state().copies;
  stream_of(stream)->push([=] {
    dawdle();
    std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), size);
  });
  return 0;
}

struct Memcpy2D {
  std::size_t src_x, src_y;
  unsigned src_type;
  const void* src_host;
  std::uint64_t src_device;
  void* src_array;
  std::size_t src_pitch;
  std::size_t dst_x, dst_y;
  unsigned dst_type;
  void* dst_host;
  std::uint64_t dst_device;
  void* dst_array;
  std::size_t dst_pitch;
  std::size_t width, height;
};

}  // namespace

FAKE int cuInit(unsigned) { return std::getenv("FAKE_CUDA_BROKEN") != nullptr ? 999 : 0; }
FAKE int cuDeviceGetCount(int* count) { return *count = 2, 0; }
FAKE int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
FAKE int cuDeviceGetPCIBusId(char* text, int size, int) { return std::strncpy(text, "0000:FF:00.0", size), 0; }
FAKE int cuDevicePrimaryCtxRetain(void** context, int device) {
  ++state().live;
  return *context = reinterpret_cast<void*>(static_cast<std::uintptr_t>(0x1000 + device)), 0;
}
FAKE int cuDevicePrimaryCtxRelease_v2(int) { return --state().live, 0; }
FAKE int cuCtxGetCurrent(void** context) { return *context = reinterpret_cast<void*>(current_context), 0; }
FAKE int cuCtxPushCurrent_v2(void* context) { return current_context = reinterpret_cast<std::uintptr_t>(context), 0; }
FAKE int cuCtxPopCurrent_v2(void**) { return current_context = 0, 0; }

FAKE int cuStreamCreate(void** stream, unsigned) {
  ++state().live;
  return *stream = new Stream, 0;
}
FAKE int cuStreamDestroy_v2(void* stream) {
  static_cast<Stream*>(stream)->end();
  delete static_cast<Stream*>(stream);
  return --state().live, 0;
}
FAKE int cuStreamSynchronize(void* stream) { return stream_of(stream)->synchronize(), 0; }

FAKE int cuEventCreate(void** event, unsigned) {
  ++state().live;
  return *event = new Event, 0;
}
FAKE int cuEventDestroy_v2(void* event) {
  delete static_cast<Event*>(event);
  return --state().live, 0;
}
FAKE int cuEventRecord(void* handle, void* stream) {
  if (current_context == 0) return kNoContext;
  auto mark = std::make_shared<Mark>();
  static_cast<Event*>(handle)->set(mark);
  stream_of(stream)->push([mark] {
    const std::lock_guard<std::mutex> lock(mark->mutex);
    mark->reached = true;
    mark->changed.notify_all();
  });
  return 0;
}
FAKE int cuEventQuery(void* handle) {
  const std::shared_ptr<Mark> mark = static_cast<Event*>(handle)->get();
  if (mark == nullptr) return 0;
  const std::lock_guard<std::mutex> lock(mark->mutex);
  return mark->reached ? 0 : kNotReady;
}
FAKE int cuStreamWaitEvent(void* stream, void* handle, unsigned) {
  if (current_context == 0) return kNoContext;
  const int number = ++state().waits;
  if (state().skip_wait > 0 && number % state().skip_period == state().skip_wait % state().skip_period) return 0;
  const std::shared_ptr<Mark> mark = static_cast<Event*>(handle)->get();
  if (mark == nullptr) return 0;
  stream_of(stream)->push([mark] {
    std::unique_lock<std::mutex> lock(mark->mutex);
    mark->changed.wait(lock, [&] { return mark->reached; });
  });
  return 0;
}

FAKE int cuMemcpyDtoHAsync_v2(void* host, std::uint64_t device, std::size_t size, void* stream) {
  if (!registered(host, size)) return ++state().crossing, kInvalidValue;
  if (!on_device(device, size, nullptr)) return kInvalidValue;
  return copy(reinterpret_cast<std::uint64_t>(host), device, size, stream);
}
FAKE int cuMemcpyHtoDAsync_v2(std::uint64_t device, const void* host, std::size_t size, void* stream) {
  if (!registered(host, size)) return ++state().crossing, kInvalidValue;
  if (!on_device(device, size, nullptr)) return kInvalidValue;
  return copy(device, reinterpret_cast<std::uint64_t>(host), size, stream);
}
FAKE int cuMemcpy2DAsync_v2(const Memcpy2D* shape, void* stream) {
  constexpr std::size_t kMaxPitch = (std::size_t{1} << 31) - 1;
  if (shape->src_pitch > kMaxPitch || shape->dst_pitch > kMaxPitch) return kInvalidValue;
  const bool out = shape->src_type == 2;
  const auto source = out ? shape->src_device : reinterpret_cast<std::uint64_t>(shape->src_host);
  const auto target = out ? reinterpret_cast<std::uint64_t>(shape->dst_host) : shape->dst_device;
  const std::uint64_t host = out ? target : source, host_pitch = out ? shape->dst_pitch : shape->src_pitch;
  const std::uint64_t span = host_pitch * (shape->height - 1) + shape->width;
  if (!registered(reinterpret_cast<const void*>(host), span)) return ++state().crossing, kInvalidValue;
  ++state().copies_2d;
  for (std::size_t row = 0; row < shape->height; ++row) {
    const int result = copy(target + row * shape->dst_pitch, source + row * shape->src_pitch, shape->width, stream);
    if (result != 0) return result;
  }
  return 0;
}

FAKE int cuMemHostRegister_v2(void* pointer, std::size_t size, unsigned) {
  if (current_context == 0) return kNoContext;
  const std::lock_guard<std::mutex> lock(state().mutex);
  if (state().registered_bytes + size > state().register_limit) return kOutOfMemory;
  state().registered[reinterpret_cast<std::uint64_t>(pointer)] = size;
  state().registered_bytes += size;
  return 0;
}
FAKE int cuMemHostUnregister(void* pointer) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  const auto found = state().registered.find(reinterpret_cast<std::uint64_t>(pointer));
  if (found == state().registered.end()) return kInvalidHandle;
  state().registered_bytes -= found->second;
  state().registered.erase(found);
  return 0;
}
FAKE int cuGetErrorName(int code, const char** name) {
  static const std::map<int, const char*> names = {{kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
                                                   {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                   {kNoContext, "CUDA_ERROR_INVALID_CONTEXT"},
                                                   {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
                                                   {999, "CUDA_ERROR_UNKNOWN"}};
  const auto found = names.find(code);
  return *name = found == names.end() ? nullptr : found->second, found == names.end() ? kInvalidValue : 0;
}

// ---- for tests

FAKE std::uint64_t fake_alloc(std::uint64_t size, int device) {
  // With room behind it, so that one past the end is nobody's.
  const auto address = reinterpret_cast<std::uint64_t>(std::calloc(size + 65536, 1));
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().memory[address] = {size, device};
  return address;
}
FAKE void fake_free(std::uint64_t address) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().memory.erase(address);
  std::free(reinterpret_cast<void*>(address));
}
FAKE void* fake_stream() { return new Stream; }
FAKE void fake_stream_end(void* stream) {
  static_cast<Stream*>(stream)->end();
  delete static_cast<Stream*>(stream);
}
FAKE void fake_synchronize(void* stream) { stream_of(stream)->synchronize(); }
// A kernel that fills memory, one that reads it, one that only takes time.
FAKE void fake_fill(void* stream, std::uint64_t address, int value, std::uint64_t size) {
  stream_of(stream)->push([=] {
    dawdle();
    std::memset(reinterpret_cast<void*>(address), value, size);
  });
}
FAKE void fake_read(void* stream, std::uint64_t address, void* into, std::uint64_t size) {
  stream_of(stream)->push([=] { std::memcpy(into, reinterpret_cast<const void*>(address), size); });
}
FAKE void fake_sleep(void* stream, int us) {
  stream_of(stream)->push([=] { std::this_thread::sleep_for(std::chrono::microseconds(us)); });
}
// Every copy and kernel takes up to `us` longer.
FAKE void fake_delay(int us) { state().delay_us = us; }
// The n-th copy from now on fails; 0: none.
FAKE void fake_fail_copy(int n) { state().fail_copy = n; }
// Of every `period` waits from now on, the one with number `which` (from 1) is left out; 0: none.
FAKE void fake_skip_wait(int which, int period) {
  state().waits = 0;
  state().skip_period = period;
  state().skip_wait = which;
}
FAKE void fake_register_limit(std::uint64_t size) { state().register_limit = size; }
FAKE std::uint64_t fake_registered_bytes() {
  const std::lock_guard<std::mutex> lock(state().mutex);
  return state().registered_bytes;
}
FAKE int fake_num_registrations() {
  const std::lock_guard<std::mutex> lock(state().mutex);
  return static_cast<int>(state().registered.size());
}
FAKE int fake_copies() { return state().copies; }
FAKE int fake_copies_2d() { return state().copies_2d; }
// Contexts, streams and events that were made and not given back.
FAKE int fake_live() { return state().live; }

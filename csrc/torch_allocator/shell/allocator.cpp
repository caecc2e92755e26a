#include "allocator.hpp"

#include <c10/core/impl/GPUTrace.h>
#include <c10/core/impl/PyInterpreter.h>
#include <c10/cuda/CUDAFunctions.h>

#include <algorithm>
#include <stdexcept>

namespace memo_arena {
namespace {

// CUDA devices that torch can name.
constexpr int kDevices = 64;
// The arena is this much or a multiple: the native allocator makes a segment of just that size.
constexpr std::uint64_t kSegment = 2 << 20;

std::uint64_t number(const void* pointer) { return reinterpret_cast<std::uint64_t>(pointer); }
void* address(std::uint64_t value) { return reinterpret_cast<void*>(value); }

std::atomic<PlannedAllocator*> the_one{nullptr};

}  // namespace

// ---- one device

Ground* DeviceState::around(std::uint64_t at) const {
  for (const auto& ground : grounds) {
    Ground* found = ground.load(std::memory_order_acquire);
    if (found != nullptr && found->arena.holds(at)) return found;
  }
  return nullptr;
}

bool DeviceState::is_private(cudaStream_t stream) const {
  const std::lock_guard<std::mutex> lock(pools_mutex);
  return std::any_of(pools.begin(), pools.end(), [&](const auto& pool) { return pool.second(stream); });
}

// ---- plans

PlannedAllocator::PlannedAllocator(native_cuda::CUDAAllocator* native) : native_(native) {
  for (int index = 0; index < kDevices; ++index) states_.push_back(std::make_unique<DeviceState>(index));
}

DeviceState& PlannedAllocator::state(int device) {
  if (device < 0 || device >= kDevices) throw std::invalid_argument("there is no device " + std::to_string(device));
  return *states_[static_cast<std::size_t>(device)];
}

DeviceState& PlannedAllocator::current() { return *states_[static_cast<std::size_t>(c10::cuda::current_device())]; }

void PlannedAllocator::arm(int device, const std::vector<Slot>& slots, std::uint64_t size) {
  DeviceState& where = state(device);
  const auto plan = std::make_shared<const Plan>(slots, size);
  const std::lock_guard<std::mutex> lock(where.change_mutex);
  Ground* ground = where.grounds[0].load();
  if (ground == nullptr || ground->arena.size() < plan->extent()) {
    retire(where);
    ground = break_ground(where, size);
  }
  ground->arena.enable(plan);
  where.armed = true;
}

std::uint64_t PlannedAllocator::disarm(int device) {
  DeviceState& where = state(device);
  const std::lock_guard<std::mutex> lock(where.change_mutex);
  return retire(where);
}

// The arena serves no more; tensors in it live on. Returns their bytes.
std::uint64_t PlannedAllocator::retire(DeviceState& where) {
  where.armed = false;
  Ground* ground = where.grounds[0].load();
  if (ground != nullptr) {
    ground->arena.disable();
    for (std::size_t at = 1; at < DeviceState::kMost && ground != nullptr; ++at) {
      if (where.grounds[at].load() != nullptr) continue;
      where.grounds[at] = ground;  // there first, so that its tensors are always found
      where.grounds[0] = nullptr;
      ground = nullptr;
    }
  }
  return release_idle(where);
}

// Gives the memory of arenas back that serve no more and have no tensors. Returns bytes that are alive in the others.
std::uint64_t PlannedAllocator::release_idle(DeviceState& where) {
  std::uint64_t alive = 0;
  for (std::size_t at = 0; at < DeviceState::kMost; ++at) {
    Ground* ground = where.grounds[at].load();
    if (ground == nullptr || (at == 0 && where.armed)) continue;
    const std::uint64_t live = ground->arena.statistics().live_bytes;
    alive += live;
    if (live != 0) continue;
    const OnDevice here(where.index);
    C10_CUDA_CHECK(cudaDeviceSynchronize());  // its bytes may be anybody's from now on, on any stream
    where.grounds[at] = nullptr;
    native_->raw_delete(address(ground->arena.base()));
    where.ledger.arena(static_cast<std::int64_t>(ground->block), static_cast<std::int64_t>(ground->arena.size()), -1);
  }
  return alive;
}

Ground* PlannedAllocator::break_ground(DeviceState& where, std::uint64_t size) {
  if (where.grounds[0].load() != nullptr) {
    throw std::invalid_argument("tensors are alive in " + std::to_string(DeviceState::kMost) +
                                " arenas of earlier plans: free them first");
  }
  const auto index = static_cast<c10::DeviceIndex>(where.index);
  const OnDevice here(where.index);
  if (!where.counted) where.ledger.begin(native_->getDeviceStats(index));
  size = (size + kSegment - 1) / kSegment * kSegment;
  const std::uint64_t base =
      number(native_->raw_alloc_with_stream(size, c10::cuda::getDefaultCUDAStream(index).stream()));
  std::uint64_t block = size;
  for (const auto& segment : native_->snapshot({0, 0}, false).segments) {
    std::uint64_t at = segment.address;
    for (const auto& one : segment.blocks) {
      if (at == base) block = one.size;
      at += one.size;
    }
  }
  where.ledger.arena(static_cast<std::int64_t>(block), static_cast<std::int64_t>(size), 1);
  where.counted = true;
  auto* ground = new Ground(where.device, base, size, block);
  where.grounds[0] = ground;
  return ground;
}

// Memory ran out: an arena that nothing lives in goes back, and its plan with it.
bool PlannedAllocator::give_back(DeviceState& where) {
  const std::unique_lock<std::mutex> lock(where.change_mutex, std::try_to_lock);
  Ground* ground = where.grounds[0].load();
  if (!lock.owns_lock() || ground == nullptr || where.num_pools.load() != 0) return false;
  if (ground->arena.statistics().live != 0) return false;
  retire(where);
  ++where.given_back;
  return true;
}

// ---- allocations

template <typename Allocate>
auto PlannedAllocator::natively(DeviceState& where, Allocate&& allocate) {
  const auto tried = [&] {
    try {
      return allocate();
    } catch (const c10::OutOfMemoryError&) {
      if (!give_back(where)) throw;
    }
    return allocate();
  };
  auto result = tried();
  if (where.counted.load(std::memory_order_relaxed)) sample(where);
  return result;
}

void PlannedAllocator::sample(DeviceState& where) {
  where.ledger.sample(native_->getDeviceStats(static_cast<c10::DeviceIndex>(where.index)));
}

void* PlannedAllocator::serve(DeviceState& where, std::size_t size) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(where.index)).stream();
  if (where.num_pools.load(std::memory_order_relaxed) != 0 && where.is_private(stream)) {
    ++where.bypassed;
    return nullptr;
  }
  Ground* ground = where.grounds[0].load(std::memory_order_acquire);
  if (ground == nullptr || !native_->isEnabled()) return nullptr;
  const std::uint64_t found = ground->arena.take(size, number(stream));
  if (found == 0) return nullptr;
  where.ledger.planned(static_cast<std::int64_t>(rounded(size)), static_cast<std::int64_t>(size), 1);
  sample(where);
  where.history.allocated(where.index, found, size, number(stream));
  return address(found);
}

c10::DataPtr PlannedAllocator::allocate(std::size_t size) {
  if (size == 0) return native_->allocate(size);
  DeviceState& where = current();
  if (where.armed.load(std::memory_order_acquire)) {
    void* found = serve(where, size);
    if (found != nullptr) {
      if (const c10::impl::PyInterpreter* watcher = c10::impl::GPUTrace::get_trace()) {
        (*watcher)->trace_gpu_memory_allocation(c10::kCUDA, reinterpret_cast<std::uintptr_t>(found));
      }
      return {found, found, &deleter, c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(where.index))};
    }
  }
  return natively(where, [&] { return native_->allocate(size); });
}

void* PlannedAllocator::raw_alloc(std::size_t size) {
  return natively(current(), [&] { return native_->raw_alloc(size); });
}

void* PlannedAllocator::raw_alloc_with_stream(std::size_t size, cudaStream_t stream) {
  return natively(current(), [&] { return native_->raw_alloc_with_stream(size, stream); });
}

// ---- what was served

Ground* PlannedAllocator::ground_of(const void* pointer, DeviceState** owner) {
  for (const auto& one : states_) {
    if (!one->counted.load(std::memory_order_relaxed)) continue;
    if (Ground* ground = one->around(number(pointer))) {
      if (owner != nullptr) *owner = one.get();
      return ground;
    }
  }
  return nullptr;
}

void PlannedAllocator::give(void* pointer) {
  DeviceState* where = nullptr;
  Ground* ground = ground_of(pointer, &where);
  TORCH_INTERNAL_ASSERT(ground != nullptr, "a planned tensor outside of every arena");
  if (const c10::impl::PyInterpreter* watcher = c10::impl::GPUTrace::get_trace()) {
    (*watcher)->trace_gpu_memory_deallocation(c10::kCUDA, reinterpret_cast<std::uintptr_t>(pointer));
  }
  if (where->history.on()) {  // before anybody else can get the address
    const Given is = ground->arena.look(number(pointer));
    where->history.freed(where->index, number(pointer), is.requested, is.stream);
  }
  const Given given = ground->arena.give(number(pointer));
  TORCH_INTERNAL_ASSERT(given.ours, "a planned tensor was freed twice");
  where->ledger.planned(static_cast<std::int64_t>(given.bytes), static_cast<std::int64_t>(given.requested), -1);
}

void PlannedAllocator::deleter(void* pointer) { the_one.load()->give(pointer); }

void PlannedAllocator::raw_delete(void* pointer) {
  if (ground_of(pointer) != nullptr) return give(pointer);
  native_->raw_delete(pointer);
}

void PlannedAllocator::recordStream(const c10::DataPtr& data, c10::cuda::CUDAStream stream) {
  Ground* ground = data.get() != nullptr ? ground_of(data.get()) : nullptr;
  if (ground == nullptr) return native_->recordStream(data, stream);
  ground->arena.note(number(data.get()), number(stream.stream()));
}

void* PlannedAllocator::getBaseAllocation(void* pointer, std::size_t* size) {
  const Ground* ground = ground_of(pointer);
  return native_->getBaseAllocation(ground != nullptr ? address(ground->arena.base()) : pointer, size);
}

native_cuda::ShareableHandle PlannedAllocator::shareIpcHandle(void* pointer) {
  const Ground* ground = ground_of(pointer);
  if (ground == nullptr) return native_->shareIpcHandle(pointer);
  auto handle = native_->shareIpcHandle(address(ground->arena.base()));
  handle.offset += static_cast<std::ptrdiff_t>(number(pointer) - ground->arena.base());
  return handle;
}

#if MEMO_TORCH >= 2012
std::shared_ptr<c10::GatheredContext> PlannedAllocator::getContextForPointer(const void* pointer) {
  DeviceState* where = nullptr;
  if (ground_of(pointer, &where) == nullptr) return native_->getContextForPointer(pointer);
  return where->history.context_of(number(pointer));
}
#endif

#if MEMO_TORCH >= 2014
void PlannedAllocator::annotateMemory(const void* pointer, const std::string& text) {
  DeviceState* where = nullptr;
  const Ground* ground = ground_of(pointer, &where);
  if (ground == nullptr) return native_->annotateMemory(pointer, text);
  const Given is = ground->arena.look(number(pointer));
  // As the native allocator has it, which would take the whole arena for what begins where it does.
  TORCH_CHECK(is.ours, "annotateMemory: no live allocation found at pointer ", pointer);
  where->history.annotated(where->index, number(pointer), is.requested, is.stream, text);
}
#endif

// ---- private pools

void PlannedAllocator::beginAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t pool,
                                           std::function<bool(cudaStream_t)> filter) {
  DeviceState& where = state(device);
  {
    const std::lock_guard<std::mutex> lock(where.pools_mutex);
    where.pools.emplace_back(pool, filter);
    ++where.num_pools;
  }
  native_->beginAllocateToPool(device, pool, std::move(filter));
}

void PlannedAllocator::endAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t pool) {
  native_->endAllocateToPool(device, pool);
  DeviceState& where = state(device);
  const std::lock_guard<std::mutex> lock(where.pools_mutex);
  const auto found = std::find_if(where.pools.begin(), where.pools.end(), [&](const auto& p) { return p.first == pool; });
  if (found == where.pools.end()) return;
  where.pools.erase(found);
  --where.num_pools;
}

// ---- statistics and history

caching::DeviceStats PlannedAllocator::getDeviceStats(c10::DeviceIndex device) {
  auto stats = native_->getDeviceStats(device);
  DeviceState& where = state(device);
  if (where.counted) where.ledger.correct(stats);
  return stats;
}

void PlannedAllocator::resetAccumulatedStats(c10::DeviceIndex device) {
  native_->resetAccumulatedStats(device);
  state(device).ledger.reset_accumulated();
}

void PlannedAllocator::resetPeakStats(c10::DeviceIndex device) {
  native_->resetPeakStats(device);
  DeviceState& where = state(device);
  if (where.counted) where.ledger.reset_peak(native_->getDeviceStats(device));
}

native_cuda::SnapshotInfo PlannedAllocator::snapshot(c10::MempoolId_t pool, bool include_traces) {
  auto found = native_->snapshot(pool, include_traces);
  for (const auto& where : states_) {
    if (!where->counted) continue;
    std::vector<std::uint64_t> bases;
    for (const auto& one : where->grounds) {
      const Ground* ground = one.load();
      if (ground == nullptr) continue;
      bases.push_back(ground->arena.base());
      show_ranges(found.segments, ground->arena, ground->block, where->history);
    }
    const auto index = static_cast<std::size_t>(where->index);
    if (include_traces && index < found.device_traces.size()) where->history.merge(found.device_traces[index], bases);
  }
  return found;
}

void PlannedAllocator::recordHistory(bool enabled, native_cuda::CreateContextFn recorder, std::size_t most,
                                     native_cuda::RecordContext when, bool clear,
                                     const std::vector<std::string>& skipped) {
  native_->recordHistory(enabled, recorder, most, when, clear, skipped);
  for (const auto& where : states_) where->history.configure(enabled, recorder, most, when, clear, skipped);
}

// ---- in place

PlannedAllocator* installed() { return the_one.load(); }

PlannedAllocator& install() {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (PlannedAllocator* known = the_one.load()) return *known;
  native_cuda::CUDAAllocator* native = native_cuda::get();
  TORCH_CHECK(native != nullptr && native->name() == "native", "PyTorch's own CUDA allocator is needed, and '",
              native != nullptr ? native->name() : "none", "' is in use");
  auto* made = new PlannedAllocator(native);
  the_one = made;
  native_cuda::allocator.store(made);
  // Both ways to it; with the default priority, newer versions of torch would ignore this.
  c10::SetAllocator(c10::kCUDA, made, 1);
  return *made;
}

}  // namespace memo_arena

// PyTorch's CUDA allocator with an arena in front: what a plan places is served there, everything else is the native
// allocator's, whose own tensors are handed on untouched.
//
// The table of virtual functions changes with every minor of torch, so this is built for one and refuses others
// (interface.cpp). Once installed it stays: tensors keep a pointer to it.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "arena.hpp"
#include "cuda_device.hpp"
#include "history.hpp"
#include "ledger.hpp"
#include "torch_version.hpp"

namespace memo_arena {

namespace native_cuda = c10::cuda::CUDACachingAllocator;

// Memory of one arena.
struct Ground {
  Ground(CudaDevice& device, std::uint64_t base, std::uint64_t size, std::uint64_t native_block)
      : arena(device, base, size), block(native_block) {}
  Arena arena;
  const std::uint64_t block;  // bytes that the native allocator counts for it
};

// One device: the arena that serves, those that tensors still live in, and what is counted.
struct DeviceState {
  static constexpr std::size_t kMost = 4;

  explicit DeviceState(int device_index) : index(device_index), device(device_index) {}

  Ground* around(std::uint64_t address) const;
  bool is_private(cudaStream_t stream) const;

  const int index;
  CudaDevice device;
  std::atomic<bool> armed{false};    // there is a plan
  std::atomic<bool> counted{false};  // there was an arena: the ledger has the peaks
  // Objects stay when their memory is given back: a thread may be about to ask one, and is told no.
  std::array<std::atomic<Ground*>, kMost> grounds{};
  std::atomic<std::uint64_t> given_back{0};  // times that the arena went because memory ran out
  std::atomic<std::uint64_t> bypassed{0};    // requests in private pools and captures
  Ledger ledger;
  History history;

  mutable std::mutex pools_mutex;
  std::atomic<int> num_pools{0};
  std::vector<std::pair<c10::MempoolId_t, std::function<bool(cudaStream_t)>>> pools;
  std::mutex change_mutex;  // enabling and disabling
};

class PlannedAllocator final : public native_cuda::CUDAAllocator {
 public:
  explicit PlannedAllocator(native_cuda::CUDAAllocator* native);

  // ---- ours
  // Throws std::invalid_argument where the plan cannot be, c10::Error where there is no memory for it.
  void arm(int device, const std::vector<Slot>& slots, std::uint64_t size);
  // Nothing is planned any more; the memory goes back once nothing lives in it. Returns bytes that still do.
  std::uint64_t disarm(int device);
  DeviceState& state(int device);

  // ---- what is served, freed and counted here
  c10::DataPtr allocate(std::size_t size) override;
  void raw_delete(void* pointer) override;
  void recordStream(const c10::DataPtr& data, c10::cuda::CUDAStream stream) override;
  caching::DeviceStats getDeviceStats(c10::DeviceIndex device) override;
  void resetAccumulatedStats(c10::DeviceIndex device) override;
  void resetPeakStats(c10::DeviceIndex device) override;
  native_cuda::SnapshotInfo snapshot(c10::MempoolId_t pool, bool include_traces) override;
  void recordHistory(bool enabled, native_cuda::CreateContextFn recorder, std::size_t most,
                     native_cuda::RecordContext when, bool clear, const std::vector<std::string>& skipped) override;
  void beginAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t pool,
                           std::function<bool(cudaStream_t)> filter) override;
  void endAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t pool) override;
  void* getBaseAllocation(void* pointer, std::size_t* size) override;
  native_cuda::ShareableHandle shareIpcHandle(void* pointer) override;
  void* raw_alloc(std::size_t size) override;
  void* raw_alloc_with_stream(std::size_t size, cudaStream_t stream) override;

#include "delegated.inc"

 private:
  DeviceState& current();
  Ground* ground_of(const void* pointer, DeviceState** owner = nullptr);
  void* serve(DeviceState& state, std::size_t size);
  void give(void* pointer);
  void sample(DeviceState& state);
  bool give_back(DeviceState& state);
  std::uint64_t retire(DeviceState& state);
  std::uint64_t release_idle(DeviceState& state);
  Ground* break_ground(DeviceState& state, std::uint64_t size);
  template <typename Allocate>
  auto natively(DeviceState& state, Allocate&& allocate);
  static void deleter(void* pointer);

  native_cuda::CUDAAllocator* const native_;
  std::vector<std::unique_ptr<DeviceState>> states_;
};

// The one that is installed; none before that.
PlannedAllocator* installed();
// Puts it in front of the native allocator; throws c10::Error where another one is in use.
PlannedAllocator& install();

}  // namespace memo_arena

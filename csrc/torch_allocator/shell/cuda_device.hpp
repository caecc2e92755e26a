// Order between the streams of one CUDA device, for the arena.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

#include "device.hpp"

namespace memo_arena {

// Makes `device` the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

class CudaDevice : public Device {
 public:
  explicit CudaDevice(int index) : index_(index) {}

  Event record(Stream stream) override;
  bool wait(Stream stream, Event event) override;
  void release(Event event) override;

 private:
  cudaEvent_t take();

  const int index_;
  std::mutex mutex_;
  std::vector<cudaEvent_t> spare_;
};

}  // namespace memo_arena

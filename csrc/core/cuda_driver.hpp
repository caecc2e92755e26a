// The few functions of the CUDA driver that the core calls, found at run time.
//
// No CUDA header is needed to build: the declarations below are those of cuda.h, whose driver interface is stable by
// name (a function whose meaning changed got a new name, hence the _v2). Nothing here needs a GPU until a library is
// opened, and which library that is, is a parameter: tests open one that imitates a driver with threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace memo_core {

using CuResult = int;
using CuDevice = int;
using CuPointer = unsigned long long;
using CuContext = struct CuContextOpaque*;
using CuStream = struct CuStreamOpaque*;
using CuEvent = struct CuEventOpaque*;

constexpr CuResult kCuSuccess = 0;
constexpr CuResult kCuNotReady = 600;
constexpr unsigned kCuStreamNonBlocking = 1;
constexpr unsigned kCuEventDisableTiming = 2;
constexpr unsigned kCuHostRegisterPortable = 1;
constexpr unsigned kCuMemoryHost = 1;
constexpr unsigned kCuMemoryDevice = 2;
constexpr std::size_t kCuMaxPitch = (std::size_t{1} << 31) - 1;

struct CuMemcpy2D {  // CUDA_MEMCPY2D_v2
  std::size_t src_x, src_y;
  unsigned src_type;
  const void* src_host;
  CuPointer src_device;
  void* src_array;
  std::size_t src_pitch;
  std::size_t dst_x, dst_y;
  unsigned dst_type;
  void* dst_host;
  CuPointer dst_device;
  void* dst_array;
  std::size_t dst_pitch;
  std::size_t width, height;
};

// Field, symbol in the library, result and arguments.
#define MEMO_CUDA_FUNCTIONS(X)                                                        \
  X(init, "cuInit", (unsigned))                                                       \
  X(device_get, "cuDeviceGet", (CuDevice*, int))                                      \
  X(device_count, "cuDeviceGetCount", (int*))                                         \
  X(pci_bus_id, "cuDeviceGetPCIBusId", (char*, int, CuDevice))                        \
  X(primary_retain, "cuDevicePrimaryCtxRetain", (CuContext*, CuDevice))               \
  X(primary_release, "cuDevicePrimaryCtxRelease_v2", (CuDevice))                      \
  X(context_current, "cuCtxGetCurrent", (CuContext*))                                 \
  X(context_push, "cuCtxPushCurrent_v2", (CuContext))                                 \
  X(context_pop, "cuCtxPopCurrent_v2", (CuContext*))                                  \
  X(stream_create, "cuStreamCreate", (CuStream*, unsigned))                           \
  X(stream_destroy, "cuStreamDestroy_v2", (CuStream))                                 \
  X(stream_synchronize, "cuStreamSynchronize", (CuStream))                            \
  X(stream_wait_event, "cuStreamWaitEvent", (CuStream, CuEvent, unsigned))            \
  X(event_create, "cuEventCreate", (CuEvent*, unsigned))                              \
  X(event_destroy, "cuEventDestroy_v2", (CuEvent))                                    \
  X(event_record, "cuEventRecord", (CuEvent, CuStream))                               \
  X(event_query, "cuEventQuery", (CuEvent))                                           \
  X(copy_to_host, "cuMemcpyDtoHAsync_v2", (void*, CuPointer, std::size_t, CuStream))  \
  X(copy_to_device, "cuMemcpyHtoDAsync_v2", (CuPointer, const void*, std::size_t, CuStream)) \
  X(copy_2d, "cuMemcpy2DAsync_v2", (const CuMemcpy2D*, CuStream))                     \
  X(host_register, "cuMemHostRegister_v2", (void*, std::size_t, unsigned))            \
  X(host_unregister, "cuMemHostUnregister", (void*))                                  \
  X(error_name, "cuGetErrorName", (CuResult, const char**))

// An opened driver; never closed, since a driver cannot be unloaded safely.
class CudaDriver {
 public:
  // Throws Failure(unavailable) with the reason: no such library, a missing function, no device.
  static std::shared_ptr<const CudaDriver> open(const std::string& path);

#define MEMO_DECLARE(field, symbol, arguments) CuResult(*field) arguments = nullptr;
  MEMO_CUDA_FUNCTIONS(MEMO_DECLARE)
#undef MEMO_DECLARE

  std::string name_of(CuResult result) const;
  // Throws Failure(status) with `what` and the driver's name of the error, unless it is success.
  void check(CuResult result, const std::string& what) const;
};

// The primary context of one device, which is the one that PyTorch works in.
class CudaDevice {
 public:
  CudaDevice(std::shared_ptr<const CudaDriver> driver, int ordinal);
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  const CudaDriver& driver() const { return *driver_; }
  int ordinal() const { return ordinal_; }
  CuContext context() const { return context_; }
  // The NUMA node that the device hangs on; -1 where the system does not say.
  int numa_node() const;

 private:
  std::shared_ptr<const CudaDriver> driver_;
  int ordinal_;
  CuDevice device_ = 0;
  CuContext context_ = nullptr;
};

// Makes a device's context current in this thread for as long as it lives.
class ContextGuard {
 public:
  explicit ContextGuard(const CudaDevice& device);
  ~ContextGuard();
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

 private:
  const CudaDriver& driver_;
  bool pushed_ = false;
};

}  // namespace memo_core

#include "cuda_driver.hpp"

#include <dlfcn.h>

#include <cctype>
#include <cstdio>

#include "failure.hpp"

namespace memo_core {

std::shared_ptr<const CudaDriver> CudaDriver::open(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw Failure(Status::unavailable, "no CUDA driver: " + std::string(reason ? reason : path));
  }
  auto driver = std::make_shared<CudaDriver>();
#define MEMO_LOOK_UP(field, symbol, arguments)                                                    \
  driver->field = reinterpret_cast<CuResult(*) arguments>(dlsym(library, symbol));                \
  if (driver->field == nullptr) {                                                                 \
    throw Failure(Status::unavailable, "the CUDA driver " + path + " has no function " + symbol); \
  }
  MEMO_CUDA_FUNCTIONS(MEMO_LOOK_UP)
#undef MEMO_LOOK_UP
  const CuResult started = driver->init(0);
  if (started != kCuSuccess) {
    throw Failure(Status::unavailable, "the CUDA driver does not start: " + driver->name_of(started));
  }
  return driver;
}

std::string CudaDriver::name_of(CuResult result) const {
  const char* name = nullptr;
  if (error_name(result, &name) == kCuSuccess && name != nullptr) return name;
  return "CUDA error " + std::to_string(result);
}

void CudaDriver::check(CuResult result, const std::string& what) const {
  if (result != kCuSuccess) throw Failure(Status::copy_failed, what + ": " + name_of(result));
}

CudaDevice::CudaDevice(std::shared_ptr<const CudaDriver> driver, int ordinal)
    : driver_(std::move(driver)), ordinal_(ordinal) {
  int count = 0;
  driver_->check(driver_->device_count(&count), "cannot count CUDA devices");
  if (ordinal < 0 || ordinal >= count) {
    throw Failure(Status::wrong_device,
                  "there is no CUDA device " + std::to_string(ordinal) + "; the driver has " + std::to_string(count));
  }
  driver_->check(driver_->device_get(&device_, ordinal), "cannot open CUDA device " + std::to_string(ordinal));
  driver_->check(driver_->primary_retain(&context_, device_),
                 "cannot enter the context of CUDA device " + std::to_string(ordinal));
}

CudaDevice::~CudaDevice() { driver_->primary_release(device_); }

int CudaDevice::numa_node() const {
  char id[32] = {};
  if (driver_->pci_bus_id(id, sizeof(id) - 1, device_) != kCuSuccess) return -1;
  std::string name(id);
  for (char& letter : name) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  // No C++ streams: they crash where the process has loaded an older C++ library than the one that this was built for.
  std::FILE* file = std::fopen(("/sys/bus/pci/devices/" + name + "/numa_node").c_str(), "r");
  if (file == nullptr) return -1;
  int node = -1;
  const bool read = std::fscanf(file, "%d", &node) == 1;
  std::fclose(file);
  return read ? node : -1;
}

ContextGuard::ContextGuard(const CudaDevice& device) : driver_(device.driver()) {
  CuContext current = nullptr;
  // Nearly always PyTorch has it current already.
  if (driver_.context_current(&current) == kCuSuccess && current == device.context()) return;
  driver_.check(driver_.context_push(device.context()), "cannot enter the device's context");
  pushed_ = true;
}

ContextGuard::~ContextGuard() {
  CuContext popped = nullptr;
  if (pushed_) driver_.context_pop(&popped);
}

}  // namespace memo_core

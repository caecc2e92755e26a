// Memory, streams and events of a CUDA runtime without a GPU, to be preloaded: torch's own caching allocator, and the
// planned one in front of it, run on host memory. Kernels do nothing; copies are made at once.

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

constexpr int kDevices = 2;
constexpr std::size_t kGranule = 2 << 20;

thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
std::mutex mutex;
std::map<void*, std::pair<std::size_t, int>> live;
std::size_t used[kDevices];
std::atomic<long> mallocs{0}, frees{0}, records{0}, waits{0};
std::atomic<int> captures{0};

cudaError_t failed(cudaError_t error) { return last = error; }

using Moment = std::chrono::steady_clock::time_point;
Moment* moment(cudaEvent_t event) { return reinterpret_cast<Moment*>(event); }

std::size_t capacity() {
  const char* given = std::getenv("FAKE_CUDA_BYTES");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : std::size_t{1} << 30;
}

}  // namespace

extern "C" {

long fake_cuda_mallocs() { return mallocs; }
long fake_cuda_frees() { return frees; }
long fake_cuda_records() { return records; }
long fake_cuda_waits() { return waits; }
void fake_cuda_capture(int on) { captures = on; }

cudaError_t cudaGetDeviceCount(int* count) { *count = kDevices; return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { *device = current; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { current = device; return cudaSuccess; }
cudaError_t cudaInitDevice(int, unsigned, unsigned) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return captures ? failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess; }
cudaError_t cudaGetLastError() { const cudaError_t was = last; last = cudaSuccess; return was; }
cudaError_t cudaPeekAtLastError() { return last; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { *value = 0; return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int) { std::strncpy(text, "0000:00:00.0", length); return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::memset(properties, 0, sizeof(*properties));
  std::strcpy(properties->name, "imitated");
  properties->totalGlobalMem = capacity();
  properties->major = 9;
  properties->warpSize = 32;
  properties->multiProcessorCount = 1;
  properties->maxThreadsPerMultiProcessor = 2048;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(std::size_t* free_bytes, std::size_t* total) {
  const std::lock_guard<std::mutex> lock(mutex);
  *total = capacity();
  *free_bytes = *total - used[current];
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, std::size_t size) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (used[current] + size > capacity()) return failed(cudaErrorMemoryAllocation);
  char* mapped = static_cast<char*>(mmap(nullptr, size + kGranule, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (mapped == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
  *pointer = mapped + kGranule - reinterpret_cast<std::size_t>(mapped) % kGranule;
  live[*pointer] = {size, current};
  used[current] += size;
  ++mallocs;
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = live.find(pointer);
  if (found == live.end()) return failed(cudaErrorInvalidValue);
  used[found->second.second] -= found->second.first;
  live.erase(found);  // addresses are never used again, so that a stale one is seen
  ++frees;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  std::memset(attributes, 0, sizeof(*attributes));
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [begin, what] : live) {
    if (pointer >= begin && pointer < static_cast<const char*>(begin) + what.first) {
      attributes->type = cudaMemoryTypeDevice;
      attributes->device = what.second;
      attributes->devicePointer = const_cast<void*>(pointer);
    }
  }
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** pointer, std::size_t size, unsigned) {
  *pointer = std::malloc(size);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void*, std::size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t count, cudaMemcpyKind) {
  std::memcpy(to, from, count);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t count, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, count);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t count, cudaStream_t) {
  std::memset(to, value, count);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  static std::atomic<std::size_t> count{0x1000};
  *stream = reinterpret_cast<cudaStream_t>(count += 16);
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { ++waits; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*,
                                     const cudaGraphNode_t**,
#if CUDART_VERSION >= 13000
                                     const cudaGraphEdgeData**,
#endif
                                     std::size_t*) {
  *status = captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id != nullptr) *id = 1;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, std::size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  std::memset(attributes, 0, sizeof(*attributes));
  attributes->binaryVersion = attributes->ptxVersion = 90;
  attributes->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, std::size_t) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, std::size_t, unsigned) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Moment);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { delete moment(event); return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *moment(event) = std::chrono::steady_clock::now();
  ++records;
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = std::chrono::duration<float, std::milli>(*moment(to) - *moment(from)).count();
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

}  // extern "C"

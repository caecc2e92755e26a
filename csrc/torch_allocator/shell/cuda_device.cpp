#include "cuda_device.hpp"

namespace memo_arena {
namespace {

// Work of the allocator must not become part of somebody's graph.
bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    (void)cudaGetLastError();  // the default stream, while another is captured
    return true;
  }
  return status != cudaStreamCaptureStatusNone;
}

bool worked(cudaError_t code) {
  if (code != cudaSuccess) (void)cudaGetLastError();
  return code == cudaSuccess;
}

cudaStream_t stream_of(Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

}  // namespace

OnDevice::OnDevice(int device) {
  int current = -1;
  if (worked(cudaGetDevice(&current)) && current != device && worked(cudaSetDevice(device))) before_ = current;
}

OnDevice::~OnDevice() {
  if (before_ >= 0) (void)worked(cudaSetDevice(before_));
}

cudaEvent_t CudaDevice::take() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!spare_.empty()) {
      cudaEvent_t event = spare_.back();
      spare_.pop_back();
      return event;
    }
  }
  cudaEvent_t event = nullptr;
  return worked(cudaEventCreateWithFlags(&event, cudaEventDisableTiming)) ? event : nullptr;
}

Event CudaDevice::record(Stream stream) {
  const OnDevice here(index_);
  if (is_capturing(stream_of(stream))) return 0;
  cudaEvent_t event = take();
  if (event == nullptr) return 0;
  if (!worked(cudaEventRecord(event, stream_of(stream)))) {
    release(reinterpret_cast<Event>(event));
    return 0;
  }
  return reinterpret_cast<Event>(event);
}

bool CudaDevice::wait(Stream stream, Event event) {
  const OnDevice here(index_);
  if (is_capturing(stream_of(stream))) return false;
  return worked(cudaStreamWaitEvent(stream_of(stream), reinterpret_cast<cudaEvent_t>(event), 0));
}

// A wait that was given to a stream keeps what it waits for, so the event can be recorded again at once.
void CudaDevice::release(Event event) {
  const std::lock_guard<std::mutex> lock(mutex_);
  spare_.push_back(reinterpret_cast<cudaEvent_t>(event));
}

}  // namespace memo_arena

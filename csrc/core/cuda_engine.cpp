#include "cuda_engine.hpp"

#include <algorithm>

namespace memo_core {
namespace {

CuStream handle(std::uint64_t stream) { return reinterpret_cast<CuStream>(stream); }

}  // namespace

CudaEngine::CudaEngine(std::shared_ptr<CudaDevice> device) : device_(std::move(device)), driver_(device_->driver()) {
  const ContextGuard guard(*device_);
  // Non-blocking: the legacy default stream, in which PyTorch computes, must not wait for copies by itself.
  driver_.check(driver_.stream_create(&out_, kCuStreamNonBlocking), "cannot create a copy stream");
  driver_.check(driver_.stream_create(&in_, kCuStreamNonBlocking), "cannot create a copy stream");
  driver_.check(driver_.event_create(&ready_, kCuEventDisableTiming), "cannot create an event");
}

CudaEngine::~CudaEngine() {
  try {
    const ContextGuard guard(*device_);
    for (CuStream stream : {out_, in_}) {
      if (stream == nullptr) continue;
      driver_.stream_synchronize(stream);
      driver_.stream_destroy(stream);
    }
    for (auto& entry : tickets_.all()) events_.push_back(entry.second.event);
    for (CuEvent event : events_) driver_.event_destroy(event);
    if (ready_ != nullptr) driver_.event_destroy(ready_);
  } catch (const Failure&) {
    // The driver is gone, and with it everything that was to be destroyed.
  }
}

CuEvent CudaEngine::take_event() {
  CuEvent event = nullptr;
  if (events_.empty()) {
    driver_.check(driver_.event_create(&event, kCuEventDisableTiming), "cannot create an event");
  } else {
    event = events_.back();
    events_.pop_back();
  }
  return event;
}

void CudaEngine::submit(std::int64_t number, Direction direction, Work work, std::uint64_t stream, std::string name) {
  for (const auto& slab : work.slabs) {
    if (!slab->pinned()) throw Failure(Status::invalid, "the slab is not pinned, so a copy would hold up the host");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  tickets_.check(number);
  const ContextGuard guard(*device_);
  Ticket ticket{direction, std::move(name), {}, take_event(), std::move(work.slabs)};
  std::size_t begun = 0;
  ticket.failure = enqueue(direction, work, handle(stream), ticket.event, &begun);
  if (!ticket.failure.empty()) {
    const auto after = std::lower_bound(work.ends.begin(), work.ends.end(), std::max<std::size_t>(begun, 1));
    ticket.name = line_of(ticket.name, static_cast<std::size_t>(after - work.ends.begin()));
  }
  tickets_.add(number, std::move(ticket));
}

// An empty text where everything is on its way. After a failure the event stands behind what was begun, so that
// whoever waits is still behind it. `begun`: pieces that the driver was asked for, the last one in vain after a failure.
std::string CudaEngine::enqueue(Direction direction, const Work& work, CuStream compute, CuEvent event,
                                std::size_t* begun) {
  const CuStream stream = stream_of(direction);
  CuResult result = driver_.event_record(ready_, compute);
  if (result == kCuSuccess) result = driver_.stream_wait_event(stream, ready_, 0);
  for (const Piece& piece : work.pieces) {
    if (result != kCuSuccess) break;
    ++*begun;
    result = copy(direction, piece);
  }
  const CuResult recorded = driver_.event_record(event, stream);
  if (result == kCuSuccess) result = recorded;
  return result == kCuSuccess ? std::string() : driver_.name_of(result);
}

CuResult CudaEngine::copy(Direction direction, const Piece& piece) const {
  if (piece.height > 1) return copy_rows(direction, piece);
  if (direction == Direction::to_host) return driver_.copy_to_host(piece.host, piece.device, piece.width, out_);
  return driver_.copy_to_device(piece.device, piece.host, piece.width, in_);
}

CuResult CudaEngine::copy_rows(Direction direction, const Piece& piece) const {
  CuMemcpy2D copy{};
  copy.width = piece.width;
  copy.height = piece.height;
  if (direction == Direction::to_host) {
    copy.src_type = kCuMemoryDevice;
    copy.src_device = piece.device;
    copy.src_pitch = piece.device_pitch;
    copy.dst_type = kCuMemoryHost;
    copy.dst_host = piece.host;
    copy.dst_pitch = piece.host_pitch;
  } else {
    copy.src_type = kCuMemoryHost;
    copy.src_host = piece.host;
    copy.src_pitch = piece.host_pitch;
    copy.dst_type = kCuMemoryDevice;
    copy.dst_device = piece.device;
    copy.dst_pitch = piece.device_pitch;
  }
  return driver_.copy_2d(&copy, stream_of(direction));
}

void CudaEngine::wait(std::int64_t number, std::uint64_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const ContextGuard guard(*device_);
  const Ticket ticket = tickets_.take(number);
  const CuResult result = driver_.stream_wait_event(handle(stream), ticket.event, 0);
  events_.push_back(ticket.event);
  std::string why = ticket.failure;
  if (why.empty() && result != kCuSuccess) why = driver_.name_of(result);
  if (!why.empty()) throw Failure(Status::copy_failed, described(ticket.direction, ticket.name) + ": " + why);
}

bool CudaEngine::cancel(std::int64_t number, std::uint64_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const ContextGuard guard(*device_);
  const Ticket ticket = tickets_.take(number);
  // What a stream was given cannot be taken back from it.
  driver_.stream_wait_event(handle(stream), ticket.event, 0);
  events_.push_back(ticket.event);
  return false;
}

bool CudaEngine::done(std::int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const ContextGuard guard(*device_);
  Ticket& ticket = tickets_.at(number);
  const CuResult result = driver_.event_query(ticket.event);
  if (result == kCuNotReady) return false;
  if (result != kCuSuccess && ticket.failure.empty()) ticket.failure = driver_.name_of(result);
  return true;
}

void CudaEngine::drain() {
  CuStream out, in;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    out = out_;
    in = in_;
  }
  const ContextGuard guard(*device_);
  // A failure of what ran before belongs to its ticket.
  driver_.stream_synchronize(out);
  driver_.stream_synchronize(in);
}

std::int64_t CudaEngine::num_open() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<std::int64_t>(tickets_.all().size());
}

}  // namespace memo_core

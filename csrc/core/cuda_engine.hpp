// Copies by the device's copy engines: one stream each way, ordered with compute by events.
//
//   to host:    compute ...makes the source... record(ready)      compute ... wait(done) -> may reuse the source
//               out            wait(ready) copy copy copy record(done)
//
//   to device:  compute ...the target's memory was last used... record(ready)     compute ... wait(done) -> uses it
//               in             wait(ready) copy record(done)
//
// Nothing waits on the host. An event is taken from a pool per ticket and goes back at once when the ticket is used
// up, since a stream that was told to wait has noted what to wait for. `ready` is one event for all submissions for the
// same reason.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "engine.hpp"

namespace memo_core {

class CudaEngine : public Engine {
 public:
  explicit CudaEngine(std::shared_ptr<CudaDevice> device);
  ~CudaEngine() override;

  void submit(std::int64_t ticket, Direction direction, Work work, std::uint64_t stream, std::string name) override;
  void wait(std::int64_t ticket, std::uint64_t stream) override;
  bool cancel(std::int64_t ticket, std::uint64_t stream) override;
  bool done(std::int64_t ticket) override;
  void drain() override;
  std::uint64_t stream(Direction direction) override { return reinterpret_cast<std::uint64_t>(stream_of(direction)); }
  std::int64_t num_open() override;

 private:
  struct Ticket {
    Direction direction;
    std::string name;
    std::string failure;
    CuEvent event;
    std::vector<std::shared_ptr<Slab>> slabs;
  };

  CuStream stream_of(Direction direction) const { return direction == Direction::to_host ? out_ : in_; }
  CuEvent take_event();
  std::string enqueue(Direction direction, const Work& work, CuStream compute, CuEvent event, std::size_t* begun);
  CuResult copy(Direction direction, const Piece& piece) const;
  CuResult copy_rows(Direction direction, const Piece& piece) const;

  std::shared_ptr<CudaDevice> device_;
  const CudaDriver& driver_;
  std::mutex mutex_;
  CuStream out_ = nullptr;
  CuStream in_ = nullptr;
  CuEvent ready_ = nullptr;
  std::vector<CuEvent> events_;  // free ones
  Tickets<Ticket> tickets_;
};

}  // namespace memo_core

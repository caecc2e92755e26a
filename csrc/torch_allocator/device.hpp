// What the arena asks of a device: order between streams. CUDA in the shell, threads or nothing in tests.
#pragma once

#include <cstdint>

namespace memo_arena {

using Stream = std::uint64_t;  // a cudaStream_t; 0 is the default stream
using Event = std::uint64_t;   // 0: none

class Device {
 public:
  virtual ~Device() = default;
  // An event behind everything that `stream` was given so far; 0 where that cannot be (the stream is being captured into
  // a graph, or the device reports an error).
  virtual Event record(Stream stream) = 0;
  // What `stream` is given from now on runs behind `event`; false where that cannot be.
  virtual bool wait(Stream stream, Event event) = 0;
  // Nobody will wait for `event` any more.
  virtual void release(Event event) = 0;
};

}  // namespace memo_arena

// Touching fresh memory by several threads, front to back, so that its start can be used while its end is touched.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace memo_core {

class Populator {
 public:
  Populator(std::uint8_t* base, std::size_t size, int threads);
  ~Populator();
  Populator(const Populator&) = delete;
  Populator& operator=(const Populator&) = delete;

  // Waits until [0, end) is there; an errno where the system refused a part of it.
  int wait_until(std::size_t end);
  // No further block is begun; returns when the threads are done.
  void stop();

 private:
  void work();

  std::uint8_t* base_;
  std::size_t size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t next_ = 0;          // first block that nobody has begun
  std::size_t front_ = 0;         // blocks [0, front_) are done
  std::vector<bool> done_;
  int error_ = 0;
  bool stopped_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace memo_core

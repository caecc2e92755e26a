// Copies between two places in host memory by a few threads: the engine of machines without a GPU.
//
// Each direction is a queue, as a stream is: its first submission is cut into slices that the threads share, and the
// next begins when the last slice is done. Streams have no meaning here; who waits, waits.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "engine.hpp"

namespace memo_core {

class ThreadEngine : public Engine {
 public:
  explicit ThreadEngine(int threads);
  ~ThreadEngine() override;

  void submit(std::int64_t ticket, Direction direction, Work work, std::uint64_t stream, std::string name) override;
  void wait(std::int64_t ticket, std::uint64_t stream) override;
  bool cancel(std::int64_t ticket, std::uint64_t stream) override;
  bool done(std::int64_t ticket) override;
  void drain() override;
  std::uint64_t stream(Direction) override { return 0; }
  std::int64_t num_open() override;

 private:
  struct Job {
    Direction direction;
    std::vector<Piece> slices;
    std::vector<std::shared_ptr<Slab>> slabs;
    std::size_t next = 0;      // first slice that nobody has begun
    std::size_t finished = 0;  // slices that are copied
    bool complete() const { return finished == slices.size(); }
  };
  using Queue = std::deque<std::shared_ptr<Job>>;

  void work();
  void stop();
  std::shared_ptr<Job> next_job();
  void finish(const std::shared_ptr<Job>& job);

  std::mutex mutex_;
  std::condition_variable work_there_;
  std::condition_variable job_done_;
  Queue queues_[2];
  int turn_ = 0;  // the direction that is looked at first, so that neither starves
  bool stopping_ = false;
  Tickets<std::shared_ptr<Job>> tickets_;
  std::vector<std::thread> threads_;
};

}  // namespace memo_core

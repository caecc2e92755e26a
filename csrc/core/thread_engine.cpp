#include "thread_engine.hpp"

#include <algorithm>
#include <cstring>

#include "threads.hpp"

namespace memo_core {
namespace {

constexpr std::size_t kSlice = std::size_t{1} << 20;

// Slices of about kSlice bytes: parts of a long run, or several short ones.
void cut(const Piece& piece, std::vector<Piece>& slices) {
  if (piece.height == 1) {
    for (std::size_t begin = 0; begin < piece.width; begin += kSlice) {
      const std::size_t size = std::min(kSlice, piece.width - begin);
      slices.push_back({piece.host + begin, piece.device + begin, size, 1, size, size});
    }
    return;
  }
  const std::size_t rows = std::max<std::size_t>(kSlice / piece.width, 1);
  for (std::size_t row = 0; row < piece.height; row += rows) {
    slices.push_back({piece.host + row * piece.host_pitch, piece.device + row * piece.device_pitch, piece.width,
                      std::min(rows, piece.height - row), piece.host_pitch, piece.device_pitch});
  }
}

void copy(Direction direction, const Piece& slice) {
  auto* device = reinterpret_cast<std::uint8_t*>(slice.device);
  for (std::size_t row = 0; row < slice.height; ++row) {
    std::uint8_t* one = slice.host + row * slice.host_pitch;
    std::uint8_t* other = device + row * slice.device_pitch;
    if (direction == Direction::to_host) {
      std::memcpy(one, other, slice.width);
    } else {
      std::memcpy(other, one, slice.width);
    }
  }
}

}  // namespace

ThreadEngine::ThreadEngine(int threads) {
  start_threads(threads_, static_cast<std::size_t>(std::max(threads, 1)), [this] { work(); }, [this] { stop(); });
}

ThreadEngine::~ThreadEngine() { stop(); }

void ThreadEngine::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  work_there_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

// A job with a slice to begin; null where there is none. Only the first of a queue may run.
std::shared_ptr<ThreadEngine::Job> ThreadEngine::next_job() {
  for (int i = 0; i < 2; ++i) {
    const int direction = (turn_ + i) % 2;
    Queue& queue = queues_[direction];
    if (!queue.empty() && queue.front()->next < queue.front()->slices.size()) {
      turn_ = 1 - direction;
      return queue.front();
    }
  }
  return nullptr;
}

void ThreadEngine::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    const std::shared_ptr<Job> job = next_job();
    if (job == nullptr) {
      // What was submitted before the end is still copied.
      if (stopping_ && queues_[0].empty() && queues_[1].empty()) return;
      work_there_.wait(lock);
      continue;
    }
    const Piece slice = job->slices[job->next++];
    lock.unlock();
    copy(job->direction, slice);
    lock.lock();
    ++job->finished;
    if (job->complete()) finish(job);
  }
}

void ThreadEngine::finish(const std::shared_ptr<Job>& job) {
  Queue& queue = queues_[static_cast<int>(job->direction)];
  queue.erase(std::find(queue.begin(), queue.end(), job));
  job->slabs.clear();
  job_done_.notify_all();
  work_there_.notify_all();
}

void ThreadEngine::submit(std::int64_t ticket, Direction direction, Work work, std::uint64_t, std::string) {
  auto job = std::make_shared<Job>();
  job->direction = direction;
  job->slabs = std::move(work.slabs);
  for (const Piece& piece : work.pieces) cut(piece, job->slices);
  const std::lock_guard<std::mutex> lock(mutex_);
  tickets_.check(ticket);
  if (!job->slices.empty()) queues_[static_cast<int>(direction)].push_back(job);
  tickets_.add(ticket, job);
  work_there_.notify_all();
}

void ThreadEngine::wait(std::int64_t ticket, std::uint64_t) {
  std::unique_lock<std::mutex> lock(mutex_);
  const std::shared_ptr<Job> job = tickets_.take(ticket);
  job_done_.wait(lock, [&] { return job->complete(); });
}

bool ThreadEngine::cancel(std::int64_t ticket, std::uint64_t) {
  std::unique_lock<std::mutex> lock(mutex_);
  const std::shared_ptr<Job> job = tickets_.take(ticket);
  if (!job->complete() && job->next == 0) {
    finish(job);
    return true;
  }
  job_done_.wait(lock, [&] { return job->complete(); });
  return false;
}

bool ThreadEngine::done(std::int64_t ticket) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return tickets_.at(ticket)->complete();
}

void ThreadEngine::drain() {
  std::unique_lock<std::mutex> lock(mutex_);
  job_done_.wait(lock, [&] { return queues_[0].empty() && queues_[1].empty(); });
}

std::int64_t ThreadEngine::num_open() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<std::int64_t>(tickets_.all().size());
}

}  // namespace memo_core

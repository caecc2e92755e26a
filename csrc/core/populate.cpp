#include "populate.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "threads.hpp"

namespace memo_core {
namespace {

constexpr std::size_t kBlock = std::size_t{32} << 20;
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14; older C libraries do not name it

int populate(std::uint8_t* start, std::size_t size) {
  if (madvise(start, size, kPopulateWrite) == 0) return 0;
  if (errno != EINVAL) return errno;
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (std::size_t offset = 0; offset < size; offset += page) {
    *const_cast<volatile std::uint8_t*>(start + offset) = 0;
  }
  return 0;
}

}  // namespace

Populator::Populator(std::uint8_t* base, std::size_t size, int threads) : base_(base), size_(size) {
  done_.resize((size + kBlock - 1) / kBlock, false);
  const auto most = static_cast<std::size_t>(std::max(threads, 1));
  start_threads(threads_, std::min(most, done_.size()), [this] { work(); }, [this] { stop(); });
}

Populator::~Populator() { stop(); }

void Populator::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopped_ && error_ == 0 && next_ < done_.size()) {
    const std::size_t block = next_++;
    lock.unlock();
    const std::size_t begin = block * kBlock;
    const int result = populate(base_ + begin, std::min(kBlock, size_ - begin));
    lock.lock();
    if (result != 0) {
      error_ = result;
    } else {
      done_[block] = true;
      while (front_ < done_.size() && done_[front_]) ++front_;
    }
    changed_.notify_all();
  }
}

int Populator::wait_until(std::size_t end) {
  const std::size_t blocks = (end + kBlock - 1) / kBlock;
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return front_ >= blocks || error_ != 0; });
  return front_ >= blocks ? 0 : error_;
}

void Populator::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
  }
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

}  // namespace memo_core

#include "slab.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "failure.hpp"
#include "populate.hpp"

namespace memo_core {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr long kPreferNode = 1;  // MPOL_PREFERRED

std::size_t page_size() {
  static const std::size_t size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

std::size_t round_up(std::size_t size, std::size_t unit) { return (size + unit - 1) / unit * unit; }

std::string bytes(std::size_t count) { return std::to_string(count) + " bytes"; }

// Preferred, not bound: a full node must not end the process.
bool prefer_node(void* base, std::size_t size, int node) {
#ifdef SYS_mbind
  if (node < 0 || node >= 64) return false;
  const unsigned long mask = 1UL << node;
  return syscall(SYS_mbind, base, size, kPreferNode, &mask, sizeof(mask) * 8 + 1, 0) == 0;
#else
  (void)base, (void)size, (void)node;
  return false;
#endif
}

}  // namespace

std::shared_ptr<Slab> Slab::make(const SlabRequest& request) {
  if (request.size == 0) throw Failure(Status::invalid, "a slab of 0 bytes was asked for");
  if (request.size > (std::size_t{1} << 48)) {
    throw Failure(Status::refused, "a slab of " + bytes(request.size) + " is more than a process can address");
  }
  std::shared_ptr<Slab> slab(new Slab);
  slab->device_ = request.device;
  slab->map(request.size, request.numa_node);
  slab->populate_and_register(request);
  slab->free_ = std::make_unique<FreeList>(slab->size_);
  return slab;
}

Slab::~Slab() {
  try {
    close();
  } catch (const Failure&) {
    // The driver is gone already (the process ends); so are its registrations.
  }
  if (base_ != nullptr && mapped_ > 0) munmap(base_, mapped_);
}

void Slab::map(std::size_t size, int numa_node) {
  process_ = static_cast<long>(getpid());
  size_ = size;
  mapped_ = round_up(size, page_size());
  // Started at a huge page: more is mapped than needed and both ends are given back.
  const std::size_t extra = mapped_ >= kHugePage ? kHugePage : 0;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* wide = mmap(nullptr, mapped_ + extra, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (wide == MAP_FAILED) {
    const int reason = errno;
    mapped_ = 0;
    throw Failure(Status::refused, "the system does not map " + bytes(size) + ": " + std::strerror(reason));
  }
  auto* start = static_cast<std::uint8_t*>(wide);
  if (extra > 0) {
    const auto address = reinterpret_cast<std::uintptr_t>(wide);
    const std::size_t head = round_up(address, kHugePage) - address;
    if (head > 0) munmap(start, head);
    if (extra - head > 0) munmap(start + head + mapped_, extra - head);
    start += head;
    madvise(start, mapped_, MADV_HUGEPAGE);  // a kernel without huge pages says no, and small pages are what there is
  }
  base_ = start;
  on_node_ = prefer_node(base_, mapped_, numa_node);
  // A child process would get copies of pinned pages at once: twice the memory for nothing.
  if (device_ != nullptr) madvise(base_, mapped_, MADV_DONTFORK);
}

void Slab::populate_and_register(const SlabRequest& request) {
  if (request.threads == 0 && device_ == nullptr) return;  // comes when it is used
  const std::size_t chunk = request.chunk == 0 ? mapped_ : round_up(request.chunk, kHugePage);
  chunk_ = std::min(chunk, mapped_);
  Populator populator(base_, mapped_, request.threads);
  for (std::size_t begin = 0; begin < mapped_; begin += chunk_) {
    const std::size_t end = std::min(begin + chunk_, mapped_);
    const int reason = populator.wait_until(end);
    if (reason != 0) {
      refusal_ = std::string("the system has no more memory: ") + std::strerror(reason);
    } else if (device_ == nullptr || register_chunk(begin, end)) {
      registered_ = end;
      continue;
    }
    populator.stop();
    if (registered_ == 0 || !request.allow_partial) {
      throw Failure(Status::refused, refusal_ + " (asked for " + bytes(request.size) + ", refused after " +
                                         bytes(registered_) + ")");
    }
    cut(registered_);
    break;
  }
  pinned_ = device_ != nullptr;
}

bool Slab::register_chunk(std::size_t begin, std::size_t end) {
  const ContextGuard guard(*device_);
  const CuResult result = device_->driver().host_register(base_ + begin, end - begin, kCuHostRegisterPortable);
  if (result == kCuSuccess) return true;
  refusal_ = "CUDA does not pin more host memory: " + device_->driver().name_of(result);
  return false;
}

void Slab::cut(std::size_t size) {
  munmap(base_ + size, mapped_ - size);
  mapped_ = size;
  size_ = size;
}

std::size_t Slab::chunk_end(std::size_t offset) const {
  if (!pinned_) return mapped_;
  return std::min((offset / chunk_ + 1) * chunk_, mapped_);
}

std::int64_t Slab::take(std::uint64_t size, std::uint64_t alignment) {
  if (size == 0 || alignment == 0) throw Failure(Status::invalid, "a slot of 0 bytes, or aligned to 0, was asked for");
  if (!open()) throw Failure(Status::closed, "the slab was freed: no slot can be taken from it");
  const std::lock_guard<std::mutex> lock(mutex_);
  return free_->take(size, alignment);
}

void Slab::give(std::uint64_t offset) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!free_->give(offset)) {
    throw Failure(Status::invalid,
                  "no slot is taken at offset " + std::to_string(offset) + ": it was given back before");
  }
}

std::uint64_t Slab::in_use() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return free_->in_use();
}

void Slab::close() {
  if (open_.exchange(false)) unregister();
}

void Slab::unregister() {
  // A forked child owns neither the registration nor the driver's state.
  if (device_ == nullptr || registered_ == 0 || process_ != static_cast<long>(getpid())) return;
  const ContextGuard guard(*device_);
  for (std::size_t begin = 0; begin < registered_; begin += chunk_) device_->driver().host_unregister(base_ + begin);
  registered_ = 0;
}

}  // namespace memo_core

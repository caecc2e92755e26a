// One piece of host memory of exactly the size asked for (to the page), pinned where a device is given.
//
//   map (huge pages where the kernel has them)  ->  all threads touch, in order  ->  chunk after chunk is registered
//                                                                                    while the next are touched
//
// A chunk is registered on its own, since drivers refuse very large ones and since a refusal then leaves what was
// pinned before it. A copy may not cross from one registration into another, so copies are cut at chunk borders
// (see copies.cpp).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "cuda_driver.hpp"
#include "free_list.hpp"

namespace memo_core {

struct SlabRequest {
  std::size_t size = 0;
  std::size_t chunk = 0;         // bytes per registration; 0: one for all
  int threads = 1;               // that touch the memory; 0, without a device: it comes when it is used
  int numa_node = -1;            // preferred node; -1: the kernel's choice
  bool allow_partial = false;    // keep what was pinned before a refusal
  std::shared_ptr<CudaDevice> device;  // null: not pinned
};

class Slab {
 public:
  // Throws Failure(refused) with the bytes that had been pinned by then, after which nothing is kept.
  static std::shared_ptr<Slab> make(const SlabRequest& request);
  ~Slab();
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  std::uint8_t* base() const { return base_; }
  std::size_t size() const { return size_; }          // usable bytes: as asked, or less after a refusal
  std::size_t mapped() const { return mapped_; }      // `size` to the page; the bytes that are pinned on CUDA
  bool pinned() const { return pinned_; }
  bool on_node() const { return on_node_; }           // the kernel took the wish for a NUMA node
  const std::string& refusal() const { return refusal_; }  // why it is smaller than asked; empty otherwise
  bool open() const { return open_.load(std::memory_order_acquire); }
  // Where the registration that holds `offset` ends.
  std::size_t chunk_end(std::size_t offset) const;

  std::int64_t take(std::uint64_t size, std::uint64_t alignment);
  void give(std::uint64_t offset);
  std::uint64_t in_use() const;

  // Unpins; no copy may be under way on it. The memory stays mapped until the slab is destroyed.
  void close();

 private:
  Slab() = default;
  void map(std::size_t size, int numa_node);
  void populate_and_register(const SlabRequest& request);
  bool register_chunk(std::size_t begin, std::size_t end);
  void unregister();
  void cut(std::size_t size);

  std::uint8_t* base_ = nullptr;
  std::size_t size_ = 0;
  std::size_t mapped_ = 0;
  std::size_t chunk_ = 0;
  std::size_t registered_ = 0;  // bytes from the start that are registered
  bool pinned_ = false;
  bool on_node_ = false;
  long process_ = 0;
  std::string refusal_;
  std::atomic<bool> open_{true};
  std::shared_ptr<CudaDevice> device_;
  mutable std::mutex mutex_;
  std::unique_ptr<FreeList> free_;
};

}  // namespace memo_core

// A plan: which request of a step lives where. Checked once, when it is made.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "device.hpp"

namespace memo_arena {

// Addresses and sizes are multiples of this, as those of PyTorch's allocator are.
constexpr std::uint64_t kAlignment = 512;
// Bytes of the largest small request. The planner keeps them and larger ones apart too.
constexpr std::uint64_t kSmall = std::uint64_t{1} << 20;
// How many sizes in a row say where in the step a stream is.
constexpr std::size_t kGram = 4;

constexpr std::uint64_t rounded(std::uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The offset of a request that outlives the step: it has a place in the order, and the native allocator serves it.
constexpr std::uint64_t kNative = ~std::uint64_t{0};

// One request of the step: `size` bytes at `offset` from event `lower` until just before event `upper`. Where the size is
// not certain it has room for `most` bytes, and `least` is what it may be; both 0 where it is. C layout: it crosses the C
// interface.
struct Slot {
  std::uint64_t lower;
  std::uint64_t upper;
  std::uint64_t size;
  std::uint64_t offset;
  Stream stream;
  std::uint64_t least = 0;
  std::uint64_t most = 0;

  std::uint64_t room() const { return most > size ? most : size; }
};

// What one stream asks for, in order; small requests have a lane of their own, so that some that come on top of the plan
// (scratch of a kernel) do not cost large ones their place.
struct Lane {
  Stream stream = 0;
  bool small = false;
  std::vector<std::uint64_t> sizes;
  std::vector<std::uint64_t> offsets;
  std::vector<std::uint64_t> least;   // sizes that are served there too, where none is planned
  std::vector<std::uint64_t> most;
  std::vector<std::size_t> numbers;   // of the slots in the plan
  // Hash of kGram sizes in a row -> where the last of them stands, ascending.
  std::unordered_map<std::uint64_t, std::vector<std::size_t>> grams;

  std::size_t count() const { return sizes.size(); }
};

class Plan {
 public:
  // Throws std::invalid_argument, naming the slot: nothing in it, not in order, misplaced, two that share a byte at a
  // time, or outside of `capacity` bytes.
  Plan(const std::vector<Slot>& slots, std::uint64_t capacity);

  const std::vector<Lane>& lanes() const { return lanes_; }
  std::uint64_t extent() const { return extent_; }

 private:
  std::vector<Lane> lanes_;
  std::uint64_t extent_ = 0;
};

// Of kGram sizes from `sizes` on; 0 where they are all equal, which says nothing about a place.
std::uint64_t gram_hash(const std::uint64_t* sizes);

}  // namespace memo_arena

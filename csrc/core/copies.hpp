// A copy as it is asked for, and the pieces that a copy engine is given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <shared_mutex>
#include <vector>

#include "slab.hpp"

namespace memo_core {

enum class Direction : std::int32_t { to_host = 0, to_device = 1 };

// `height` runs of `width` bytes, each `pitch` bytes behind the one before. C layout: it crosses the C interface.
struct Copy {
  std::uint64_t host;
  std::uint64_t device;
  std::uint64_t width;
  std::uint64_t height;
  std::uint64_t host_pitch;
  std::uint64_t device_pitch;
};

// What is left of a copy inside one registration; height 1 is one contiguous run.
struct Piece {
  std::uint8_t* host;
  std::uint64_t device;
  std::size_t width;
  std::size_t height;
  std::size_t host_pitch;
  std::size_t device_pitch;
};

// Pieces, and the slabs that have to stay until they are copied. `ends`: how many pieces there are with each copy.
struct Work {
  std::vector<Piece> pieces;
  std::vector<std::size_t> ends;
  std::vector<std::shared_ptr<Slab>> slabs;
};

// All slabs that are open, by address.
class SlabTable {
 public:
  void add(const std::shared_ptr<Slab>& slab);
  void remove(const std::shared_ptr<Slab>& slab);
  // The open slab that holds all of [address, address + size); throws Failure(out_of_range).
  std::shared_ptr<Slab> find(std::uint64_t address, std::uint64_t size) const;

 private:
  mutable std::shared_mutex mutex_;
  std::map<std::uint64_t, std::shared_ptr<Slab>> slabs_;
};

// Bytes from the first to the last that `height` runs touch; throws Failure(out_of_range) where that overflows.
std::uint64_t span(std::uint64_t width, std::uint64_t height, std::uint64_t pitch);

// Checks `copy` against the slabs and appends its pieces; throws Failure.
void plan_copy(const Copy& copy, const SlabTable& slabs, Work& work);

}  // namespace memo_core

// Remembers states that were searched to the end without success.
//
// A fixed table, two entries a bucket: a full bucket loses its older entry, which costs
// time, never correctness. A state is 128 hashed bits, of which the bucket and the tag keep
// 64 + log2(buckets): over 10^9 look-ups the chance of one wrong hit stays below 10^-9.
#pragma once

#include <cstdint>
#include <vector>

#include "instance.hpp"

namespace memo {

struct StateKey {
  std::uint64_t bucket = 0;
  std::uint64_t tag = 0;

  void toggle(std::uint64_t what) {
    bucket ^= Random::mix(what * 2 + 0x51ed270b0b0b1ULL);
    tag ^= Random::mix(what * 2 + 0x8e9c7a6d5f4e3ULL);
  }
};

class FailedStates {
 public:
  explicit FailedStates(int log2_buckets)
      : mask_((std::uint64_t{1} << log2_buckets) - 1), tags_(2 * (mask_ + 1), 0) {}

  bool contains(const StateKey& key) const {
    const std::uint64_t* entry = &tags_[2 * (key.bucket & mask_)];
    return key.tag != 0 && (entry[0] == key.tag || entry[1] == key.tag);
  }

  void insert(const StateKey& key) {
    std::uint64_t* entry = &tags_[2 * (key.bucket & mask_)];
    entry[1] = entry[0];
    entry[0] = key.tag;
  }

 private:
  std::uint64_t mask_;
  std::vector<std::uint64_t> tags_;
};

}  // namespace memo

// First fit over one slab: the lowest free interval that is large enough; neighbours coalesce when freed.
#pragma once

#include <cstdint>
#include <map>

namespace memo_core {

class FreeList {
 public:
  explicit FreeList(std::uint64_t size) : size_(size) {
    if (size > 0) free_[0] = size;
  }

  // Offset of `size` bytes, a multiple of `alignment`; -1 where nothing fits.
  std::int64_t take(std::uint64_t size, std::uint64_t alignment) {
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      const std::uint64_t begin = it->first, end = begin + it->second;
      const std::uint64_t start = (begin + alignment - 1) / alignment * alignment;
      if (start > end || end - start < size) continue;
      free_.erase(it);
      if (start > begin) free_[begin] = start - begin;
      if (start + size < end) free_[start + size] = end - start - size;
      taken_[start] = size;
      in_use_ += size;
      return static_cast<std::int64_t>(start);
    }
    return -1;
  }

  // False where nothing was taken at `offset`: given back twice, or never taken.
  bool give(std::uint64_t offset) {
    const auto found = taken_.find(offset);
    if (found == taken_.end()) return false;
    std::uint64_t begin = offset, length = found->second;
    taken_.erase(found);
    in_use_ -= length;
    auto after = free_.lower_bound(begin);
    if (after != free_.end() && after->first == begin + length) {
      length += after->second;
      after = free_.erase(after);
    }
    if (after != free_.begin()) {
      auto before = std::prev(after);
      if (before->first + before->second == begin) {
        before->second += length;
        return true;
      }
    }
    free_[begin] = length;
    return true;
  }

  std::uint64_t in_use() const { return in_use_; }
  std::uint64_t size() const { return size_; }

 private:
  std::uint64_t size_;
  std::uint64_t in_use_ = 0;
  std::map<std::uint64_t, std::uint64_t> free_;   // offset -> length
  std::map<std::uint64_t, std::uint64_t> taken_;  // offset -> length
};

}  // namespace memo_core

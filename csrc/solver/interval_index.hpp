// Which addresses are taken during a range of slots? Answered without a list of
// conflicts, which would take gigabytes for a large training trace.
//
// A segment tree over the slots. A placed request covers O(log slots) nodes:
//
//   below(v)  addresses taken by any request that touches the range of v
//   whole(v)  addresses taken by requests that cover the whole range of v
//
// The addresses taken during [first, last] are the union of below(v) over the
// nodes that make up the range and of whole(u) over the ancestors u of those.
// Neighbouring ranges merge, so the sets stay short.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "instance.hpp"

namespace memo {

struct Span {
  Offset begin;
  Offset end;
};

// Sorted, disjoint, merged address ranges.
class SpanSet {
 public:
  void clear() { spans_.clear(); }

  void add(Offset begin, Offset end) {
    auto at = std::lower_bound(spans_.begin(), spans_.end(), begin,
                               [](const Span& span, Offset value) { return span.end < value; });
    if (at == spans_.end() || at->begin > end) {
      spans_.insert(at, Span{begin, end});
      return;
    }
    at->begin = std::min(at->begin, begin);
    auto next = at + 1;
    Offset top = std::max(at->end, end);
    while (next != spans_.end() && next->begin <= top) {
      top = std::max(top, next->end);
      ++next;
    }
    at->end = top;
    spans_.erase(at + 1, next);
  }

  const std::vector<Span>& spans() const { return spans_; }

 private:
  std::vector<Span> spans_;
};

class IntervalIndex {
 public:
  explicit IntervalIndex(std::int32_t num_slots) {
    while (leaves_ < num_slots) leaves_ *= 2;
    below_.resize(2 * static_cast<std::size_t>(leaves_));
    whole_.resize(2 * static_cast<std::size_t>(leaves_));
  }

  void clear() {
    for (auto& set : below_) set.clear();
    for (auto& set : whole_) set.clear();
  }

  void add(std::int32_t first, std::int32_t last, Offset begin, Offset end) {
    std::int32_t left = first + leaves_;
    std::int32_t right = last + leaves_;
    // Ancestors of the two end leaves are the nodes that the range touches without being inside it.
    const std::int32_t left_leaf = left;
    const std::int32_t right_leaf = right;
    for (++right; left < right; left >>= 1, right >>= 1) {
      if (left & 1) cover(left++, begin, end);
      if (right & 1) cover(--right, begin, end);
    }
    // Adding to an ancestor twice, or to a node already covered, changes nothing.
    for (std::int32_t node = left_leaf; node >= 1; node >>= 1) below_[node].add(begin, end);
    for (std::int32_t node = right_leaf; node >= 1; node >>= 1) below_[node].add(begin, end);
  }

  // Lowest aligned offset from `from` upward that is free for `size` during the range.
  Offset first_free(std::int32_t first, std::int32_t last, Offset size, Offset alignment,
                    Offset from = 0) {
    collect(first, last);
    Offset at = align_up(from, alignment);
    bool moved = true;
    while (moved) {
      moved = false;
      for (auto& cursor : cursors_) {
        while (cursor.at != cursor.end && cursor.at->end <= at) ++cursor.at;
        while (cursor.at != cursor.end && cursor.at->begin < at + size) {
          at = align_up(cursor.at->end, alignment);
          moved = true;
          ++cursor.at;
          while (cursor.at != cursor.end && cursor.at->end <= at) ++cursor.at;
        }
      }
    }
    return at;
  }

 private:
  struct Cursor {
    const Span* at;
    const Span* end;
  };

  void cover(std::int32_t node, Offset begin, Offset end) {
    whole_[node].add(begin, end);
    below_[node].add(begin, end);
  }

  void use(const SpanSet& set) {
    const auto& spans = set.spans();
    if (!spans.empty()) cursors_.push_back(Cursor{spans.data(), spans.data() + spans.size()});
  }

  void collect(std::int32_t first, std::int32_t last) {
    cursors_.clear();
    std::int32_t left = first + leaves_;
    std::int32_t right = last + leaves_;
    const std::int32_t left_leaf = left;
    const std::int32_t right_leaf = right;
    for (++right; left < right; left >>= 1, right >>= 1) {
      if (left & 1) use(below_[left++]);
      if (right & 1) use(below_[--right]);
    }
    for (std::int32_t node = left_leaf; node >= 1; node >>= 1) use(whole_[node]);
    for (std::int32_t node = right_leaf; node >= 1; node >>= 1) use(whole_[node]);
  }

  std::int32_t leaves_ = 1;
  std::vector<SpanSet> below_;
  std::vector<SpanSet> whole_;
  std::vector<Cursor> cursors_;
};

}  // namespace memo

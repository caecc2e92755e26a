#include "cursor.hpp"

#include <algorithm>

namespace memo_arena {

void Cursor::reset() {
  at_ = 0;
  skipped_.clear();
  seen_ = 0;
}

Match Cursor::find(const Lane& lane, std::uint64_t size) {
  std::copy(latest_.begin() + 1, latest_.end(), latest_.begin());
  latest_.back() = size;
  ++seen_;
  if (at_ < lane.count() && lane.sizes[at_] == size) return {How::at, at_};
  for (const std::size_t slot : skipped_) {
    if (lane.sizes[slot] == size) return {How::skipped, slot};
  }
  const std::size_t end = std::min(lane.count(), at_ + kAhead);
  for (std::size_t slot = at_ + 1; slot < end; ++slot) {
    if (lane.sizes[slot] == size) return {How::ahead, slot};
  }
  return elsewhere(lane);
}

// The nearest place ahead where the latest sizes stand in a row; else the nearest behind, as in a second backward.
Match Cursor::elsewhere(const Lane& lane) const {
  if (seen_ < kGram) return {How::none, 0};
  const auto found = lane.grams.find(gram_hash(latest_.data()));
  if (found == lane.grams.end()) return {How::none, 0};
  const auto ahead = std::lower_bound(found->second.begin(), found->second.end(), at_);
  const std::size_t slot = ahead != found->second.end() ? *ahead : found->second.back();
  for (std::size_t i = 0; i < kGram; ++i) {  // two grams may have one hash
    if (lane.sizes[slot + 1 - kGram + i] != latest_[i]) return {How::none, 0};
  }
  return {How::elsewhere, slot};
}

void Cursor::settle(const Match& match, bool served) {
  switch (match.how) {
    case How::at:
      ++at_;
      break;
    case How::skipped:
      if (served) skipped_.erase(std::find(skipped_.begin(), skipped_.end(), match.slot));
      break;
    case How::ahead:
      if (!served) break;
      for (; at_ < match.slot; ++at_) skipped_.push_back(at_);
      ++at_;
      while (skipped_.size() > kMostSkipped) skipped_.pop_front();
      break;
    case How::elsewhere:
      // Also where its bytes are not free: the row of sizes says where the stream is.
      at_ = match.slot + 1;
      skipped_.clear();
      break;
    case How::none:
      break;
  }
}

}  // namespace memo_arena

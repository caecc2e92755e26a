#include "cursor.hpp"

#include <algorithm>
#include <utility>

namespace memo_arena {

void Cursor::reset() {
  at_ = 0;
  skipped_.clear();
  seen_ = 0;
  since_ = 0;
  lost_ = 0;
  forget();
}

void Cursor::forget() {
  unknown_.clear();
  held_.clear();
  lent_.clear();
  doubtful_ = false;
}

bool Cursor::lent(std::uint64_t size) const { return std::find(lent_.begin(), lent_.end(), size) != lent_.end(); }

Match Cursor::find(const Lane& lane, std::uint64_t size) {
  std::copy(latest_.begin() + 1, latest_.end(), latest_.begin());
  latest_.back() = size;
  ++seen_;
  if (since_ > 0) ++since_;
  if (at_ < lane.count() && lane.sizes[at_] == size) return {How::at, at_};
  const Match row = near(lane);
  if (row.how != How::none) return row;
  for (const std::size_t slot : skipped_) {
    if (lane.sizes[slot] == size) return {How::skipped, slot};
  }
  const std::size_t end = std::min(lane.count(), at_ + kAhead);
  for (std::size_t slot = at_ + 1; slot < end; ++slot) {
    if (lane.sizes[slot] == size) return {How::ahead, slot};
  }
  const Match found = elsewhere(lane);
  return found.how != How::none ? found : roomy(lane, size);
}

// A size that stands nowhere near: of a slot whose size is not certain. But where such a slot just went to another size and
// now its own comes, that one was on top of the plan: the slots that follow are others'.
Match Cursor::roomy(const Lane& lane, std::uint64_t size) const {
  const Match none{How::none, 0};
  if (lent(size)) return none;
  const auto fits = [&](std::size_t slot) { return lane.least[slot] <= size && size <= lane.most[slot]; };
  if (at_ < lane.count() && fits(at_)) return {How::at, at_, false};
  for (const std::size_t slot : skipped_) {
    if (fits(slot)) return {How::skipped, slot, false};
  }
  const std::size_t end = std::min(lane.count(), at_ + kAhead);
  for (std::size_t slot = at_ + 1; slot < end; ++slot) {
    if (fits(slot)) return {How::ahead, slot, false};
  }
  return none;
}

// The latest sizes stand in a row that ends at `slot`.
bool Cursor::ends_at(const Lane& lane, std::size_t slot) const {
  if (slot + 1 < kGram || slot >= lane.count()) return false;
  return std::equal(latest_.begin(), latest_.end(), lane.sizes.begin() + static_cast<std::ptrdiff_t>(slot + 1 - kGram));
}

// A row within a few slots, the nearest: one request was taken for another of its size, and those that follow are not to be.
Match Cursor::near(const Lane& lane) const {
  if (seen_ < kGram || lost_ == 0 || gram_hash(latest_.data()) == 0) return {How::none, 0};
  for (std::size_t away = 1; away <= kAhead; ++away) {
    if (at_ >= away && ends_at(lane, at_ - away)) return {How::near, at_ - away};
    if (ends_at(lane, at_ + away)) return {How::near, at_ + away};
  }
  return {How::none, 0};
}

// The nearest place ahead where the latest sizes stand in a row; else the nearest behind, as in a second backward.
Match Cursor::elsewhere(const Lane& lane) const {
  if (seen_ < kGram || lost_ < kLost) return {How::none, 0};
  const auto found = lane.grams.find(gram_hash(latest_.data()));
  if (found == lane.grams.end()) return {How::none, 0};
  const auto ahead = std::lower_bound(found->second.begin(), found->second.end(), at_);
  const std::size_t slot = ahead != found->second.end() ? *ahead : found->second.back();
  return ends_at(lane, slot) ? Match{How::elsewhere, slot} : Match{How::none, 0};  // two grams may have one hash
}

void Cursor::settle(const Lane& lane, const Match& match, bool served, std::uint64_t bytes, std::vector<Found>& found) {
  lost_ = match.exact && (match.how == How::at || match.how == How::near) ? 0 : lost_ + 1;
  if (match.how == How::none) {
    if (lent(rounded(bytes))) {
      doubtful_ = true;
    } else if (unknown_.size() < kMostUnknown) {
      unknown_.push_back(bytes);
    }
    return;
  }
  if (match.exact) {
    if (!doubtful_) found = std::move(held_);
    if (match.how == How::near && since_ > 0 && match.slot - guess_.slot + 1 == since_) found.push_back(guess_);
    if (match.how == How::near || match.how == How::elsewhere) since_ = 0;
    if (match.how == How::ahead && served && unknown_.empty() && since_ == 0) {
      guess_ = {at_, bytes};
      since_ = 1;
    }
    // As many stood nowhere as were passed now: those were theirs.
    if (match.how == How::ahead && served && match.slot - at_ == unknown_.size()) {
      for (std::size_t i = 0; i < unknown_.size(); ++i) found.push_back({at_ + i, unknown_[i]});
    }
    forget();
  } else if (served) {
    unknown_.clear();
    held_.push_back({match.slot, bytes});
    if (lent_.size() == kMostUnknown) lent_.erase(lent_.begin());
    lent_.push_back(lane.sizes[match.slot]);
  }
  move(match, served);
}

void Cursor::move(const Match& match, bool served) {
  switch (match.how) {
    case How::at:
      if (served || match.exact) ++at_;
      break;
    case How::near:
      // Also where its bytes are not free: the row of sizes says where the stream is.
      for (; at_ < match.slot; ++at_) skipped_.push_back(at_);
      at_ = match.slot + 1;
      skipped_.erase(std::remove_if(skipped_.begin(), skipped_.end(), [&](std::size_t slot) { return slot >= at_; }),
                     skipped_.end());
      while (skipped_.size() > kMostSkipped) skipped_.pop_front();
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
      at_ = match.slot + 1;
      skipped_.clear();
      break;
    case How::none:
      break;
  }
}

}  // namespace memo_arena

// Where in its part of the plan one stream is.
//
//   plan      a  b  c  d  e  f  g          the next request is compared with the slot under the cursor; then kGram requests
//   skipped      b           ^cursor       in a row that stand near by move the cursor there; then with those that were
//                                          skipped, with a few ahead, and with all rows in the plan; a size that stands
//                                          nowhere goes to a slot near by that has room for it
//
// A match is only a proposal: whether the slot's bytes are free is the arena's question.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "plan.hpp"

namespace memo_arena {

enum class How { at, near, skipped, ahead, elsewhere, none };

struct Match {
  How how;
  std::size_t slot;
  bool exact = true;  // the slot has this size, not only room for it
};

// A slot of a lane, and what was asked for in its place.
struct Found {
  std::size_t slot;
  std::uint64_t bytes;
};

class Cursor {
 public:
  // The next request that can be served is the plan's first.
  void reset();
  // Where `lane` has the request for `size` (rounded) bytes; changes nothing but the memory of sizes.
  Match find(const Lane& lane, std::uint64_t size);
  // The request for `bytes` was that slot's; `served`: it got them. Without them only the slot under the cursor is
  // passed: a guess that turns out to be occupied was the wrong one. Appends to `found` what is known by now of slots
  // whose requests had other sizes.
  void settle(const Lane& lane, const Match& match, bool served, std::uint64_t bytes, std::vector<Found>& found);

 private:
  static constexpr std::size_t kAhead = 6;
  static constexpr std::size_t kMostSkipped = 6;
  static constexpr std::size_t kMostUnknown = 4;
  // Requests in a row that were not the next before a row elsewhere says more than the place does.
  static constexpr std::size_t kLost = 2;

  bool ends_at(const Lane& lane, std::size_t slot) const;
  Match near(const Lane& lane) const;
  Match elsewhere(const Lane& lane) const;
  Match roomy(const Lane& lane, std::uint64_t size) const;
  bool lent(std::uint64_t size) const;
  void forget();
  void move(const Match& match, bool served);

  std::size_t at_ = 0;
  std::deque<std::size_t> skipped_;
  std::array<std::uint64_t, kGram> latest_{};  // sizes of the latest requests, oldest first
  std::size_t seen_ = 0;
  std::size_t lost_ = 0;  // requests in a row that were not the next
  std::vector<std::uint64_t> unknown_;  // bytes of the latest requests, which stand nowhere
  // Since the latest request that stood where it was planned: who took slots that have another size, what those sizes
  // are, and whether one of them was asked for as well.
  std::vector<Found> held_;
  std::vector<std::uint64_t> lent_;
  bool doubtful_ = false;
  // The latest request that was taken for one ahead, for how many bytes, which slot was under the cursor, and how many
  // requests have come since: if a row then says that it was that slot's, it was not the other's.
  Found guess_{0, 0};
  std::size_t since_ = 0;
};

}  // namespace memo_arena

// Where in its part of the plan one stream is.
//
//   plan      a  b  c  d  e  f  g          the next request is compared with the slot under the cursor, then with those
//   skipped      b           ^cursor       that were skipped, then with a few ahead; kGram requests in a row that stand
//                                          elsewhere in the plan move the cursor there
//
// A match is only a proposal: whether the slot's bytes are free is the arena's question.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>

#include "plan.hpp"

namespace memo_arena {

enum class How { at, skipped, ahead, elsewhere, none };

struct Match {
  How how;
  std::size_t slot;
};

class Cursor {
 public:
  // The next request that can be served is the plan's first.
  void reset();
  // Where `lane` has the request for `size` (rounded) bytes; changes nothing but the memory of sizes.
  Match find(const Lane& lane, std::uint64_t size);
  // The request was that slot's; `served`: it got its bytes. Without them only the slot under the cursor is passed: a
  // guess that turns out to be occupied was the wrong one.
  void settle(const Match& match, bool served);

 private:
  static constexpr std::size_t kAhead = 6;
  static constexpr std::size_t kMostSkipped = 6;

  Match elsewhere(const Lane& lane) const;

  std::size_t at_ = 0;
  std::deque<std::size_t> skipped_;
  std::array<std::uint64_t, kGram> latest_{};  // sizes of the latest requests, oldest first
  std::size_t seen_ = 0;
};

}  // namespace memo_arena

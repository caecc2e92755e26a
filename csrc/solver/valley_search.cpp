// Fill valleys of the skyline, from an edge.
//
//        wall                     The skyline h(slot) is the top of what is placed. A valley
//     +-------+                   is a run of slots of equal height between higher walls.
//     |       |         +----     Look at its left edge slot a. What lies directly above h(a)
//     |       | a     b |         in a finished packing is either a request that begins at a,
//     |       +---------+         fits inside the valley and rests on its floor, or nothing:
//     |         valley  |         then h(a) rises, wasting at least the least height at which
//                                 anything could rest there. Slack(a) = capacity - h(a) -
//  (unplaced bytes at a) pays for waste; in a perfect packing there is none, so the
//  requests that begin at a are the only choices. The right edge works likewise.
//
// Slots inside a valley that have no slack must be covered from its floor as well, by a chain of
// requests from edge to edge: a request that no such chain contains is no choice anywhere.
//
// Branch on the slot with the fewest choices; none = dead end, one = forced. A state is the
// set of unplaced requests and the skyline; failed ones are kept across restarts, as failing
// does not depend on the order of choices. Parts of the time axis that no unplaced request
// connects are solved one after the other and never together.

#include "valley_search.hpp"

#include <algorithm>
#include <limits>
#include <vector>

#include "failed_states.hpp"

namespace memo {
namespace {

constexpr Offset kNone = std::numeric_limits<Offset>::max();
constexpr std::int32_t kMaxDepth = 6000;  // of recursion: a bounded stack; waste in such tiny steps is hopeless anyway

// One valley of the skyline.
struct Valley {
  std::int32_t from = 0;  // first slot
  std::int32_t to = 0;    // last slot
};

// Where to branch: a slot on the floor of a valley.
struct Branch {
  Valley valley;
  std::int32_t slot = 0;
  Offset waste = kNone;  // rise of an edge slot when nothing rests there; kNone = not possible
  std::int32_t num_choices = std::numeric_limits<std::int32_t>::max();
  std::uint64_t tie = 0;
};

class Search {
 public:
  Search(const Instance& instance, Offset capacity, std::uint64_t seed, Stopper& stopper)
      : in_(instance), capacity_(capacity), random_(seed), stopper_(stopper),
        failed_(instance.num_requests > 64 ? 21 : 16), starts_(instance.num_slots),
        height_(instance.num_slots, 0), rest_(instance.num_slots, 0),
        alive_(instance.num_slots, 0), crossing_(instance.num_slots, 0),
        offset_(instance.num_requests, -1), noise_(instance.num_requests, 0), twin_(instance.num_requests, -1),
        from_left_(instance.num_slots + 1, 0), from_right_(instance.num_slots + 1, 0),
        count_(instance.num_slots + 1, 0), blame_(instance.num_slots, 0) {
    for (std::int32_t i = 0; i < in_.num_requests; ++i) {
      starts_[in_.first[i]].push_back(i);
      for (std::int32_t s = in_.first[i]; s <= in_.last[i]; ++s) {
        rest_[s] += in_.size[i];
        ++alive_[s];
        if (s < in_.last[i]) ++crossing_[s];
      }
    }
    slot_key_.resize(in_.num_slots);
    request_key_.resize(in_.num_requests);
    for (std::int32_t s = 0; s < in_.num_slots; ++s) toggle_height(s);
    for (std::int32_t i = 0; i < in_.num_requests; ++i) {
      request_key_[i].toggle(0xffff000000000000ULL + static_cast<std::uint64_t>(i));
      toggle_request(i);
    }
    for (auto& starting : starts_) {
      std::sort(starting.begin(), starting.end(), [this](std::int32_t a, std::int32_t b) {
        if (in_.last[a] != in_.last[b]) return in_.last[a] < in_.last[b];
        return in_.size[a] != in_.size[b] ? in_.size[a] < in_.size[b] : a < b;
      });
      for (std::size_t k = 1; k < starting.size(); ++k) {
        const std::int32_t a = starting[k - 1], b = starting[k];
        if (in_.last[a] == in_.last[b] && in_.size[a] == in_.size[b]) twin_[b] = a;
      }
    }
  }

  bool overloaded() const {
    return std::any_of(rest_.begin(), rest_.end(), [&](Offset load) { return load > capacity_; });
  }

  // Whether more than a hundredth of the capacity is free, over all slots.
  bool has_room() const {
    double used = 0.0;
    for (const Offset load : rest_) used += static_cast<double>(load);
    return used < 0.99 * static_cast<double>(capacity_) * static_cast<double>(in_.num_slots);
  }

  Outcome run(std::int64_t node_limit, bool shuffled) {
    node_limit_ = num_nodes_ + node_limit;
    shuffled_ = shuffled;
    mode_ = shuffled ? static_cast<std::int32_t>(random_.below(6)) : 2;
    for (auto& value : noise_) value = shuffled ? random_.below(1000) : 0;
    const Outcome outcome = solve_range(0, in_.num_slots - 1, 0);
    if (outcome != Outcome::kFound) undo_to(0);
    return outcome;
  }

  std::int64_t num_nodes() const { return num_nodes_; }
  const std::vector<Offset>& offsets() const { return offset_; }

 private:
  struct Move {
    std::int32_t request;  // -1: waste
    std::int32_t slot;     // of the waste
    Offset level;          // height before
  };

  void place(std::int32_t i, Offset level) {
    for (std::int32_t s = in_.first[i]; s <= in_.last[i]; ++s) {
      set_height(s, level + in_.size[i]);
      rest_[s] -= in_.size[i];
      --alive_[s];
      if (s < in_.last[i]) --crossing_[s];
    }
    offset_[i] = level;
    toggle_request(i);
    trail_.push_back(Move{i, 0, level});
  }

  void raise(std::int32_t slot, Offset by) {
    trail_.push_back(Move{-1, slot, height_[slot]});
    set_height(slot, height_[slot] + by);
  }

  void undo_to(std::size_t mark) {
    while (trail_.size() > mark) {
      const Move move = trail_.back();
      trail_.pop_back();
      if (move.request < 0) {
        set_height(move.slot, move.level);
        continue;
      }
      const std::int32_t i = move.request;
      for (std::int32_t s = in_.first[i]; s <= in_.last[i]; ++s) {
        set_height(s, move.level);
        rest_[s] += in_.size[i];
        ++alive_[s];
        if (s < in_.last[i]) ++crossing_[s];
      }
      offset_[i] = -1;
      toggle_request(i);
    }
  }

  // Solves every connected part of the range; shorter parts first, as they fail sooner.
  Outcome solve_range(std::int32_t from, std::int32_t to, std::int32_t depth) {
    std::vector<std::pair<std::int32_t, std::int32_t>> parts;
    for (std::int32_t s = from; s <= to; ++s) {
      if (alive_[s] == 0) continue;
      const std::int32_t begin = s;
      while (s < to && crossing_[s] > 0) ++s;
      parts.emplace_back(s - begin, begin);
    }
    if (parts.size() > 1) std::sort(parts.begin(), parts.end());
    const std::size_t mark = trail_.size();
    for (const auto& [length, begin] : parts) {
      const Outcome outcome = solve_part(begin, begin + length, depth);
      if (outcome == Outcome::kFound) continue;
      undo_to(mark);
      return outcome;
    }
    return Outcome::kFound;
  }

  // A state is the heights of its slots and the unplaced requests that begin in them.
  StateKey key_of(std::int32_t from, std::int32_t to) const {
    StateKey key;
    for (std::int32_t s = from; s <= to; ++s) {
      key.bucket ^= slot_key_[s].bucket;
      key.tag ^= slot_key_[s].tag;
    }
    return key;
  }

  void toggle_height(std::int32_t s) {
    slot_key_[s].toggle((static_cast<std::uint64_t>(s) << 40) ^ Random::mix(static_cast<std::uint64_t>(height_[s])));
  }

  void toggle_request(std::int32_t i) {
    slot_key_[in_.first[i]].bucket ^= request_key_[i].bucket;
    slot_key_[in_.first[i]].tag ^= request_key_[i].tag;
  }

  void set_height(std::int32_t s, Offset height) {
    toggle_height(s);
    height_[s] = height;
    toggle_height(s);
  }

  Offset slack(std::int32_t slot) const { return capacity_ - height_[slot] - rest_[slot]; }

  // Requests that may rest on the floor of the valley, one of each shape, by first slot: those that are
  // a link of a chain of requests from edge to edge. The chain has to cover every slot without slack.
  // False when there is no chain: a dead end.
  bool list_links(const Valley& valley) {
    links_.clear();
    std::fill(from_left_.begin() + valley.from, from_left_.begin() + valley.to + 2, 0);
    std::fill(from_right_.begin() + valley.from, from_right_.begin() + valley.to + 2, 0);
    from_left_[valley.from] = 1;
    for (std::int32_t s = valley.from; s <= valley.to; ++s) {
      if (!from_left_[s]) continue;
      if (slack(s) > 0) from_left_[s + 1] = 1;
      for (const std::int32_t i : starts_[s]) {
        if (in_.last[i] > valley.to) break;  // by last slot
        if (offset_[i] >= 0 || (twin_[i] >= 0 && offset_[twin_[i]] < 0)) continue;
        from_left_[in_.last[i] + 1] = 1;
        links_.push_back(i);
      }
    }
    if (!from_left_[valley.to + 1]) return false;
    from_right_[valley.to + 1] = 1;
    std::size_t kept = links_.size(), at = links_.size();
    for (std::int32_t s = valley.to; s >= valley.from; --s) {
      if (slack(s) > 0 && from_right_[s + 1]) from_right_[s] = 1;
      while (at > 0 && in_.first[links_[at - 1]] == s) {
        const std::int32_t i = links_[--at];
        if (!from_right_[in_.last[i] + 1]) continue;
        from_right_[s] = 1;
        links_[--kept] = i;
      }
    }
    links_.erase(links_.begin(), links_.begin() + static_cast<std::ptrdiff_t>(kept));
    return from_right_[valley.from] != 0;
  }

  // Least rise of an edge slot when nothing rests on its floor, or kNone (see the top of the file).
  Offset least_waste(const Valley& valley, std::int32_t slot, std::int32_t part_from, std::int32_t part_to) const {
    const Offset spare = slack(slot);
    if (spare <= 0) return kNone;
    Offset rise = kNone;
    if (valley.from > part_from) rise = std::min(rise, height_[valley.from - 1] - height_[slot]);
    if (valley.to < part_to) rise = std::min(rise, height_[valley.to + 1] - height_[slot]);
    for (std::int32_t s = valley.from; s <= valley.to; ++s) {
      for (const std::int32_t i : starts_[s]) {
        if (in_.last[i] > valley.to) break;
        if (offset_[i] >= 0 || (in_.first[i] <= slot && slot <= in_.last[i])) continue;
        rise = std::min(rise, in_.size[i]);
      }
    }
    return rise <= spare ? rise : kNone;
  }

  void offer(Branch& best, const Valley& valley, std::int32_t slot, std::int32_t count, Offset waste) {
    if (count > best.num_choices) return;
    const std::uint64_t tie = tie_of(slot);
    if (count < best.num_choices || tie < best.tie) best = Branch{valley, slot, waste, count, tie};
  }

  // Offers the slots of a valley to `best`; false at a dead end.
  bool judge(const Valley& valley, std::int32_t part_from, std::int32_t part_to, Branch& best) {
    if (!list_links(valley)) {
      ++blame_[valley.from];
      ++blame_[valley.to];
      return false;
    }
    std::fill(count_.begin() + valley.from, count_.begin() + valley.to + 2, 0);
    for (const std::int32_t i : links_) {
      ++count_[in_.first[i]];
      --count_[in_.last[i] + 1];
    }
    std::int32_t count = 0;
    for (std::int32_t s = valley.from; s <= valley.to; ++s) {
      count += count_[s];
      const bool is_edge = s == valley.from || s == valley.to;
      if (!is_edge && slack(s) > 0) continue;
      const Offset waste = is_edge ? least_waste(valley, s, part_from, part_to) : kNone;
      const std::int32_t choices = count + (waste != kNone ? 1 : 0);
      if (choices == 0) {
        ++blame_[s];
        return false;
      }
      offer(best, valley, s, choices, waste);
    }
    return true;
  }

  // The slot with the fewest choices; false at a dead end.
  bool choose_branch(std::int32_t from, std::int32_t to, Branch& best) {
    for (std::int32_t s = from; s <= to;) {
      Valley valley;
      valley.from = s;
      while (s < to && height_[s + 1] == height_[s]) ++s;
      valley.to = s++;
      if (valley.from > from && height_[valley.from - 1] < height_[valley.from]) continue;
      if (valley.to < to && height_[valley.to + 1] < height_[valley.to]) continue;
      if (!judge(valley, from, to, best)) return false;
    }
    return true;
  }

  void list_choices(const Branch& branch, std::vector<std::int32_t>& choices) {
    list_links(branch.valley);
    for (const std::int32_t i : links_) {
      if (in_.first[i] <= branch.slot && branch.slot <= in_.last[i]) choices.push_back(i);
    }
  }

  // Among slots with equally many choices: the slot that was a dead end most often, then the lowest.
  std::uint64_t tie_of(std::int32_t slot) {
    const std::uint64_t blame = blame_[slot];
    return (~blame << 20) + (shuffled_ ? random_.below(1 << 20) : 0);
  }

  // Wide requests first: measured over planted packings, that beats large areas by two orders of
  // magnitude. Restarts shake it thoroughly, and every third one prefers any or low requests.
  void order_choices(std::vector<std::int32_t>& choices) const {
    auto weight = [&](std::int32_t i) {
      const double noise = shuffled_ ? 0.1 + 1.9 * static_cast<double>(noise_[i]) / 1000.0 : 1.0;
      if (mode_ == 0) return noise;
      if (mode_ == 1) return -noise * static_cast<double>(in_.size[i]);
      return noise * (in_.last[i] - in_.first[i] + 1);
    };
    std::sort(choices.begin(), choices.end(), [&](std::int32_t a, std::int32_t b) {
      const double wa = weight(a), wb = weight(b);
      return wa != wb ? wa > wb : a < b;
    });
  }

  // Solves one connected part; on success its placements stay, else nothing has changed.
  Outcome solve_part(std::int32_t from, std::int32_t to, std::int32_t depth) {
    if (stopper_.stopped()) return Outcome::kStopped;
    if (++num_nodes_ > node_limit_ || depth > kMaxDepth) return Outcome::kLimit;
    const StateKey key = key_of(from, to);
    if (failed_.contains(key)) return Outcome::kInfeasible;
    Branch branch;
    if (!choose_branch(from, to, branch)) {
      failed_.insert(key);
      return Outcome::kInfeasible;
    }
    std::vector<std::int32_t> choices;
    list_choices(branch, choices);
    order_choices(choices);
    const std::size_t mark = trail_.size();
    const Offset level = height_[branch.slot];
    for (const std::int32_t i : choices) {
      place(i, level);
      const Outcome outcome = solve_range(from, to, depth + 1);
      if (outcome != Outcome::kInfeasible) return outcome;
      undo_to(mark);
    }
    if (branch.waste != kNone) {
      raise(branch.slot, branch.waste);
      const Outcome outcome = solve_range(from, to, depth + 1);
      if (outcome != Outcome::kInfeasible) return outcome;
      undo_to(mark);
    }
    failed_.insert(key);
    return Outcome::kInfeasible;
  }

  const Instance& in_;
  const Offset capacity_;
  Random random_;
  Stopper& stopper_;
  FailedStates failed_;
  std::vector<std::vector<std::int32_t>> starts_;  // unplaced or not, by first slot; then by last slot and size
  std::vector<Offset> height_;
  std::vector<StateKey> slot_key_;     // of the height and the unplaced requests of each slot
  std::vector<StateKey> request_key_;
  std::vector<Offset> rest_;             // bytes of unplaced requests
  std::vector<std::int32_t> alive_;      // number of unplaced requests
  std::vector<std::int32_t> crossing_;   // unplaced requests alive in this slot and the next
  std::vector<Offset> offset_;           // -1: unplaced
  std::vector<std::uint64_t> noise_;
  std::vector<Move> trail_;
  std::vector<std::int32_t> twin_;       // the interchangeable request before this one, or -1
  std::vector<std::int32_t> links_;      // of list_links
  std::vector<char> from_left_;          // whether a chain reaches this slot from the left edge
  std::vector<char> from_right_;         // likewise from the right
  std::vector<std::int32_t> count_;      // links over a slot, as differences
  std::vector<std::uint32_t> blame_;  // dead ends met at each slot
  bool shuffled_ = false;
  std::int32_t mode_ = 2;  // of order_choices
  std::int64_t num_nodes_ = 0;
  std::int64_t node_limit_ = 0;
};

}  // namespace

Outcome valley_search(const Instance& instance, Offset capacity, std::uint64_t seed,
                      std::int64_t max_nodes, Stopper& stopper, Offset* offsets, std::int64_t* nodes) {
  Search search(instance, capacity, seed, stopper);
  *nodes = 0;
  if (search.overloaded()) return Outcome::kInfeasible;
  // Short restarts, each a little longer. In perfect packings a wrong start shows at once; where there is room to
  // waste it may show late, and restarts that are much longer take turns with the short ones, for as many nodes.
  const std::int64_t num_requests = instance.num_requests;
  std::int64_t limit = 3 * num_requests + 100, long_limit = search.has_room() ? 40 * num_requests : 0, balance = 0;
  Outcome outcome = Outcome::kLimit;
  bool shuffled = seed != 0;
  while (outcome == Outcome::kLimit && search.num_nodes() < max_nodes) {
    const bool is_long = long_limit > 0 && balance <= 0;
    const std::int64_t before = search.num_nodes();
    outcome = search.run(std::min(is_long ? long_limit : limit, max_nodes - before), shuffled);
    shuffled = true;
    balance += is_long ? search.num_nodes() - before : before - search.num_nodes();
    if (is_long) {
      long_limit += long_limit / 40;
    } else {
      limit += limit / 40;
    }
  }
  *nodes = search.num_nodes();
  if (outcome == Outcome::kFound) {
    std::copy(search.offsets().begin(), search.offsets().end(), offsets);
  }
  return outcome;
}

}  // namespace memo

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
// Branch on the edge with the fewest choices; none = dead end, one = forced. A state is the
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

struct Edge {
  std::int32_t from = 0;  // valley, first slot
  std::int32_t to = 0;    // valley, last slot
  bool at_left = true;
  Offset waste = kNone;  // rise of the edge slot when nothing rests there; kNone = not possible
  std::int32_t num_choices = 0;
};

class Search {
 public:
  Search(const Instance& instance, Offset capacity, std::uint64_t seed, Stopper& stopper)
      : in_(instance), capacity_(capacity), random_(seed), stopper_(stopper),
        failed_(instance.num_requests > 64 ? 21 : 16), starts_(instance.num_slots),
        ends_(instance.num_slots), height_(instance.num_slots, 0), rest_(instance.num_slots, 0),
        alive_(instance.num_slots, 0), crossing_(instance.num_slots, 0),
        offset_(instance.num_requests, -1), noise_(instance.num_requests, 0), blame_(instance.num_slots, 0) {
    for (std::int32_t i = 0; i < in_.num_requests; ++i) {
      starts_[in_.first[i]].push_back(i);
      ends_[in_.last[i]].push_back(i);
      for (std::int32_t s = in_.first[i]; s <= in_.last[i]; ++s) {
        rest_[s] += in_.size[i];
        ++alive_[s];
        if (s < in_.last[i]) ++crossing_[s];
      }
    }
  }

  bool overloaded() const {
    return std::any_of(rest_.begin(), rest_.end(), [&](Offset load) { return load > capacity_; });
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
      height_[s] = level + in_.size[i];
      rest_[s] -= in_.size[i];
      --alive_[s];
      if (s < in_.last[i]) --crossing_[s];
    }
    offset_[i] = level;
    trail_.push_back(Move{i, 0, level});
  }

  void raise(std::int32_t slot, Offset by) {
    trail_.push_back(Move{-1, slot, height_[slot]});
    height_[slot] += by;
  }

  void undo_to(std::size_t mark) {
    while (trail_.size() > mark) {
      const Move move = trail_.back();
      trail_.pop_back();
      if (move.request < 0) {
        height_[move.slot] = move.level;
        continue;
      }
      const std::int32_t i = move.request;
      for (std::int32_t s = in_.first[i]; s <= in_.last[i]; ++s) {
        height_[s] = move.level;
        rest_[s] += in_.size[i];
        ++alive_[s];
        if (s < in_.last[i]) ++crossing_[s];
      }
      offset_[i] = -1;
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

  StateKey key_of(std::int32_t from, std::int32_t to) const {
    StateKey key;
    for (std::int32_t s = from; s <= to; ++s) {
      key.toggle((static_cast<std::uint64_t>(s) << 40) ^ Random::mix(static_cast<std::uint64_t>(height_[s])));
      for (const std::int32_t i : starts_[s]) {
        if (offset_[i] < 0) key.toggle(0xffff000000000000ULL + static_cast<std::uint64_t>(i));
      }
    }
    return key;
  }

  bool same_shape(std::int32_t a, std::int32_t b) const {
    return in_.first[a] == in_.first[b] && in_.last[a] == in_.last[b] && in_.size[a] == in_.size[b];
  }

  // Requests that may rest on the valley floor at its edge, one of each shape.
  void list_choices(const Edge& edge, std::vector<std::int32_t>& choices) const {
    choices.clear();
    for (const std::int32_t i : edge.at_left ? starts_[edge.from] : ends_[edge.to]) {
      if (offset_[i] >= 0 || in_.first[i] < edge.from || in_.last[i] > edge.to) continue;
      const bool known = std::any_of(choices.begin(), choices.end(),
                                     [&](std::int32_t other) { return same_shape(i, other); });
      if (!known) choices.push_back(i);
    }
  }

  // Least rise of the edge slot when nothing rests on its floor, or kNone (see the top of the file).
  Offset least_waste(const Edge& edge, std::int32_t part_from, std::int32_t part_to) const {
    const std::int32_t slot = edge.at_left ? edge.from : edge.to;
    const Offset slack = capacity_ - height_[slot] - rest_[slot];
    if (slack <= 0) return kNone;
    Offset rise = kNone;
    if (edge.from > part_from) rise = std::min(rise, height_[edge.from - 1] - height_[slot]);
    if (edge.to < part_to) rise = std::min(rise, height_[edge.to + 1] - height_[slot]);
    for (std::int32_t s = edge.from; s <= edge.to; ++s) {
      for (const std::int32_t i : starts_[s]) {
        if (offset_[i] >= 0 || in_.last[i] > edge.to) continue;
        if (in_.first[i] <= slot && slot <= in_.last[i]) continue;
        rise = std::min(rise, in_.size[i]);
      }
    }
    return rise <= slack ? rise : kNone;
  }

  // Judges one edge; false when it is a dead end.
  bool judge(Edge& edge, std::int32_t part_from, std::int32_t part_to) {
    list_choices(edge, choices_);
    edge.waste = least_waste(edge, part_from, part_to);
    edge.num_choices = static_cast<std::int32_t>(choices_.size()) + (edge.waste != kNone ? 1 : 0);
    return edge.num_choices > 0;
  }

  // The edge with the fewest choices, the lowest one among equals; false at a dead end.
  bool choose_edge(std::int32_t from, std::int32_t to, Edge& best) {
    best.num_choices = std::numeric_limits<std::int32_t>::max();
    std::uint64_t best_tie = 0;
    for (std::int32_t s = from; s <= to;) {
      Edge edge;
      edge.from = s;
      while (s < to && height_[s + 1] == height_[s]) ++s;
      edge.to = s++;
      if (edge.from > from && height_[edge.from - 1] < height_[edge.from]) continue;
      if (edge.to < to && height_[edge.to + 1] < height_[edge.to]) continue;
      for (const bool at_left : {true, false}) {
        edge.at_left = at_left;
        if (!judge(edge, from, to)) {
          ++blame_[at_left ? edge.from : edge.to];
          return false;
        }
        const std::uint64_t tie = tie_of(edge);
        if (edge.num_choices < best.num_choices ||
            (edge.num_choices == best.num_choices && tie < best_tie)) {
          best = edge;
          best_tie = tie;
        }
      }
    }
    return true;
  }

  // Among edges with equally many choices: the slot that was a dead end most often, then the lowest.
  std::uint64_t tie_of(const Edge& edge) {
    const std::uint64_t blame = blame_[edge.at_left ? edge.from : edge.to];
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
    Edge edge;
    if (!choose_edge(from, to, edge)) {
      failed_.insert(key);
      return Outcome::kInfeasible;
    }
    std::vector<std::int32_t> choices;
    list_choices(edge, choices);
    order_choices(choices);
    const std::size_t mark = trail_.size();
    const std::int32_t slot = edge.at_left ? edge.from : edge.to;
    const Offset level = height_[slot];
    for (const std::int32_t i : choices) {
      place(i, level);
      const Outcome outcome = solve_range(from, to, depth + 1);
      if (outcome != Outcome::kInfeasible) return outcome;
      undo_to(mark);
    }
    if (edge.waste != kNone) {
      raise(slot, edge.waste);
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
  std::vector<std::vector<std::int32_t>> starts_;  // unplaced or not, by first slot
  std::vector<std::vector<std::int32_t>> ends_;    // by last slot
  std::vector<Offset> height_;
  std::vector<Offset> rest_;             // bytes of unplaced requests
  std::vector<std::int32_t> alive_;      // number of unplaced requests
  std::vector<std::int32_t> crossing_;   // unplaced requests alive in this slot and the next
  std::vector<Offset> offset_;           // -1: unplaced
  std::vector<std::uint64_t> noise_;
  std::vector<Move> trail_;
  std::vector<std::int32_t> choices_;
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
  std::int64_t limit = 3 * static_cast<std::int64_t>(instance.num_requests) + 100;
  Outcome outcome = Outcome::kLimit;
  bool shuffled = seed != 0;
  while (outcome == Outcome::kLimit && search.num_nodes() < max_nodes) {
    outcome = search.run(std::min(limit, max_nodes - search.num_nodes()), shuffled);
    shuffled = true;
    limit += limit / 40;
  }
  *nodes = search.num_nodes();
  if (outcome == Outcome::kFound) {
    std::copy(search.offsets().begin(), search.offsets().end(), offsets);
  }
  return outcome;
}

}  // namespace memo

// Every packing can be pushed down until each request rests on the floor or on another one, and
// built bottom-up. So it is enough to place requests by growing offset, each at its lowest
// possible one, equal offsets in one fixed order: each packing is then met once.
//
// A branch is cut when
//   - some slot cannot hold what is still to come: max(floor, current offset) + rest > capacity,
//     where the floor of a slot is the top of what is placed in it, or the lowest offset left to
//     its unplaced requests;
//   - a request would leave a gap into which another one would still fit whole.
// Parts of the time axis that no unplaced request connects are solved separately.
// (The scheme of canonical DSA search known from MiniMalloc, ASPLOS 2024; own implementation.)

#include "canonical_search.hpp"

#include <algorithm>
#include <limits>
#include <vector>

namespace memo {
namespace {

struct Candidate {
  Offset offset;
  std::int32_t rank;     // in the order
  std::int32_t request;
};

class Search {
 public:
  Search(const Instance& instance, Offset capacity, const std::int32_t* order, std::int64_t max_nodes,
         Stopper& stopper)
      : in_(instance), capacity_(capacity), max_nodes_(max_nodes), stopper_(stopper),
        members_(instance.num_slots), conflicts_(instance.num_requests), floor_(instance.num_slots, 0),
        rest_(instance.num_slots, 0), crossing_(instance.num_slots, 0),
        lowest_(instance.num_requests, 0), offset_(instance.num_requests, -1),
        rank_(instance.num_requests, 0), twin_(instance.num_requests, -1) {
    for (std::int32_t k = 0; k < in_.num_requests; ++k) rank_[order[k]] = k;
    for (std::int32_t k = 0; k < in_.num_requests; ++k) {
      const std::int32_t i = order[k];
      for (std::int32_t s = in_.first[i]; s <= in_.last[i]; ++s) {
        members_[s].push_back(i);
        rest_[s] += in_.size[i];
        if (s < in_.last[i]) ++crossing_[s];
      }
    }
    link_conflicts(order);
  }

  Outcome run() {
    for (const Offset load : rest_) {
      if (load > capacity_) return Outcome::kInfeasible;
    }
    std::vector<std::int32_t> all(in_.num_requests);
    for (std::int32_t i = 0; i < in_.num_requests; ++i) all[rank_[i]] = i;
    return decompose(all, 0, in_.num_slots - 1, 0, -1);
  }

  std::int64_t num_nodes() const { return num_nodes_; }
  const std::vector<Offset>& offsets() const { return offset_; }

 private:
  struct OldOffset { std::int32_t request; Offset lowest; };
  struct OldFloor { std::int32_t slot; Offset floor; };

  void link_conflicts(const std::int32_t* order) {
    const std::int32_t n = in_.num_requests;
    for (std::int32_t a = 0; a < n; ++a) {
      for (std::int32_t b = 0; b < n; ++b) {
        if (a != b && in_.first[a] <= in_.last[b] && in_.first[b] <= in_.last[a]) conflicts_[a].push_back(b);
      }
    }
    // Twins are interchangeable: each waits for the one before it in the order.
    for (std::int32_t k = 0; k < n; ++k) {
      for (std::int32_t j = k - 1; j >= 0 && twin_[order[k]] < 0; --j) {
        const std::int32_t a = order[k], b = order[j];
        if (in_.first[a] == in_.first[b] && in_.last[a] == in_.last[b] && in_.size[a] == in_.size[b] &&
            in_.alignment[a] == in_.alignment[b]) {
          twin_[a] = b;
        }
      }
    }
  }

  // Splits `requests` (unplaced, by rank) where nothing crosses, and solves each part.
  Outcome decompose(const std::vector<std::int32_t>& requests, std::int32_t from, std::int32_t to,
                    Offset min_offset, std::int32_t min_rank) {
    if (requests.empty()) return Outcome::kFound;
    std::vector<std::int32_t> part_of(to - from + 1);
    std::int32_t num_parts = 1;
    for (std::int32_t s = from; s <= to; ++s) {
      part_of[s - from] = num_parts - 1;
      if (s < to && crossing_[s] == 0) ++num_parts;
    }
    if (num_parts == 1) return search(requests, from, to, min_offset, min_rank);
    std::vector<std::vector<std::int32_t>> parts(num_parts);
    for (const std::int32_t i : requests) parts[part_of[in_.first[i] - from]].push_back(i);
    std::sort(parts.begin(), parts.end(),
              [](const auto& a, const auto& b) { return a.size() < b.size(); });
    std::vector<std::int32_t> done;
    for (const auto& part : parts) {
      if (part.empty()) continue;
      std::int32_t first = to, last = from;
      for (const std::int32_t i : part) {
        first = std::min(first, in_.first[i]);
        last = std::max(last, in_.last[i]);
      }
      const Outcome outcome = search(part, first, last, min_offset, min_rank);
      if (outcome != Outcome::kFound) {
        for (const std::int32_t i : done) offset_[i] = -1;
        return outcome;
      }
      done.insert(done.end(), part.begin(), part.end());
    }
    return Outcome::kFound;
  }

  void lift_conflicts(std::int32_t i, Offset top, std::vector<OldOffset>& old) {
    for (const std::int32_t other : conflicts_[i]) {
      if (offset_[other] >= 0 || lowest_[other] >= top) continue;
      old.push_back({other, lowest_[other]});
      lowest_[other] = align_up(top, in_.alignment[other]);
    }
  }

  void set_floor(std::int32_t slot, Offset floor, std::vector<OldFloor>& old) {
    if (floor_[slot] == floor) return;
    old.push_back({slot, floor_[slot]});
    floor_[slot] = floor;
  }

  // Raises floors to the lowest offset of what is left; false when a slot overflows.
  bool raise_floors(std::int32_t from, std::int32_t to, Offset min_offset, std::vector<OldFloor>& old) {
    for (std::int32_t s = from; s <= to; ++s) {
      if (rest_[s] == 0) continue;
      Offset floor = std::max(floor_[s], min_offset);
      if (floor + rest_[s] > capacity_) return false;
      Offset lowest = std::numeric_limits<Offset>::max();
      for (const std::int32_t i : members_[s]) {
        if (offset_[i] < 0) lowest = std::min(lowest, lowest_[i]);
        if (lowest <= floor) break;
      }
      floor = std::max(floor, lowest);
      if (floor + rest_[s] > capacity_) return false;
      set_floor(s, floor, old);
    }
    return true;
  }

  Outcome try_request(const Candidate& candidate, const std::vector<std::int32_t>& requests,
                      std::int32_t from, std::int32_t to) {
    const std::int32_t i = candidate.request;
    const Offset top = candidate.offset + in_.size[i];
    std::vector<OldOffset> old_offsets;
    std::vector<OldFloor> old_floors;
    offset_[i] = candidate.offset;
    lift_conflicts(i, top, old_offsets);
    for (std::int32_t s = in_.first[i]; s <= in_.last[i]; ++s) {
      rest_[s] -= in_.size[i];
      if (s < in_.last[i]) --crossing_[s];
      set_floor(s, top, old_floors);
    }
    Outcome outcome = Outcome::kInfeasible;
    if (raise_floors(from, to, candidate.offset, old_floors)) {
      std::vector<std::int32_t> left;
      left.reserve(requests.size());
      for (const std::int32_t other : requests) {
        if (other != i) left.push_back(other);
      }
      outcome = decompose(left, from, to, candidate.offset, candidate.rank);
    }
    for (auto change = old_floors.rbegin(); change != old_floors.rend(); ++change) {
      floor_[change->slot] = change->floor;
    }
    for (std::int32_t s = in_.first[i]; s <= in_.last[i]; ++s) {
      rest_[s] += in_.size[i];
      if (s < in_.last[i]) ++crossing_[s];
    }
    for (auto change = old_offsets.rbegin(); change != old_offsets.rend(); ++change) {
      lowest_[change->request] = change->lowest;
    }
    if (outcome != Outcome::kFound) offset_[i] = -1;
    return outcome;
  }

  Outcome search(const std::vector<std::int32_t>& requests, std::int32_t from, std::int32_t to,
                 Offset min_offset, std::int32_t min_rank) {
    if (stopper_.stopped()) return Outcome::kStopped;
    if (++num_nodes_ > max_nodes_) return Outcome::kLimit;
    std::vector<Candidate> candidates;
    candidates.reserve(requests.size());
    Offset lowest_top = std::numeric_limits<Offset>::max();
    for (const std::int32_t i : requests) {
      if (lowest_[i] + in_.size[i] > capacity_) return Outcome::kInfeasible;
      lowest_top = std::min(lowest_top, lowest_[i] + in_.size[i]);
      candidates.push_back({lowest_[i], rank_[i], i});
    }
    std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
      return a.offset != b.offset ? a.offset < b.offset : a.rank < b.rank;
    });
    for (const Candidate& candidate : candidates) {
      if (candidate.offset >= lowest_top) break;
      if (candidate.offset < min_offset) continue;
      if (candidate.offset == min_offset && candidate.rank < min_rank) continue;
      const std::int32_t twin = twin_[candidate.request];
      if (twin >= 0 && offset_[twin] < 0) continue;
      const Outcome outcome = try_request(candidate, requests, from, to);
      if (outcome != Outcome::kInfeasible) return outcome;
    }
    return Outcome::kInfeasible;
  }

  const Instance& in_;
  const Offset capacity_;
  const std::int64_t max_nodes_;
  Stopper& stopper_;
  std::vector<std::vector<std::int32_t>> members_;
  std::vector<std::vector<std::int32_t>> conflicts_;
  std::vector<Offset> floor_;
  std::vector<Offset> rest_;
  std::vector<std::int32_t> crossing_;
  std::vector<Offset> lowest_;   // lowest possible offset of each unplaced request
  std::vector<Offset> offset_;   // -1: unplaced
  std::vector<std::int32_t> rank_;
  std::vector<std::int32_t> twin_;
  std::int64_t num_nodes_ = 0;
};

}  // namespace

Outcome canonical_search(const Instance& instance, Offset capacity, const std::int32_t* order,
                         std::int64_t max_nodes, Stopper& stopper, Offset* offsets, std::int64_t* nodes) {
  Search search(instance, capacity, order, max_nodes, stopper);
  const Outcome outcome = search.run();
  *nodes = search.num_nodes();
  if (outcome == Outcome::kFound) {
    std::copy(search.offsets().begin(), search.offsets().end(), offsets);
  }
  return outcome;
}

}  // namespace memo

// First fit in a given order, and the repair of that order ("squeaky wheel").
#pragma once

#include <cstdint>
#include <vector>

#include "instance.hpp"
#include "interval_index.hpp"

namespace memo {

// Places every request at its lowest free offset, in `order`; returns the peak.
// A pass that is stopped half-way returns -1 and leaves `offsets` unusable.
Offset first_fit(const Instance& instance, const std::int32_t* order, IntervalIndex& index,
                 Offset* offsets, Stopper& stopper);

struct RepairResult {
  Offset peak;
  std::int32_t num_passes;
};

// Repeats first fit; after each pass every request that ends above `target` moves
// forward in the order by a random amount, but never before the first `num_fixed`. Keeps the best offsets; ends when the
// peak reaches `target`, after `max_passes`, or when stopped. peak = -1: no pass ended.
RepairResult squeaky_wheel(const Instance& instance, std::int32_t* order, std::int32_t num_fixed, Offset target,
                           std::int32_t max_passes, std::uint64_t seed, Offset* best_offsets,
                           Stopper& stopper);

}  // namespace memo

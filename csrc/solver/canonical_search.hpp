// Exact canonical depth-first search.
#pragma once

#include <cstdint>

#include "instance.hpp"

namespace memo {

// Looks for a placement below `capacity`, trying requests of equal offset in the given `order`
// (a permutation). Complete: kInfeasible is a proof. One run, no restarts.
Outcome canonical_search(const Instance& instance, Offset capacity, const std::int32_t* order,
                         std::int64_t max_nodes, Stopper& stopper, Offset* offsets, std::int64_t* nodes);

}  // namespace memo

// Exact search for packings with little or no waste.
#pragma once

#include <cstdint>

#include "instance.hpp"

namespace memo {

// Looks for a placement below `capacity`; alignments must all be 1. Complete: kInfeasible is a proof.
// Restarts with other tie-breaks until `max_nodes` nodes are spent. `nodes` counts them.
Outcome valley_search(const Instance& instance, Offset capacity, std::uint64_t seed,
                      std::int64_t max_nodes, Stopper& stopper, Offset* offsets, std::int64_t* nodes);

}  // namespace memo

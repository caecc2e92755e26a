#include "squeaky_wheel.hpp"

#include <algorithm>
#include <numeric>

namespace memo {

Offset first_fit(const Instance& instance, const std::int32_t* order, IntervalIndex& index,
                 Offset* offsets, Stopper& stopper) {
  index.clear();
  Offset peak = 0;
  for (std::int32_t k = 0; k < instance.num_requests; ++k) {
    if (stopper.stopped()) return -1;
    const std::int32_t i = order[k];
    const Offset size = instance.size[i];
    const Offset at = index.first_free(instance.first[i], instance.last[i], size, instance.alignment[i]);
    index.add(instance.first[i], instance.last[i], at, at + size);
    offsets[i] = at;
    peak = std::max(peak, at + size);
  }
  return peak;
}

namespace {

// Moves every squeaky request to a random earlier place, keeping the others' order.
// Keys are doubled so that a mover lands before the one whose place it takes.
void promote(const Instance& instance, std::int32_t* order, std::int32_t num_fixed, const Offset* offsets,
             Offset target, Random& random) {
  const std::int32_t n = instance.num_requests;
  std::vector<std::int64_t> key(n);
  std::vector<std::int32_t> positions(n);
  std::iota(positions.begin(), positions.end(), 0);
  for (std::int32_t k = 0; k < n; ++k) {
    const std::int32_t i = order[k];
    key[k] = 2 * static_cast<std::int64_t>(k);
    if (k >= num_fixed && offsets[i] + instance.size[i] > target) {
      const std::uint64_t choices = static_cast<std::uint64_t>(k - num_fixed + 1);
      key[k] = 2 * (num_fixed + static_cast<std::int64_t>(random.below(choices))) - 1;
    }
  }
  std::stable_sort(positions.begin(), positions.end(),
                   [&](std::int32_t a, std::int32_t b) { return key[a] < key[b]; });
  std::vector<std::int32_t> moved(n);
  for (std::int32_t k = 0; k < n; ++k) moved[k] = order[positions[k]];
  std::copy(moved.begin(), moved.end(), order);
}

}  // namespace

RepairResult squeaky_wheel(const Instance& instance, std::int32_t* order, std::int32_t num_fixed, Offset target,
                           std::int32_t max_passes, std::uint64_t seed, Offset* best_offsets,
                           Stopper& stopper) {
  const std::int32_t n = instance.num_requests;
  IntervalIndex index(instance.num_slots);
  Random random(seed);
  std::vector<Offset> offsets(n);
  std::vector<std::int32_t> best_order(order, order + n);
  RepairResult result{-1, 0};
  std::int32_t stale = 0;
  while (result.num_passes < max_passes) {
    const Offset peak = first_fit(instance, order, index, offsets.data(), stopper);
    if (peak < 0) break;
    ++result.num_passes;
    ++stale;
    if (result.peak < 0 || peak < result.peak) {
      result.peak = peak;
      std::copy(offsets.begin(), offsets.end(), best_offsets);
      std::copy(order, order + n, best_order.begin());
      stale = 0;
    }
    if (result.peak <= target) break;
    // A walk that has wandered for long without gain starts again from the best order.
    if (stale >= 12) {
      std::copy(best_order.begin(), best_order.end(), order);
      std::copy(best_offsets, best_offsets + n, offsets.begin());
      stale = 0;
    }
    promote(instance, order, num_fixed, offsets.data(), target, random);
  }
  std::copy(best_order.begin(), best_order.end(), order);
  return result;
}

}  // namespace memo

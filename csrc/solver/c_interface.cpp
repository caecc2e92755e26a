// The plain C interface that solver/memo_solver/native.py loads with ctypes.
//
// Every function is pure: it reads its arguments, writes its outputs, keeps nothing and throws
// nothing. Return values: see Outcome; -1 = out of memory.

#include <algorithm>
#include <cstdint>
#include <new>

#include "canonical_search.hpp"
#include "instance.hpp"
#include "squeaky_wheel.hpp"
#include "valley_search.hpp"

#define MEMO_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

memo::Instance make_instance(std::int32_t num_requests, std::int32_t num_slots, const std::int32_t* first,
                             const std::int32_t* last, const std::int64_t* size,
                             const std::int64_t* alignment) {
  memo::Instance instance;
  instance.num_requests = num_requests;
  instance.num_slots = num_slots;
  instance.first = first;
  instance.last = last;
  instance.size = size;
  instance.alignment = alignment;
  return instance;
}

}  // namespace

MEMO_EXPORT std::int32_t memo_interface_version() { return 1; }

MEMO_EXPORT std::int32_t memo_squeaky_wheel(
    std::int32_t num_requests, std::int32_t num_slots, const std::int32_t* first, const std::int32_t* last,
    const std::int64_t* size, const std::int64_t* alignment, std::int32_t* order, std::int32_t num_fixed,
    std::int64_t target, std::int32_t max_passes, std::uint64_t seed, const std::int32_t* stop, double seconds,
    std::int64_t* offsets, std::int64_t* peak, std::int32_t* num_passes) try {
  const auto instance = make_instance(num_requests, num_slots, first, last, size, alignment);
  memo::Stopper stopper(stop, seconds);
  const auto result = memo::squeaky_wheel(instance, order, num_fixed, target, max_passes, seed, offsets, stopper);
  *peak = result.peak;
  *num_passes = result.num_passes;
  return result.peak >= 0 ? 1 : 3;
} catch (const std::bad_alloc&) {
  return -1;
}

MEMO_EXPORT std::int32_t memo_canonical_search(
    std::int32_t num_requests, std::int32_t num_slots, const std::int32_t* first, const std::int32_t* last,
    const std::int64_t* size, const std::int64_t* alignment, const std::int32_t* order, std::int64_t capacity,
    std::int64_t max_nodes, const std::int32_t* stop, double seconds, std::int64_t* offsets,
    std::int64_t* num_nodes) try {
  const auto instance = make_instance(num_requests, num_slots, first, last, size, alignment);
  memo::Stopper stopper(stop, seconds);
  return static_cast<std::int32_t>(
      memo::canonical_search(instance, capacity, order, max_nodes, stopper, offsets, num_nodes));
} catch (const std::bad_alloc&) {
  return -1;
}

MEMO_EXPORT std::int32_t memo_valley_search(
    std::int32_t num_requests, std::int32_t num_slots, const std::int32_t* first, const std::int32_t* last,
    const std::int64_t* size, const std::int64_t* alignment, std::int64_t capacity, std::uint64_t seed,
    std::int64_t max_nodes, const std::int32_t* stop, double seconds, std::int64_t* offsets,
    std::int64_t* num_nodes) try {
  const auto instance = make_instance(num_requests, num_slots, first, last, size, alignment);
  memo::Stopper stopper(stop, seconds);
  return static_cast<std::int32_t>(
      memo::valley_search(instance, capacity, seed, max_nodes, stopper, offsets, num_nodes));
} catch (const std::bad_alloc&) {
  return -1;
}

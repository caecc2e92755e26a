#include "arena.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace memo_arena {
namespace {

// What a step may say of other sizes; a plan of which more is wrong is better made again.
constexpr std::size_t kMostMisfits = 4096;

}  // namespace

Arena::Arena(Device& device, std::uint64_t base, std::uint64_t size) : base_(base), size_(size), ranges_(device) {
  if (base % kAlignment != 0 || size == 0) throw std::invalid_argument("an arena begins at a multiple of 512");
}

void Arena::enable(std::shared_ptr<const Plan> plan) {
  if (plan->extent() > size_) {
    throw std::invalid_argument("the plan needs " + std::to_string(plan->extent()) + " bytes, the arena has " +
                                std::to_string(size_));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  next_ = std::move(plan);
}

void Arena::disable() {
  const std::lock_guard<std::mutex> lock(mutex_);
  next_ = nullptr;
  adopt();
  in_step_ = false;
}

// The plan of the coming step, with all cursors at its begin.
void Arena::adopt() {
  if (plan_ != next_) {
    plan_ = next_;
    places_.clear();
    if (plan_ != nullptr) {
      for (const Lane& lane : plan_->lanes()) places_.push_back({&lane, {}});
    }
  }
  for (Place& place : places_) place.cursor.reset();
}

void Arena::begin_step() {
  end_step();
  const std::lock_guard<std::mutex> lock(mutex_);
  adopt();
  step_ = Counts{};
  misfits_.clear();
  in_step_ = true;
}

void Arena::end_step() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!in_step_) return;
  in_step_ = false;
  statistics_.last_step = step_;
  last_misfits_ = misfits_;
  ++statistics_.steps;
}

void Arena::count(std::uint64_t Counts::*what, std::uint64_t by) {
  statistics_.total.*what += by;
  if (in_step_) step_.*what += by;
}

std::uint64_t Arena::refuse(std::uint64_t Counts::*cause) {
  count(cause);
  return 0;
}

Arena::Place* Arena::place_of(Stream stream, std::uint64_t size, std::uint64_t Counts::*& cause) {
  cause = &Counts::other_stream;
  for (Place& place : places_) {
    if (place.lane->stream != stream) continue;
    if (place.lane->small == (size <= kSmall)) return &place;
    cause = &Counts::unplanned;
  }
  return nullptr;
}

std::uint64_t Arena::take(std::uint64_t bytes, Stream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  count(&Counts::requests);
  count(&Counts::bytes, bytes);
  if (!in_step_ || plan_ == nullptr || bytes == 0 || bytes > size_) return refuse(&Counts::outside);
  const std::uint64_t size = rounded(bytes);
  std::uint64_t Counts::*cause = nullptr;
  Place* place = place_of(stream, size, cause);
  if (place == nullptr) return refuse(cause);
  const Match match = place->cursor.find(*place->lane, size);
  if (match.how == How::none) {
    settle(*place, match, false, bytes);
    return refuse(&Counts::unplanned);
  }
  const std::uint64_t begin = place->lane->offsets[match.slot];
  if (begin == kNative) {
    settle(*place, match, true, bytes);
    return refuse(&Counts::resident);
  }
  std::uint64_t waits = 0;
  const Taken taken = ranges_.take(begin, begin + size, stream, bytes, waits);
  count(&Counts::waits, waits);
  settle(*place, match, taken == Taken::yes, bytes);
  if (match.how == How::elsewhere || match.how == How::near) count(&Counts::jumps);
  if (taken == Taken::occupied) return refuse(&Counts::occupied);
  if (taken == Taken::unordered) return refuse(&Counts::unordered);
  if (match.how != How::at) count(&Counts::displaced);
  count(&Counts::served);
  count(&Counts::served_bytes, bytes);
  ++statistics_.live;
  statistics_.live_bytes += size;
  statistics_.live_requested += bytes;
  statistics_.peak_bytes = std::max(statistics_.peak_bytes, statistics_.live_bytes);
  return base_ + begin;
}

void Arena::settle(Place& place, const Match& match, bool served, std::uint64_t bytes) {
  std::vector<Found> found;
  place.cursor.settle(*place.lane, match, served, bytes, found);
  for (const Found& one : found) {
    if (place.lane->offsets[one.slot] == kNative || misfits_.size() >= kMostMisfits) continue;
    misfits_.push_back({place.lane->numbers[one.slot], one.bytes});
  }
}

std::vector<Misfit> Arena::misfits() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return last_misfits_;
}

Given Arena::found_at(std::uint64_t address) const {
  const Piece* piece = holds(address) ? ranges_.live_at(address - base_) : nullptr;
  if (piece == nullptr) return {};
  return {true, piece->end - (address - base_), piece->requested, piece->owner};
}

Given Arena::look(std::uint64_t address) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return found_at(address);
}

Given Arena::give(std::uint64_t address) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Given given = found_at(address);
  if (!given.ours) return given;
  ranges_.give(address - base_);
  --statistics_.live;
  statistics_.live_bytes -= given.bytes;
  statistics_.live_requested -= given.requested;
  return given;
}

bool Arena::note(std::uint64_t address, Stream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!holds(address) || ranges_.live_at(address - base_) == nullptr) return false;
  ranges_.note(address - base_, stream);
  return true;
}

std::uint64_t Arena::begin_of(std::uint64_t address) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!holds(address)) return 0;
  const auto* found = ranges_.live_around(address - base_);
  return found != nullptr ? base_ + found->first : 0;
}

Statistics Arena::statistics() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return statistics_;
}

void Arena::reset_peak() {
  const std::lock_guard<std::mutex> lock(mutex_);
  statistics_.peak_bytes = statistics_.live_bytes;
}

std::vector<LiveRange> Arena::ranges() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<LiveRange> found;
  std::uint64_t at = 0;
  const auto free_until = [&](std::uint64_t end) {
    if (end > at) found.push_back({base_ + at, base_ + end, 0, 0, 0});
    at = end;
  };
  for (const auto& [begin, piece] : ranges_.pieces()) {
    if (!piece.live) continue;
    free_until(begin);
    found.push_back({base_ + begin, base_ + piece.end, piece.requested, piece.owner, 1});
    at = piece.end;
  }
  free_until(size_);
  return found;
}

void Arena::settle() {
  const std::lock_guard<std::mutex> lock(mutex_);
  ranges_.settle();
}

}  // namespace memo_arena

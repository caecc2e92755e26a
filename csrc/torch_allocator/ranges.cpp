#include "ranges.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

namespace memo_arena {

// The first piece that ends behind `begin`.
Ranges::Map::iterator Ranges::first_over(std::uint64_t begin) {
  auto at = pieces_.upper_bound(begin);
  if (at != pieces_.begin()) {
    const auto before = std::prev(at);
    if (before->second.end > begin) return before;
  }
  return at;
}

SharedEvent Ranges::record(Stream stream) {
  const Event event = device_.record(stream);
  if (event == 0) return nullptr;
  return SharedEvent(new Event(event), [&device = device_](const Event* owned) {
    device.release(*owned);
    delete owned;
  });
}

// Lets `stream` wait for everything that the pieces from `first` to `end` were used for.
bool Ranges::order(Map::iterator first, std::uint64_t end, Stream stream, std::uint64_t& waits) {
  std::vector<Stream> behind;  // streams whose work so far is waited for already
  const auto wait = [&](Stream other, SharedEvent event) {
    if (other == stream || std::find(behind.begin(), behind.end(), other) != behind.end()) return true;
    if (event == nullptr) {
      event = record(other);
      if (event == nullptr) return false;
      behind.push_back(other);
    }
    ++waits;
    return device_.wait(stream, *event);
  };
  for (auto at = first; at != pieces_.end() && at->first < end; ++at) {
    if (!wait(at->second.owner, nullptr)) return false;
    for (const Guest& guest : at->second.guests) {
      if (!wait(guest.stream, guest.event)) return false;
    }
  }
  return true;
}

// Takes [begin, end) out of the pieces from `first` on; what of them lies outside stays.
void Ranges::cut(Map::iterator first, std::uint64_t begin, std::uint64_t end) {
  while (first != pieces_.end() && first->first < end) {
    if (first->second.end > end) {
      Piece rest = first->second;
      pieces_.emplace_hint(std::next(first), end, std::move(rest));
    }
    if (first->first < begin) {
      first->second.end = begin;
      ++first;
    } else {
      first = pieces_.erase(first);
    }
  }
}

Taken Ranges::take(std::uint64_t begin, std::uint64_t end, Stream stream, std::uint64_t requested,
                   std::uint64_t& waits) {
  const auto first = first_over(begin);
  bool alone = true;
  for (auto at = first; at != pieces_.end() && at->first < end; ++at) {
    if (at->second.live) return Taken::occupied;
    alone = alone && at->second.owner == stream && at->second.guests.empty();
  }
  if (!alone && !order(first, end, stream, waits)) return Taken::unordered;
  if (first != pieces_.end() && first->first == begin && first->second.end == end) {
    // The common case: the same range as in the step before, and nothing else was there since.
    first->second = Piece{end, stream, true, requested, {}};
    return Taken::yes;
  }
  cut(first, begin, end);
  pieces_.emplace(begin, Piece{end, stream, true, requested, {}});
  return Taken::yes;
}

const Piece* Ranges::live_at(std::uint64_t begin) const {
  const auto found = pieces_.find(begin);
  return found != pieces_.end() && found->second.live ? &found->second : nullptr;
}

const std::pair<const std::uint64_t, Piece>* Ranges::live_around(std::uint64_t offset) const {
  auto at = pieces_.upper_bound(offset);
  if (at == pieces_.begin()) return nullptr;
  --at;
  return at->second.live && offset < at->second.end ? &*at : nullptr;
}

void Ranges::note(std::uint64_t begin, Stream stream) {
  Piece& piece = pieces_.at(begin);
  const auto known = [&](const Guest& guest) { return guest.stream == stream; };
  if (stream == piece.owner || std::any_of(piece.guests.begin(), piece.guests.end(), known)) return;
  piece.guests.push_back({stream, nullptr});
}

void Ranges::give(std::uint64_t begin) {
  Piece& piece = pieces_.at(begin);
  piece.live = false;
  // Now, while these streams are sure to be there. One that is being captured is asked again when somebody has to wait.
  for (Guest& guest : piece.guests) guest.event = record(guest.stream);
}

void Ranges::settle() {
  for (auto at = pieces_.begin(); at != pieces_.end();) {
    at = at->second.live ? std::next(at) : pieces_.erase(at);
  }
}

}  // namespace memo_arena

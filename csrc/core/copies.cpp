#include "copies.hpp"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <mutex>
#include <string>

#include "failure.hpp"

namespace memo_core {
namespace {

std::string hexadecimal(std::uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// One run, cut where registrations end.
void append_run(const Copy& copy, std::uint64_t row, const Slab& slab, std::vector<Piece>& pieces) {
  auto* host = reinterpret_cast<std::uint8_t*>(copy.host + row * copy.host_pitch);
  std::uint64_t device = copy.device + row * copy.device_pitch;
  std::size_t left = copy.width;
  while (left > 0) {
    const auto offset = static_cast<std::size_t>(host - slab.base());
    const std::size_t size = std::min(left, slab.chunk_end(offset) - offset);
    pieces.push_back({host, device, size, 1, size, size});
    host += size;
    device += size;
    left -= size;
  }
}

}  // namespace

void SlabTable::add(const std::shared_ptr<Slab>& slab) {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  slabs_[reinterpret_cast<std::uint64_t>(slab->base())] = slab;
}

void SlabTable::remove(const std::shared_ptr<Slab>& slab) {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  slabs_.erase(reinterpret_cast<std::uint64_t>(slab->base()));
}

std::shared_ptr<Slab> SlabTable::find(std::uint64_t address, std::uint64_t size) const {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  auto after = slabs_.upper_bound(address);
  if (after != slabs_.begin()) {
    const std::shared_ptr<Slab>& slab = std::prev(after)->second;
    const std::uint64_t offset = address - std::prev(after)->first;
    if (offset <= slab->size() && size <= slab->size() - offset) return slab;
    if (offset < slab->size()) {
      throw Failure(Status::out_of_range, "host bytes [" + std::to_string(offset) + ", " +
                                              std::to_string(offset + size) + ") lie outside their slab of " +
                                              std::to_string(slab->size()) + " bytes");
    }
  }
  throw Failure(Status::out_of_range, "host address " + hexadecimal(address) +
                                          " lies in no slab: the slab was freed, or the memory is not of this pool");
}

std::uint64_t span(std::uint64_t width, std::uint64_t height, std::uint64_t pitch) {
  if (height <= 1) return width;
  constexpr std::uint64_t kMost = std::numeric_limits<std::int64_t>::max();
  if (width > kMost || pitch > (kMost - width) / (height - 1)) {
    throw Failure(Status::out_of_range, "a copy of " + std::to_string(height) + " runs at a distance of " +
                                            std::to_string(pitch) + " bytes is larger than memory can be");
  }
  return pitch * (height - 1) + width;
}

void plan_copy(const Copy& copy, const SlabTable& slabs, Work& work) {
  if (copy.width == 0 || copy.height == 0) return;
  const bool overlaps = copy.height > 1 && (copy.host_pitch < copy.width || copy.device_pitch < copy.width);
  if (overlaps) throw Failure(Status::invalid, "the runs of a copy overlap: their distance is less than their length");
  span(copy.width, copy.height, copy.device_pitch);
  std::shared_ptr<Slab> slab = slabs.find(copy.host, span(copy.width, copy.height, copy.host_pitch));
  Copy whole = copy;
  if (copy.height > 1 && copy.host_pitch == copy.width && copy.device_pitch == copy.width) {
    whole.width = copy.width * copy.height;  // no gaps on either side: one run
    whole.height = 1;
  }
  const auto base = reinterpret_cast<std::uint64_t>(slab->base());
  std::uint64_t row = 0;
  while (row < whole.height) {
    const std::uint64_t offset = whole.host + row * whole.host_pitch - base;
    const std::uint64_t room = slab->chunk_end(offset) - offset;
    // Runs that end inside this registration go together; the one that crosses is cut.
    const std::uint64_t distance = std::max<std::uint64_t>(whole.host_pitch, 1);
    const std::uint64_t fit = room < whole.width ? 0 : (room - whole.width) / distance + 1;
    const std::uint64_t rows = std::min(fit, whole.height - row);
    if (rows > 1 && whole.host_pitch <= kCuMaxPitch && whole.device_pitch <= kCuMaxPitch) {
      work.pieces.push_back({reinterpret_cast<std::uint8_t*>(base + offset), whole.device + row * whole.device_pitch,
                             whole.width, rows, whole.host_pitch, whole.device_pitch});
      row += rows;
    } else {
      append_run(whole, row, *slab, work.pieces);
      ++row;
    }
  }
  // Copies of one submission mostly share a slab.
  if (work.slabs.empty() || work.slabs.back() != slab) work.slabs.push_back(std::move(slab));
}

}  // namespace memo_core

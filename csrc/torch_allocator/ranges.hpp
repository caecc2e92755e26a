// Who has, or last had, every byte of the arena; and what has to be waited for before the next one gets it.
//
// Bytes that were never used are in no piece. A freed piece keeps its owner's stream: the same stream may use it again at
// once, as its work runs in order. Any other has to wait for an event behind the owner's work, and all have to wait for
// the streams that were noted (record_stream). Not thread-safe: the arena has the lock.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "device.hpp"

namespace memo_arena {

// An event that pieces share after a cut.
using SharedEvent = std::shared_ptr<const Event>;

// A stream that used a piece beside its owner; no event yet where none could be recorded.
struct Guest {
  Stream stream;
  SharedEvent event;
};

struct Piece {
  std::uint64_t end;
  Stream owner;
  bool live;
  std::uint64_t requested;  // bytes, as asked for
  std::vector<Guest> guests;
};

enum class Taken { yes, occupied, unordered };

class Ranges {
 public:
  explicit Ranges(Device& device) : device_(device) {}

  // [begin, end) for `stream`; `waits` counts what it has to wait for. Nothing changes where that is not `yes`.
  Taken take(std::uint64_t begin, std::uint64_t end, Stream stream, std::uint64_t requested, std::uint64_t& waits);
  // The live piece that begins there, or none.
  const Piece* live_at(std::uint64_t begin) const;
  // The live piece that holds `offset`: its begin and itself, or none.
  const std::pair<const std::uint64_t, Piece>* live_around(std::uint64_t offset) const;
  // `stream` uses the live piece that begins there too.
  void note(std::uint64_t begin, Stream stream);
  // The live piece that begins there is free from now on.
  void give(std::uint64_t begin);
  // The device has finished everything: nothing has to be waited for.
  void settle();

  const std::map<std::uint64_t, Piece>& pieces() const { return pieces_; }

 private:
  using Map = std::map<std::uint64_t, Piece>;

  SharedEvent record(Stream stream);
  bool order(Map::iterator first, std::uint64_t end, Stream stream, std::uint64_t& waits);
  void cut(Map::iterator first, std::uint64_t begin, std::uint64_t end);
  Map::iterator first_over(std::uint64_t begin);

  Device& device_;
  Map pieces_;
};

}  // namespace memo_arena

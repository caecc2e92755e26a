// One arena: serves the requests of a step at the plan's offsets, and says no to everything else.
//
// A range is served only when the request matches a slot (stream, rounded size, place in the step), every byte of it is
// free, and the stream is ordered behind all that used these bytes. A no is never an error: the caller goes to the native
// allocator, and the step goes on. All functions may be called from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cursor.hpp"
#include "device.hpp"
#include "plan.hpp"
#include "ranges.hpp"

namespace memo_arena {

// Requests and bytes of a time. C layout: it crosses the C interface.
struct Counts {
  std::uint64_t requests;
  std::uint64_t bytes;  // as requested
  std::uint64_t served;
  std::uint64_t served_bytes;
  // Requests that were not served, by cause: planned to be the native allocator's, as they outlive the step; outside of a
  // step or without a plan; on a stream that the plan does not know; of a size that it does not have there; its bytes in
  // use; its bytes not to be ordered.
  std::uint64_t resident;
  std::uint64_t outside;
  std::uint64_t other_stream;
  std::uint64_t unplanned;
  std::uint64_t occupied;
  std::uint64_t unordered;
  // Served from another place than under the cursor; and how often the cursor jumped.
  std::uint64_t displaced;
  std::uint64_t jumps;
  // Events that a stream had to wait for.
  std::uint64_t waits;
};

struct Statistics {
  Counts total;
  Counts last_step;  // of the last whole step
  std::uint64_t steps;
  std::uint64_t live;        // ranges
  std::uint64_t live_bytes;  // rounded
  std::uint64_t live_requested;
  std::uint64_t peak_bytes;  // most of live_bytes since the last reset
};

// Slot `slot` of the plan, and what the step asked for in its place. C layout: it crosses the C interface.
struct Misfit {
  std::uint64_t slot;
  std::uint64_t bytes;
};

struct LiveRange {
  std::uint64_t begin;
  std::uint64_t end;
  std::uint64_t requested;
  Stream stream;
  std::uint64_t live;  // 1, or 0 for free bytes
};

// A live range, or one that was just freed.
struct Given {
  bool ours;
  std::uint64_t bytes;
  std::uint64_t requested;
  Stream stream;
};

class Arena {
 public:
  // [base, base + size) is the arena's; nothing is read or written there.
  Arena(Device& device, std::uint64_t base, std::uint64_t size);

  std::uint64_t base() const { return base_; }
  std::uint64_t size() const { return size_; }
  bool holds(std::uint64_t address) const { return address - base_ < size_; }

  // From the next step on. What lives in the arena stays there; throws std::invalid_argument if the plan is larger.
  void enable(std::shared_ptr<const Plan> plan);
  // Nothing is served from now on.
  void disable();
  void begin_step();
  void end_step();

  // The address for `bytes` on `stream`, or 0.
  std::uint64_t take(std::uint64_t bytes, Stream stream);
  // What lives at `address`.
  Given look(std::uint64_t address) const;
  // Frees what begins at `address`.
  Given give(std::uint64_t address);
  // `stream` uses what begins at `address` too; false where nothing does.
  bool note(std::uint64_t address, Stream stream);
  // The begin of the live range around `address`, or 0.
  std::uint64_t begin_of(std::uint64_t address) const;

  Statistics statistics() const;
  // Requests of the last whole step whose size was another than planned, as far as their place is known.
  std::vector<Misfit> misfits() const;
  void reset_peak();
  // All of [base, base + size), in order.
  std::vector<LiveRange> ranges() const;
  // The device has finished everything that it was given.
  void settle();

 private:
  struct Place {
    const Lane* lane;
    Cursor cursor;
  };

  // The lane of such requests; where there is none, `cause` is why not.
  Place* place_of(Stream stream, std::uint64_t size, std::uint64_t Counts::*& cause);
  void settle(Place& place, const Match& match, bool served, std::uint64_t bytes);
  Given found_at(std::uint64_t address) const;
  std::uint64_t refuse(std::uint64_t Counts::*cause);
  void count(std::uint64_t Counts::*what, std::uint64_t by = 1);
  void adopt();

  const std::uint64_t base_;
  const std::uint64_t size_;
  mutable std::mutex mutex_;
  std::shared_ptr<const Plan> next_;  // of the next step
  std::shared_ptr<const Plan> plan_;  // of this one
  std::vector<Place> places_;
  Ranges ranges_;
  bool in_step_ = false;
  Counts step_{};
  Statistics statistics_{};
  std::vector<Misfit> misfits_;       // of this step
  std::vector<Misfit> last_misfits_;  // of the last whole one
};

}  // namespace memo_arena

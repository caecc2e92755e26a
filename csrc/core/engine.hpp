// What both copy engines promise.
//
// A ticket stands for one submission, which is one copy or many. It is used up by one wait or one cancel. Copies of one
// direction run in the order in which they were submitted; the two directions run beside each other.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>

#include "copies.hpp"
#include "failure.hpp"

namespace memo_core {

class Engine {
 public:
  virtual ~Engine() = default;

  // Starts `work` when `stream` has reached this point, under the number that the caller chose: it knows the ticket
  // before there is one, so an interrupt that follows this call cannot lose it. Throws Failure where the work makes no
  // sense. What the driver refuses later surfaces at the wait.
  virtual void submit(std::int64_t ticket, Direction direction, Work work, std::uint64_t stream, std::string name) = 0;
  // `stream` goes on when the copies are made (on CPU: the calling thread does). Throws Failure(copy_failed) where they
  // were not, and Failure(invalid) for a ticket that was used up.
  virtual void wait(std::int64_t ticket, std::uint64_t stream) = 0;
  // Nobody wants the result: true where nothing was begun and nothing will be; else `stream` waits, as in `wait`, so
  // that both ends may be used again, and a failure of the copy is of no interest.
  virtual bool cancel(std::int64_t ticket, std::uint64_t stream) = 0;
  // Whether the copies are made or have failed; does not use the ticket up.
  virtual bool done(std::int64_t ticket) = 0;
  // Returns when nothing is under way.
  virtual void drain() = 0;
  // The stream of one direction, for profilers and for tests that slow it; 0 where there is none.
  virtual std::uint64_t stream(Direction direction) = 0;
  // Tickets that were neither waited for nor cancelled.
  virtual std::int64_t num_open() = 0;
  // A forked child has none of the engine's threads: whoever waits there waits for ever.
  bool mine() const { return process_ == getpid(); }

 private:
  const pid_t process_ = getpid();
};

// The tickets of one engine by number. Not locked: its engine is.
template <typename T>
class Tickets {
 public:
  // Throws Failure(invalid) for a number that was used before; two threads may come in another order than their numbers.
  void check(std::int64_t number) const {
    if (number <= 0 || open_.count(number) > 0) {
      throw Failure(Status::invalid, "a ticket needs a number of its own above 0; " + std::to_string(number) + " is none");
    }
  }

  void add(std::int64_t number, T ticket) {
    open_.emplace(number, std::move(ticket));
    last_ = std::max(last_, number);
  }

  T& at(std::int64_t number) {
    const auto found = open_.find(number);
    if (found != open_.end()) return found->second;
    if (number > 0 && number <= last_) {
      throw Failure(Status::invalid,
                    "ticket " + std::to_string(number) + " was used up: it was waited for or cancelled before");
    }
    throw Failure(Status::invalid, "there is no ticket " + std::to_string(number));
  }

  T take(std::int64_t number) {
    T ticket = std::move(at(number));
    open_.erase(number);
    return ticket;
  }

  std::map<std::int64_t, T>& all() { return open_; }

 private:
  std::int64_t last_ = 0;
  std::map<std::int64_t, T> open_;
};

// Line `number` of `text`; all of it where it has no more lines than one.
inline std::string line_of(const std::string& text, std::size_t number) {
  if (text.find('\n') == std::string::npos) return text;
  std::size_t begin = 0;
  for (; number > 0 && text.find('\n', begin) != std::string::npos; --number) begin = text.find('\n', begin) + 1;
  return text.substr(begin, text.find('\n', begin) - begin);
}

inline std::string described(Direction direction, const std::string& name) {
  return "copying " + (name.empty() ? std::string("a tensor") : "'" + name + "'") +
         (direction == Direction::to_host ? " to the host" : " to the device") + " failed";
}

}  // namespace memo_core

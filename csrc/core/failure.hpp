// The one exception of the core, and the codes that it becomes at the C interface.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace memo_core {

// memo_runtime/native/library.py knows the same numbers.
enum class Status : std::int32_t {
  ok = 0,
  bug = 1,           // ours
  invalid = 2,       // an argument that makes no sense, or a ticket that was used up
  out_of_range = 3,  // not inside the memory that it names
  refused = 4,       // the system gives no more memory, or does not pin it
  copy_failed = 5,   // a copy did not happen; the text has its name
  wrong_device = 6,  // memory of another device
  closed = 7,        // a slab or engine that was given back
  unavailable = 8,   // no CUDA driver, or one that lacks a function
};

struct Failure : std::runtime_error {
  Failure(Status code, const std::string& text) : std::runtime_error(text), status(code) {}
  Status status;
};

}  // namespace memo_core

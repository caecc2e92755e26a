// Starting threads, of which the system may refuse any.
#pragma once

#include <cstddef>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "failure.hpp"

namespace memo_core {

// Starts `count` threads of `body`. Where one does not start, `stop` ends and joins those that did: a thread that nobody
// joined would end the process.
template <typename Body, typename Stop>
void start_threads(std::vector<std::thread>& threads, std::size_t count, Body body, Stop stop) {
  try {
    threads.reserve(count);
    for (std::size_t i = 0; i < count; ++i) threads.emplace_back(body);
  } catch (const std::system_error& error) {
    stop();
    throw Failure(Status::refused, std::string("the system starts no thread: no memory for its stack, or too many (") +
                                       error.what() + ")");
  }
}

}  // namespace memo_core

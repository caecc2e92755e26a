// Numbers instead of pointers across the C interface, so that a stale one is an error and not a crash.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "failure.hpp"

namespace memo_core {

template <typename T>
class Handles {
 public:
  explicit Handles(std::string kind) : kind_(std::move(kind)) {}

  std::int64_t add(std::shared_ptr<T> object) {
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    objects_.emplace(++last_, std::move(object));
    return last_;
  }

  std::shared_ptr<T> get(std::int64_t handle) const {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    const auto found = objects_.find(handle);
    if (found == objects_.end()) throw Failure(Status::closed, "the " + kind_ + " was freed, or never was one");
    return found->second;
  }

  // Forgets the object; it lives on in whoever holds it.
  std::shared_ptr<T> take(std::int64_t handle) {
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    const auto found = objects_.find(handle);
    if (found == objects_.end()) throw Failure(Status::closed, "the " + kind_ + " was freed, or never was one");
    std::shared_ptr<T> object = std::move(found->second);
    objects_.erase(found);
    return object;
  }

  std::vector<std::shared_ptr<T>> all() const {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    std::vector<std::shared_ptr<T>> objects;
    for (const auto& entry : objects_) objects.push_back(entry.second);
    return objects;
  }

 private:
  std::string kind_;
  mutable std::shared_mutex mutex_;
  std::int64_t last_ = 0;
  std::unordered_map<std::int64_t, std::shared_ptr<T>> objects_;
};

}  // namespace memo_core

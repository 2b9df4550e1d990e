// Threads that wait for work between calls: one pool for the process, used by one caller at a time.
#pragma once

#include <cfenv>
#include <cstdint>
#include <functional>

namespace mixtral {

// Calls work(i) for every i in [0, items) on up to `threads` threads, the calling one included; returns when all are
// done. Which thread takes an item is not defined. An exception of `work` ends the process: work must not throw.
void parallel(int64_t items, int threads, const std::function<void(int64_t)>& work);

// While it lives, this thread rounds to nearest and takes subnormal numbers for zero, whatever the process has set, as
// all do inside of parallel().
class FloatMode {
 public:
  FloatMode();
  ~FloatMode();
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
  std::fenv_t saved_;
};

}  // namespace mixtral

// Times the micro-kernels of limits.h on several threads and keeps the best run: others may use the machine meanwhile.
#include "mixtral/limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "mixtral/pool.h"

namespace mixtral {

namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// The best of amount() / time of run(), repeated until the time is over.
template <typename Run>
double best(double seconds, const Run& run) {
  double fastest = 0.0;
  const Clock::time_point start = Clock::now();
  do {
    const Clock::time_point began = Clock::now();
    const double amount = run();
    fastest = std::max(fastest, amount / std::max(since(began), 1e-9));
  } while (since(start) < seconds);
  return fastest;
}

}  // namespace

double read_speed(const LimitTable& table, const uint8_t* data, int64_t bytes, int threads, double seconds) {
  constexpr int64_t kItem = int64_t{1} << 22;
  std::atomic<uint64_t> seen{0};  // what was read is used: the loads cannot be left out
  return best(seconds, [&] {
    parallel((bytes + kItem - 1) / kItem, threads, [&](int64_t item) {
      const int64_t first = item * kItem;
      seen.fetch_add(table.read(data + first, std::min(kItem, bytes - first)), std::memory_order_relaxed);
    });
    return static_cast<double>(bytes);
  });
}

double peak_speed(int64_t (*run)(int64_t rounds), int threads, double seconds) {
  // As many rounds as take some milliseconds: long beside waking a thread, short beside a slice of the scheduler.
  constexpr double kRun = 4e-3;
  int64_t rounds = 1000;
  while (rounds < (int64_t{1} << 40)) {
    const Clock::time_point start = Clock::now();
    run(rounds);
    if (since(start) > kRun) break;
    rounds *= 2;
  }
  return best(seconds, [&] {
    std::atomic<int64_t> operations{0};
    parallel(threads, threads, [&](int64_t) { operations.fetch_add(run(rounds), std::memory_order_relaxed); });
    return static_cast<double>(operations.load());
  });
}

}  // namespace mixtral

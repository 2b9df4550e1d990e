// A pool that grows to the largest number of threads asked for, sleeps when idle, and starts anew in a forked child.
#include "mixtral/pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifdef MIXTRAL_X86
#include <immintrin.h>
#endif

namespace mixtral {
namespace {

constexpr int kSpins = 4000;  // some 20 microseconds: longer than the gap between the steps of one operation
constexpr int kMostThreads = 1024;

inline void relax() {
#ifdef MIXTRAL_X86
  _mm_pause();
#endif
}

struct Job {
  const std::function<void(int64_t)>* work = nullptr;
  int64_t items = 0;
  std::atomic<int64_t> next{0};
  std::atomic<int> places{0};   // workers that may still join
  std::atomic<int> running{0};  // workers inside
};

class Pool {
 public:
  explicit Pool(pid_t owner) : owner_(owner) {}

  pid_t owner() const { return owner_; }

  void run(int64_t items, int threads, const std::function<void(int64_t)>& work) {
    std::lock_guard<std::mutex> one(callers_);
    const int helpers = static_cast<int>(std::min<int64_t>(threads, items)) - 1;
    if (helpers > 0) grow(helpers);
    job_.work = &work;
    job_.items = items;
    job_.next.store(0, std::memory_order_relaxed);
    const int joined = std::min<int>(helpers, static_cast<int>(workers_));
    if (joined > 0) {
      job_.places.store(joined);
      epoch_.fetch_add(1);
      if (sleeping_.load() > 0) {
        std::lock_guard<std::mutex> lock(sleep_);
        wake_.notify_all();
      }
    }
    take();
    if (joined > 0) {
      job_.places.store(0);  // who has not come yet is not needed any more
      for (int spins = 0; job_.running.load() != 0; ++spins) {
        if (spins < kSpins * 16) {
          relax();
        } else {
          std::this_thread::yield();
        }
      }
    }
  }

 private:
  // What is thrown in here ends the process: others still look at the job.
  void take() noexcept {
    FloatMode mode;
    for (int64_t i; (i = job_.next.fetch_add(1, std::memory_order_relaxed)) < job_.items;) (*job_.work)(i);
  }

  void grow(int count) {
    while (static_cast<int>(workers_) < count) {
      try {
        std::thread(&Pool::serve, this, epoch_.load()).detach();
      } catch (const std::system_error&) {
        return;  // the system gives no more threads: those that are there share the work
      }
      ++workers_;
    }
  }

  void serve(uint64_t seen) {
    for (;;) {
      for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen; ++spins) {
        if (spins < kSpins) {
          relax();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        sleeping_.fetch_sub(1);
      }
      seen = epoch_.load(std::memory_order_acquire);
      // Announce first, then look for a place: the caller closes the places before it waits for those announced.
      job_.running.fetch_add(1);
      int places = job_.places.load();
      while (places > 0 && !job_.places.compare_exchange_weak(places, places - 1)) {
      }
      if (places > 0) take();
      job_.running.fetch_sub(1);
    }
  }

  const pid_t owner_;
  std::mutex callers_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> sleeping_{0};
  std::size_t workers_ = 0;
  Job job_;
};

// Never destroyed: its threads may outlive every static object. A forked child has none of them and makes its own; it
// may have been made while other threads were in here, so no lock is asked for on the way.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  const pid_t self = getpid();
  Pool* found = current.load();
  while (found == nullptr || found->owner() != self) {
    Pool* own = new Pool(self);
    if (current.compare_exchange_strong(found, own)) return *own;
    delete own;  // another thread was faster
  }
  return *found;
}

}  // namespace

void parallel(int64_t items, int threads, const std::function<void(int64_t)>& work) {
  if (items > 0) pool().run(items, std::clamp(threads, 1, kMostThreads), work);
}

FloatMode::FloatMode() {
  std::fegetenv(&saved_);
  std::fesetenv(FE_DFL_ENV);
#ifdef MIXTRAL_X86
  _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
}

FloatMode::~FloatMode() { std::fesetenv(&saved_); }

}  // namespace mixtral

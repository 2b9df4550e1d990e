// A stress test of the pool and of whole layers on it, without Python: for ThreadSanitizer (`make sanitize`).
//
// stress LEVEL...                 every check, with the kernels of every level named; the first wrong number ends it
// stress race, beyond, overflow   a fault on purpose: whoever finds no others must find these
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "mixtral/layers.h"
#include "mixtral/pool.h"

namespace {

using namespace mixtral;
using Random = std::minstd_rand;
using Bytes = std::vector<uint8_t>;
using Numbers = std::vector<float>;

constexpr int kMostThreads = 8;  // four times as many as a small machine has cores
#ifdef __SANITIZE_THREAD__
constexpr bool kThreadsAfterFork = false;  // ThreadSanitizer takes those of a child for those of its parent
#else
constexpr bool kThreadsAfterFork = true;
#endif

void check(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "stress: %s\n", what.c_str());
  std::_Exit(1);
}

// --- the pool --------------------------------------------------------------------------------------------------------

// Every item once, whatever the threads; the counters are plain numbers, so that a race on them is one.
void count_once(Random& random, int most = kMostThreads) {
  const int64_t items = random() % 3 == 0 ? static_cast<int64_t>(random() % 3) : static_cast<int64_t>(random() % 300);
  const int threads = static_cast<int>(random() % static_cast<unsigned>(most + 1));
  std::vector<int> done(static_cast<size_t>(items), 0);
  parallel(items, threads, [&](int64_t i) { ++done[static_cast<size_t>(i)]; });
  for (const int times : done) check(times == 1, "an item was taken " + std::to_string(times) + " times");
}

void count_often(unsigned seed, int calls) {
  Random random(seed);
  for (int call = 0; call < calls; ++call) {
    count_once(random);
    // Around the time after which an idle thread goes to sleep.
    if (call % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
  }
}

template <typename Each>
void together(int callers, const Each& each) {
  std::vector<std::thread> threads;
  for (int caller = 0; caller < callers; ++caller) threads.emplace_back([&each, caller] { each(caller); });
  for (std::thread& thread : threads) thread.join();
}

// A child has none of the threads, and must compute all the same: also one that is made while others are in the pool.
void fork_once(unsigned seed) {
  const pid_t child = fork();
  check(child >= 0, "fork failed");
  if (child == 0) {
    alarm(60);  // one that waits for threads which are not there
    Random random(seed);
    for (int call = 0; call < 20; ++call) count_once(random, kThreadsAfterFork ? kMostThreads : 1);
    std::_Exit(0);
  }
  int status = 0;
  check(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child failed");
}

void fork_meanwhile() {
  std::atomic<bool> over{false};
  std::thread others([&] {
    together(3, [&](int) {
      // The shortest of calls: a child is likely to be made while somebody is on the way in or out.
      while (!over.load()) parallel(2, 1, [](int64_t) {});
    });
  });
  for (unsigned seed = 0; seed < 20; ++seed) fork_once(seed);
  over.store(true);
  others.join();
}

// Kernels round to nearest whatever the caller does, and the caller gets back what it had.
void keep_rounding() {
  std::fesetround(FE_UPWARD);
  std::atomic<int> wrong{0};
  parallel(64, kMostThreads, [&](int64_t) { wrong += std::fegetround() != FE_TONEAREST; });
  check(wrong == 0 && std::fegetround() == FE_UPWARD, "the rounding mode is not the one it should be");
  std::fesetround(FE_TONEAREST);
}

// --- layers ----------------------------------------------------------------------------------------------------------

Numbers numbers(Random& random, int64_t count) {
  std::normal_distribution<float> normal;
  Numbers found(static_cast<size_t>(count));
  for (float& number : found) number = normal(random);
  return found;
}

// A matrix and the memory that it lies in.
struct Matrix {
  Bytes data;
  Weights weights;
};

Matrix plain(Random& random, Float kind, int64_t rows, int64_t columns) {
  Dense dense{kind, rows, columns, nullptr};
  const Numbers values = numbers(random, rows * columns);
  Matrix made{Bytes(static_cast<size_t>(rows * dense.row_bytes())), {}};
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], 4);
    const uint16_t high = static_cast<uint16_t>(bits >> 16);
    if (kind == Float::f32) std::memcpy(&made.data[4 * i], &bits, 4);
    if (kind == Float::bf16) std::memcpy(&made.data[2 * i], &high, 2);
  }
  dense.data = made.data.data();
  made.weights = {false, {}, dense};
  return made;
}

Matrix packed(Random& random, Kind kind, int64_t rows, int64_t columns, int64_t group = 32) {
  Panels panels{kind, rows, columns, group, nullptr};
  Matrix made{Bytes(static_cast<size_t>(panels.count() * panels.panel_bytes())), {}};
  const int bits = kind == Kind::g4 ? 4 : 8;
  Bytes packed_bits(static_cast<size_t>(rows * columns / 8 * bits)), zeros(static_cast<size_t>(rows * columns / group));
  std::vector<uint16_t> scales(zeros.size());
  for (uint8_t& byte : packed_bits) byte = static_cast<uint8_t>(random() % 256);
  for (uint8_t& zero : zeros) zero = static_cast<uint8_t>(random() % 16);
  for (uint16_t& scale : scales) scale = static_cast<uint16_t>(0x2000 + random() % 1024);
  pack_groups(panels, {packed_bits.data(), scales.data(), zeros.data(), bits, group}, made.data.data(), kMostThreads);
  panels.data = made.data.data();
  made.weights = {true, panels, {}};
  return made;
}

// One call of a layer into fresh memory. All that it writes is in what it returns.
using Call = std::function<std::vector<Bytes>(int threads)>;

template <typename T>
Bytes bytes_of(const std::vector<T>& values) {
  Bytes found(values.size() * sizeof(T));
  if (!found.empty()) std::memcpy(found.data(), values.data(), found.size());
  return found;
}

// The same bits on one thread and on many, for several callers at once.
void compare(const char* name, const Call& call) {
  const std::vector<Bytes> expected = call(1);
  together(4, [&](int caller) {
    Random random(static_cast<unsigned>(caller + 1));
    for (int turn = 0; turn < 4; ++turn) {
      const int threads = 1 + static_cast<int>(random() % kMostThreads);
      check(call(threads) == expected, std::string(name) + " differs on " + std::to_string(threads) + " threads");
    }
  });
}

void compare_projections(const Kernels& kernels) {
  constexpr int64_t kRows = 37, kColumns = 384;
  Random random(1);
  std::vector<Matrix> made;
  made.push_back(plain(random, Float::bf16, 70, kColumns));
  made.push_back(packed(random, Kind::g8, 130, kColumns));
  made.push_back(plain(random, Float::f32, 9, kColumns));
  made.push_back(packed(random, Kind::g4, 33, kColumns));
  made.push_back(packed(random, Kind::g8, 70, kColumns, 128));  // wide enough for tiles
  std::vector<const Weights*> matrices;
  int64_t width = 0;
  for (const Matrix& matrix : made) matrices.push_back(&matrix.weights), width += matrix.weights.rows();
  const Numbers x = numbers(random, kRows * kColumns), norm = numbers(random, kColumns);
  const Numbers beside = numbers(random, kRows * width);
  compare("project", [&](int threads) {
    Numbers out(static_cast<size_t>(kRows * width));
    project(kernels, {x.data(), kRows, kColumns, norm.data(), 1e-5f}, matrices.data(),
            static_cast<int64_t>(matrices.size()), beside.data(), out.data(), threads);
    return std::vector<Bytes>{bytes_of(out)};
  });
}

void compare_mixtures(const Kernels& kernels, bool in_panels) {
  constexpr int64_t kRows = 45, kWidth = 288, kHidden = 320, kExperts = 5, kChoices = 2;
  Random random(2);
  std::vector<Matrix> made;
  std::vector<Weights> gate, up, down;
  made.reserve(3 * kExperts);  // views point into it
  for (int64_t e = 0; e < kExperts; ++e) {
    for (std::vector<Weights>* part : {&gate, &up, &down}) {
      const int64_t rows = part == &down ? kWidth : kHidden, columns = part == &down ? kHidden : kWidth;
      made.push_back(in_panels ? packed(random, Kind::g4, rows, columns) : plain(random, Float::bf16, rows, columns));
      part->push_back(made.back().weights);
    }
  }
  const Numbers x = numbers(random, kRows * kWidth), router = numbers(random, kExperts * kWidth);
  const Numbers norm = numbers(random, kWidth);
  compare("mixture", [&](int threads) {
    Numbers out(x.size()), logits(kRows * kExperts), shares(kRows * kChoices);
    std::vector<int64_t> picks(kRows * kChoices);
    mixture(kernels, {x.data(), kRows, kWidth, norm.data(), 1e-5f},
            {router.data(), kChoices, logits.data(), picks.data(), shares.data()},
            {gate.data(), up.data(), down.data(), kExperts}, x.data(), out.data(), threads);
    return std::vector<Bytes>{bytes_of(out), bytes_of(logits), bytes_of(picks), bytes_of(shares)};
  });
}

// A prompt, a long context with one new token, and a few new tokens, all in one batch.
void compare_attention(const Kernels& kernels, Store store) {
  const Heads heads{4, 2, 24, store};
  constexpr int64_t kPages = 50;
  std::vector<Span> spans = {{{7, 3}, 0, 90}, {{}, 40 * kPage, 1}, {{5}, 10, 3}};
  for (int32_t page = 8; page < 49; ++page) spans[1].pages.push_back(page);
  int64_t tokens = 0;
  for (const Span& span : spans) tokens += span.count;
  Random random(3);
  const Numbers qkv = numbers(random, tokens * (heads.queries + 2 * heads.keys) * heads.size);
  const Numbers cosines = numbers(random, tokens * heads.size / 2), sines = numbers(random, tokens * heads.size / 2);
  const Bytes before(static_cast<size_t>(kPages * heads.keys * heads.block_bytes()), 0x3C);
  compare("attend", [&](int threads) {
    Bytes pages = before;
    Numbers out(static_cast<size_t>(tokens * heads.queries * heads.size));
    attend(kernels, heads, qkv.data(), cosines.data(), sines.data(), spans, pages.data(), out.data(), threads);
    return std::vector<Bytes>{bytes_of(out), pages};
  });
}

// --- faults that the sanitizers must find ----------------------------------------------------------------------------

void commit(const std::string& fault) {
  std::vector<int> numbers(4, 1);
  // What the compiler does not know it cannot see through.
  volatile int most = 2147483647, behind = 4;
  if (fault == "race") {
    parallel(64, 2, [&](int64_t) {
      ++numbers[0];
      std::this_thread::sleep_for(std::chrono::milliseconds(1));  // time for the other thread to come
    });
  }
  if (fault == "beyond") numbers[0] = numbers.data()[behind];
  if (fault == "overflow") numbers[0] = most + numbers[1];
  std::printf("%s was not found: %d\n", fault.c_str(), numbers[0]);
}

}  // namespace

int main(int count, char** names) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (const char* fault : {"race", "beyond", "overflow"}) {
    if (count == 2 && names[1] == std::string(fault)) return commit(fault), 0;
  }
  count_often(1, 3000);
  together(6, [](int caller) { count_often(static_cast<unsigned>(caller + 2), 500); });
  std::puts("pool: one caller, six callers");
  keep_rounding();
  for (unsigned seed = 0; seed < 5; ++seed) fork_once(seed);
  fork_meanwhile();
  std::puts("pool: rounding mode, forked children");
  for (int i = 1; i < count; ++i) {
    const Kernels* kernels = find_kernels(names[i]);
    check(kernels != nullptr, std::string("no kernels ") + names[i]);
    compare_projections(*kernels);
    compare_mixtures(*kernels, true);
    compare_mixtures(*kernels, false);
    for (const Store store : {Store::bf16, Store::f32, Store::int8}) compare_attention(*kernels, store);
    std::printf("layers: %s\n", names[i]);
  }
  return 0;
}

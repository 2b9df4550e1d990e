// Runs an encoder over an array: picks the instruction set at run time, shares the blocks out to threads.
#include "mixtral/encode.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <system_error>
#include <thread>

namespace mixtral {
namespace {

constexpr int64_t kChunkValues = 1 << 16;

struct Tables {
  const KernelTable* blocks;
  const GroupTable* groups;
};

// Both null if this build or this processor has no such instruction set.
Tables find_tables(std::string_view level) {
#ifdef MIXTRAL_X86
  // The compiler's runtime also asks whether the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (level == "avx2") return has_avx2 ? Tables{&avx2::table, &avx2::groups} : Tables{};
  if (level == "avx512") return has_avx512 ? Tables{&avx512::table, &avx512::groups} : Tables{};
#endif
  return level == "baseline" ? Tables{&baseline::table, &baseline::groups} : Tables{};
}

Fault worse(const Fault& a, const Fault& b) {
  if (a.problem == Problem::none) return b;
  if (b.problem == Problem::none) return a;
  if (a.problem != b.problem) return a.problem == Problem::not_finite ? a : b;
  return a.at < b.at ? a : b;
}

// Calls `encoder(begin, end)` for parts of `blocks` blocks of `values` values, on several threads.
template <typename Part>
Fault share_out(int64_t blocks, int64_t values, int threads, Part encoder) {
  const int64_t chunk = kChunkValues / values;
  const int64_t chunks = (blocks + chunk - 1) / chunk;
  const int64_t workers = std::clamp<int64_t>(threads, 1, std::max<int64_t>(chunks, 1));
  std::atomic<int64_t> next{0};
  std::vector<Fault> faults(static_cast<size_t>(workers), Fault{Problem::none, 0});

  auto work = [&](Fault& found) {
    // Rounding and subnormal numbers as the reference has them, whatever the process has set.
    std::fenv_t saved;
    std::fegetenv(&saved);
    std::fesetenv(FE_DFL_ENV);
    for (int64_t i; (i = next.fetch_add(1)) < chunks;) {
      const int64_t end = std::min(blocks, (i + 1) * chunk);
      found = worse(found, encoder(i * chunk, end));
    }
    std::fesetenv(&saved);
  };

  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(workers - 1));
  for (int64_t i = 1; i < workers; ++i) {
    try {
      others.emplace_back(work, std::ref(faults[static_cast<size_t>(i)]));
    } catch (const std::system_error&) {
      break;  // the system gives no more threads: the others take the chunks
    }
  }
  work(faults[0]);
  for (std::thread& other : others) other.join();
  Fault result{Problem::none, 0};
  for (const Fault& fault : faults) result = worse(result, fault);
  return result;
}

}  // namespace

std::vector<std::string_view> levels() {
  std::vector<std::string_view> found;
  for (std::string_view level : {"baseline", "avx2", "avx512"}) {
    if (find_tables(level).blocks != nullptr) found.push_back(level);
  }
  return found;
}

Format find_format(std::string_view name, std::string_view level) {
  const Tables tables = find_tables(level.empty() ? levels().back() : level);
  if (tables.blocks == nullptr) return {name, 0, 0, nullptr};
  const KernelTable* table = tables.blocks;
  const Format formats[] = {
      {"Q2_K", 256, 84, table->q2_k},  {"Q3_K", 256, 110, table->q3_k}, {"Q4_K", 256, 144, table->q4_k},
      {"Q5_K", 256, 176, table->q5_k}, {"Q6_K", 256, 210, table->q6_k}, {"Q4_0", 32, 18, tables.groups->q4_0},
      {"Q8_0", 32, 34, encode_q8_0},
  };
  for (const Format& format : formats) {
    if (format.name == name) return format;
  }
  return {name, 0, 0, nullptr};
}

GroupEncoder find_integers(int bits, int64_t group, std::string_view level) {
  const Tables tables = find_tables(level.empty() ? levels().back() : level);
  if (tables.groups == nullptr || (bits != 3 && bits != 4)) return nullptr;
  const GroupEncoder* found = bits == 3 ? tables.groups->int3 : tables.groups->int4;
  if (group == 32) return found[0];
  if (group == 64) return found[1];
  return group == 128 ? found[2] : nullptr;
}

Fault encode(const Format& format, const float* values, const float* importance, uint8_t* out, int64_t blocks,
             int64_t per_row, int threads) {
  return share_out(blocks, format.values, threads, [&](int64_t begin, int64_t end) {
    return format.encoder(values, importance, out, begin, end, per_row);
  });
}

Fault encode_groups(GroupEncoder encoder, int64_t group, const float* values, const float* importance, uint8_t* codes,
                    uint8_t* scales, int64_t groups, int64_t per_row, int threads) {
  return share_out(groups, group, threads, [&](int64_t begin, int64_t end) {
    return encoder(values, importance, codes, scales, begin, end, per_row);
  });
}

}  // namespace mixtral

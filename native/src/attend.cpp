// Attention of a batch: rotates and stores what is new, then shares out tokens, key heads and segments among threads.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "activations.h"
#include "mixtral/layers.h"
#include "mixtral/pool.h"

namespace mixtral {
namespace {

constexpr int64_t kTokens = 16;  // of an item, so that a page is used often while it is in the cache
// Sequences with at most so many new tokens have their segments computed apart, by several threads.
constexpr int64_t kFew = 4;

// Tokens [first, first + count) of a span, for one key head, over segments [from, to).
struct Item {
  const Span* span;
  int64_t row, first, count, head, from, to;
  float* parts;  // where the states of these segments go, one after the other; null: finish at once
};

int64_t segments_of(int64_t tokens) { return (tokens + kPage * kSegment - 1) / (kPage * kSegment); }

class Work {
 public:
  Work(const Kernels& kernels, const Heads& heads, const std::vector<Span>& spans, uint8_t* store, float* out)
      : kernels_(kernels), heads_(heads), store_(store), out_(out) {
    int64_t tokens = 0;
    for (const Span& span : spans) tokens += span.count;
    queries_.resize(static_cast<size_t>(tokens * heads.queries));
    query_bytes_ = 4 * heads.padded();
    memory_.reset(new uint8_t[static_cast<size_t>(tokens * heads.queries * query_bytes_)]);
  }

  // Floats of the state of `rows` rows.
  int64_t state(int64_t rows) const { return rows * (heads_.padded() + 2); }

  Rows rows(float* at, int64_t count, int64_t first) const {
    return {at + first, at + count + first, at + 2 * count + first * heads_.padded()};
  }

  uint8_t* block(const Span& span, int64_t page, int64_t head) const {
    return store_ + (span.pages[static_cast<size_t>(page)] * heads_.keys + head) * heads_.block_bytes();
  }

  // Rotates, rounds and stores one token's key head and the query heads that look at it.
  void prepare(const Span& span, int64_t row, int64_t token, int64_t head, const float* qkv, const float* cosines,
               const float* sines) {
    const int64_t size = heads_.size, half = size / 2, group = heads_.together();
    const float* line = qkv + row * (heads_.queries + 2 * heads_.keys) * size;
    const float *cosine = cosines + row * half, *sine = sines + row * half;
    float* turned = scratch(0, size);
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    for (int64_t h = head * group; h < (head + 1) * group; ++h) {
      kernels_.rows.rotate(line + h * size, cosine, sine, half, turned);
      const int64_t number = row * heads_.queries + h;
      queries_[static_cast<size_t>(number)] =
          kernels_.attention.query(heads_, turned, scale, memory_.get() + number * query_bytes_);
    }
    kernels_.rows.rotate(line + (heads_.queries + head) * size, cosine, sine, half, turned);
    const int64_t place = span.stored + token;
    kernels_.attention.append(heads_, turned, line + (heads_.queries + heads_.keys + head) * size,
                              block(span, place / kPage, head), static_cast<int>(place % kPage));
  }

  // One segment for the tokens of an item: the states of all rows from nothing.
  void segment(const Item& item, int64_t number, float* states) const {
    const int64_t group = heads_.together(), count = item.count * group;
    kernels_.attention.begin(heads_, static_cast<int>(count), rows(states, count, 0));
    const int64_t seen = item.span->stored + item.first + item.count;  // by the last token
    const int64_t last = std::min((number + 1) * kSegment, (seen + kPage - 1) / kPage);
    for (int64_t page = number * kSegment; page < last; ++page) {
      const uint8_t* keys = block(*item.span, page, item.head);
      for (int64_t token = 0; token < item.count; ++token) {
        const int64_t visible = std::min<int64_t>(kPage, item.span->stored + item.first + token + 1 - page * kPage);
        if (visible <= 0) continue;
        const int64_t first = (item.row + token) * heads_.queries + item.head * group;
        for (int64_t h = 0; h < group; h += kMostTogether) {
          const int some = static_cast<int>(std::min<int64_t>(kMostTogether, group - h));
          kernels_.attention.page(heads_, keys, static_cast<int>(visible), &queries_[static_cast<size_t>(first + h)], some,
                                  rows(states, count, token * group + h));
        }
      }
    }
  }

  void run(const Item& item) const {
    const int64_t count = item.count * heads_.together(), size = state(count);
    if (item.parts != nullptr) {
      for (int64_t s = item.from; s < item.to; ++s) segment(item, s, item.parts + (s - item.from) * size);
      return;
    }
    float* totals = scratch(1, 2 * size);
    kernels_.attention.begin(heads_, static_cast<int>(count), rows(totals, count, 0));
    for (int64_t s = item.from; s < item.to; ++s) {
      segment(item, s, totals + size);
      kernels_.attention.add(heads_, static_cast<int>(count), rows(totals + size, count, 0), rows(totals, count, 0));
    }
    write(item, totals);
  }

  // The segments of an item, which others have computed, one after the other.
  void join(const Item& item, int64_t segments) const {
    const int64_t count = item.count * heads_.together(), size = state(count);
    float* totals = scratch(1, size);
    kernels_.attention.begin(heads_, static_cast<int>(count), rows(totals, count, 0));
    for (int64_t s = 0; s < segments; ++s) {
      kernels_.attention.add(heads_, static_cast<int>(count), rows(item.parts + s * size, count, 0),
                             rows(totals, count, 0));
    }
    write(item, totals);
  }

 private:
  void write(const Item& item, float* totals) const {
    const int64_t group = heads_.together(), count = item.count * group;
    for (int64_t token = 0; token < item.count; ++token) {
      float* to = out_ + ((item.row + token) * heads_.queries + item.head * group) * heads_.size;
      kernels_.attention.finish(heads_, static_cast<int>(group), rows(totals, count, token * group), to);
    }
  }

  const Kernels& kernels_;
  const Heads& heads_;
  uint8_t* store_;
  float* out_;
  std::vector<Query> queries_;
  int64_t query_bytes_;
  std::unique_ptr<uint8_t[]> memory_;
};

}  // namespace

void attend(const Kernels& kernels, const Heads& heads, const float* qkv, const float* cosines, const float* sines,
            const std::vector<Span>& spans, uint8_t* store, float* out, int threads) {
  Work work(kernels, heads, spans, store, out);
  std::vector<Item> items, joined;
  int64_t row = 0, parts = 0;
  for (const Span& span : spans) {
    for (int64_t first = 0; first < span.count; first += kTokens) {
      const int64_t count = std::min(kTokens, span.count - first), all = segments_of(span.stored + first + count);
      for (int64_t head = 0; head < heads.keys; ++head) {
        items.push_back({&span, row + first, first, count, head, 0, all, nullptr});
      }
    }
    row += span.count;
  }
  // What is new goes into the pages before anybody looks at them.
  parallel(static_cast<int64_t>(items.size()), threads, [&](int64_t number) {
    const Item& item = items[static_cast<size_t>(number)];
    for (int64_t token = 0; token < item.count; ++token) {
      work.prepare(*item.span, item.row + token, item.first + token, item.head, qkv, cosines, sines);
    }
  });
  // Few tokens with much to look at: their segments become items of their own.
  std::vector<Item> apart;
  for (const Item& item : items) {
    if (item.span->count > kFew || item.to == 1) {
      apart.push_back(item);
      continue;
    }
    joined.push_back(item);
    parts += item.to * work.state(item.count * heads.together());
  }
  std::unique_ptr<float[]> memory(new float[static_cast<size_t>(parts)]);
  float* next = memory.get();
  for (Item& item : joined) {
    item.parts = next;
    const int64_t size = work.state(item.count * heads.together());
    for (int64_t s = 0; s < item.to; ++s) {
      apart.push_back({item.span, item.row, item.first, item.count, item.head, s, s + 1, next + s * size});
    }
    next += item.to * size;
  }
  parallel(static_cast<int64_t>(apart.size()), threads, [&](int64_t number) { work.run(apart[static_cast<size_t>(number)]); });
  parallel(static_cast<int64_t>(joined.size()), threads, [&](int64_t number) {
    work.join(joined[static_cast<size_t>(number)], joined[static_cast<size_t>(number)].to);
  });
}

}  // namespace mixtral

// The choice of pages from their scores (reference/choose_pages.py). Compiled once, for the baseline of the
// architecture: scores are few. A task is one query of one KV head; it reads the scores of its query heads twice.

#include "choose_pages.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <utility>

#include "tasks.h"

namespace logquant::cpu {
namespace {

// e^x for x <= 0, relative error 2e-7; at least 2^-126. In a loop the compiler makes vectors of it, and of log_of.
inline float exp_of(float x) {
  const float log2 = std::max(-126.0f, x * 1.44269504f), magic = 12582912.0f, rounded = log2 + magic;
  const float f = log2 - (rounded - magic);
  float p = 1.339887e-3f;
  p = p * f + 9.618437e-3f;
  p = p * f + 5.550332e-2f;
  p = p * f + 2.402265e-1f;
  p = p * f + 6.931472e-1f;
  p = p * f + 1.0f;
  return std::bit_cast<float>(std::bit_cast<int32_t>(p) + (std::bit_cast<int32_t>(rounded) << 23));
}

// The natural logarithm of x >= 1, error 2e-7.
inline float log_of(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x) - 0x3F3504F3;  // of sqrt(1/2)
  const float m = std::bit_cast<float>((bits & 0x7FFFFF) + 0x3F3504F3), s = (m - 1.0f) / (m + 1.0f), t = s * s;
  const float series = 2.0f * s * (1.0f + t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7 + t * (1.0f / 9)))));
  return static_cast<float>(bits >> 23) * 0.69314718f + series;
}

// A KV head's query heads, and where their scores of `pages` pages are.
struct HeadScores {
  const float* first;
  int64_t stride, group, pages;  // stride: to the scores of the next query head

  const float* of(int64_t g) const { return first + g * stride; }
};

// e^(x - its maximum) into out; returns the maximum and the sum.
std::pair<float, float> exponentials(const float* x, int64_t count, float* out) {
  float top = -INFINITY, sum = 0.0f;
  for (int64_t p = 0; p < count; ++p) top = std::max(top, x[p]);
  for (int64_t p = 0; p < count; ++p) {
    out[p] = exp_of(x[p] - top);
    sum += out[p];
  }
  return {top, sum};
}

// What share of its attention a KV head's query heads give each page, added up.
void vote(const HeadScores& scores, float* scratch, float* votes) {
  std::fill(votes, votes + scores.pages, 0.0f);
  for (int64_t g = 0; g < scores.group; ++g) {
    const float share = 1.0f / exponentials(scores.of(g), scores.pages, scratch).second;
    for (int64_t p = 0; p < scores.pages; ++p) votes[p] += scratch[p] * share;
  }
}

// The logarithm of that, for shares that are too small for numbers.
void vote_by_logarithm(const HeadScores& scores, float* scratch, float* votes) {
  std::fill(votes, votes + scores.pages, -INFINITY);
  for (int64_t g = 0; g < scores.group; ++g) {
    const auto [top, sum] = exponentials(scores.of(g), scores.pages, scratch);
    const float shift = top + log_of(sum);
    for (int64_t p = 0; p < scores.pages; ++p) {
      const float share = scores.of(g)[p] - shift, larger = std::max(votes[p], share);
      votes[p] = larger + log_of(1.0f + exp_of(std::min(votes[p], share) - larger));
    }
  }
}

// Marks the `count` best of the pages that are not marked yet: of equal ones the first.
void mark_best(const HeadScores& scores, int64_t count, float* votes, float* scratch, uint8_t* marked) {
  constexpr float kCertain = 1e-30f;  // a share that is far from too small
  const auto threshold = [&](const float* from) {
    int64_t left = 0;
    for (int64_t p = 0; p < scores.pages; ++p) {
      scratch[left] = from[p];
      left += !marked[p];
    }
    std::nth_element(scratch, scratch + count - 1, scratch + left, std::greater<>());
    return scratch[count - 1];
  };
  if (count == 0) return;
  const float* ranking = votes;
  float least;
  if (scores.group == 1) {
    ranking = scores.first;  // their order is that of the shares
    least = threshold(ranking);
  } else {
    vote(scores, scratch, votes);
    least = threshold(votes);
    if (!(least > kCertain)) {
      vote_by_logarithm(scores, scratch, votes);
      least = threshold(votes);
    }
  }
  for (int64_t p = 0; p < scores.pages; ++p) count -= !marked[p] && ranking[p] > least;
  for (int64_t p = 0; p < scores.pages; ++p) {
    const bool ties = ranking[p] == least && count > 0 && !marked[p];
    count -= ties;
    marked[p] |= ties || ranking[p] > least;
  }
}

void choose(const ChoosePagesArgs& args, int64_t task) {
  const int64_t query = task % args.queries, head = task / args.queries, batch = head / args.heads;
  const int64_t first = (head * args.group * args.queries + query) * args.page_count;
  const int64_t used = args.used == nullptr ? args.page_count : args.used[batch * args.used_stride];
  const int64_t pages = std::clamp<int64_t>(used, 0, args.page_count);
  const int64_t wanted = args.counts[batch * args.counts_batch_stride + query * args.counts_query_stride];
  const int64_t count = std::clamp<int64_t>(wanted, 0, std::min(pages, args.most));
  Arena arena(thread_scratch(3 * 64 + (2 * sizeof(float) + 1) * args.page_count));
  float* const votes = arena.take<float>(args.page_count);
  float* const scratch = arena.take<float>(args.page_count);
  uint8_t* const marked = arena.take<uint8_t>(args.page_count);
  std::fill(marked, marked + args.page_count, 0);
  const auto mark = [&](const float* scores, int64_t best) {
    mark_best({scores + first, args.queries * args.page_count, args.group, pages}, best, votes, scratch, marked);
  };
  mark(args.scores, args.others == nullptr ? count : (count + 1) / 2);
  if (args.others != nullptr) mark(args.others, count / 2);
  int32_t* out = args.pages + task * args.most;
  int32_t* const end = out + args.most;
  for (int64_t p = 0; p < pages && out < end; ++p) {
    if (marked[p]) *out++ = static_cast<int32_t>(p);
  }
  std::fill(out, end, static_cast<int32_t>(args.page_count - 1));
}

}  // namespace

void choose_pages(const ChoosePagesArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.batch * args.heads * args.queries, [&](int64_t i) { choose(args, i); });
}

}  // namespace logquant::cpu

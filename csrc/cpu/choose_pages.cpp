// The choice of pages from their scores (reference/choose_pages.py). Compiled once, for the baseline of the
// architecture: scores are few. A task is one query of one KV head; it reads the scores of its query heads twice.

#include "choose_pages.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <tuple>
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

// What share of its attention a KV head's query heads give each of `pages` pages on average, as a logarithm.
// scores: of the first query head, those of the next are `stride` further. sums: scratch of that many floats.
void vote(const float* scores, int64_t stride, int64_t group, int64_t pages, float* sums, float* votes) {
  std::fill(votes, votes + pages, -INFINITY);
  if (group == 1) {
    std::copy(scores, scores + pages, votes);  // their order is that of the shares
    return;
  }
  const auto log_sum = [pages](const float* x) {
    float top = -INFINITY, sum = 0.0f;
    for (int64_t p = 0; p < pages; ++p) top = std::max(top, x[p]);
    for (int64_t p = 0; p < pages; ++p) sum += exp_of(x[p] - top);
    return top + log_of(sum);
  };
  std::fill(sums, sums + pages, 0.0f);
  for (int64_t g = 0; g < group; ++g) {
    const float* const own = scores + g * stride;
    const float shift = log_sum(own);
    for (int64_t p = 0; p < pages; ++p) {
      const float share = own[p] - shift, top = std::max(votes[p], share);
      sums[p] = sums[p] * exp_of(votes[p] - top) + exp_of(share - top);
      votes[p] = top;
    }
  }
  for (int64_t p = 0; p < pages; ++p) votes[p] += log_of(std::max(sums[p], 1.0f));
}

using Ranked = std::pair<float, int32_t>;  // minus the vote, page

// Marks the best `count` of the first `pages` pages that are not marked yet.
void mark_best(const float* votes, int64_t pages, int64_t count, Ranked* ranked, uint8_t* marked) {
  int64_t left = 0;
  for (int64_t p = 0; p < pages; ++p) {
    if (!marked[p]) ranked[left++] = {-votes[p], static_cast<int32_t>(p)};
  }
  count = std::min(count, left);
  if (count < left) std::nth_element(ranked, ranked + count, ranked + left);
  for (int64_t i = 0; i < count; ++i) marked[ranked[i].second] = 1;
}

void choose(const ChoosePagesArgs& args, int64_t task) {
  const int64_t query = task % args.queries, head = task / args.queries, batch = head / args.heads;
  const int64_t first = (head * args.group * args.queries + query) * args.page_count;
  const int64_t stride = args.queries * args.page_count;
  const int64_t used = args.used == nullptr ? args.page_count : args.used[batch * args.used_stride];
  const int64_t pages = std::clamp<int64_t>(used, 0, args.page_count);
  const int64_t wanted = args.counts[batch * args.counts_batch_stride + query * args.counts_query_stride];
  const int64_t count = std::clamp<int64_t>(wanted, 0, std::min(pages, args.most));
  const auto cut = [&](Arena arena) {
    Ranked* const ranked = arena.take<Ranked>(args.page_count);
    float* const votes = arena.take<float>(args.page_count);
    float* const sums = arena.take<float>(args.page_count);
    uint8_t* const marked = arena.take<uint8_t>(args.page_count);
    return std::tuple(arena.used(), ranked, votes, sums, marked);
  };
  const auto [bytes, ranked, votes, sums, marked] = cut(Arena(thread_scratch(std::get<0>(cut(Arena(nullptr))))));
  std::fill(marked, marked + args.page_count, 0);
  const int64_t by_scores = args.others == nullptr ? count : (count + 1) / 2;
  vote(args.scores + first, stride, args.group, pages, sums, votes);
  mark_best(votes, pages, by_scores, ranked, marked);
  if (args.others != nullptr) {
    vote(args.others + first, stride, args.group, pages, sums, votes);
    mark_best(votes, pages, count - by_scores, ranked, marked);
  }
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

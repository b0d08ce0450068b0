// One step of the rule on one KV head's window: quantise the leaving slots straight into the page store, then move the
// other tokens up. A task is one head; it reads and writes the window once.

#include "quantizer.h"

namespace logquant::cpu::LOGQUANT_ISA {

namespace {

// Moves the tokens that stay to the front, in order. Rows do not overlap, and a row only ever moves down.
void close_gaps(char* window, int64_t row_bytes, int64_t stride_bytes, const EvictArgs& args) {
  int64_t to = args.start;
  for (int64_t from = args.start; from < args.tokens; ++from) {
    const int64_t offset = from - args.start;
    if (offset % args.step == 0 && offset / args.step < args.count) continue;
    __builtin_memcpy(window + to * stride_bytes, window + from * stride_bytes, row_bytes);
    ++to;
  }
}

}  // namespace

void evict_head(const EvictArgs& args, int64_t task) {
  const PageFormat& f = args.format;
  const int64_t head = task % args.heads, batch = task / args.heads;
  const auto base = [&](const MutableTokens& x) {
    const int64_t first = batch * x.batch_stride + head * x.head_stride;
    return static_cast<char*>(x.data) + first * element_bytes(x.dtype);
  };
  char* const k = base(args.k);
  char* const v = base(args.v);
  const int16_t* const map = args.key_map.of(batch, head);
  int32_t* page = args.pages.data + batch * args.pages.batch_stride + head * args.pages.head_stride;
  for (int64_t first = 0; first < args.count; first += f.page_tokens, page += args.pages.page_stride) {
    Arena arena(thread_scratch(quantizer_scratch(f)));
    int64_t* const rows = arena.take<int64_t>(f.page_tokens);
    for (int t = 0; t < f.page_tokens; ++t) rows[t] = args.start + args.step * (first + t);
    quantize_one_page(f, args.k.dtype, {k, v, args.k.token_stride, args.v.token_stride, rows}, map,
                      args.key_weights.of(batch, head, first),
                      args.value_feedback.of(batch, head, first * f.page_tokens), page, arena);
  }
  const int64_t bytes = element_bytes(args.k.dtype);
  close_gaps(k, f.head_dim * bytes, args.k.token_stride * bytes, args);
  close_gaps(v, f.value_dim * bytes, args.v.token_stride * bytes, args);
}

}  // namespace logquant::cpu::LOGQUANT_ISA

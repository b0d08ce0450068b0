// One step of the rule on one KV head's window: quantise the leaving slots straight into the page store, then move the
// other tokens up. A task is one head; it reads and writes the window once.

#include "simd.h"
#include "tasks.h"

namespace logquant::cpu::LOGQUANT_ISA {

namespace {

// The leaving slots, as the quantiser takes them.
QuantizeArgs leaving(const EvictArgs& args) {
  QuantizeArgs quantize;
  quantize.format = args.format;
  quantize.k = {args.k.data, args.k.dtype, args.k.batch_stride, args.k.head_stride, args.k.token_stride};
  quantize.v = {args.v.data, args.v.dtype, args.v.batch_stride, args.v.head_stride, args.v.token_stride};
  quantize.pages = args.pages;
  quantize.key_map = args.key_map;
  quantize.key_weights = args.key_weights;
  quantize.value_feedback = args.value_feedback;
  quantize.index_start = args.start;
  quantize.index_step = args.step;
  quantize.batch = args.batch;
  quantize.heads = args.heads;
  quantize.page_count = args.count / args.format.page_tokens;
  return quantize;
}

// Moves the tokens that stay to the front, in order. Rows do not overlap, and a row only ever moves down.
void close_gaps(const MutableTokens& x, int dim, int64_t task, const EvictArgs& args) {
  const int64_t bytes = element_bytes(x.dtype), row_bytes = dim * bytes, stride_bytes = x.token_stride * bytes;
  const int64_t first = task / args.heads * x.batch_stride + task % args.heads * x.head_stride;
  char* const window = static_cast<char*>(x.data) + first * bytes;
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
  const QuantizeArgs pages = leaving(args);
  for (int64_t p = 0; p < pages.page_count; ++p) quantize_page(pages, task * pages.page_count + p);
  close_gaps(args.k, args.format.head_dim, task, args);
  close_gaps(args.v, args.format.value_dim, task, args);
}

}  // namespace logquant::cpu::LOGQUANT_ISA

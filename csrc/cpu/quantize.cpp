// Tokens into pages. A task is one page of one KV head: it reads the page's tokens (gathered by the index, which is how
// the log window's selection is fused in) and writes the page, 5 KiB for 64 tokens of dim 128 at 2 bits.

#include "quantizer.h"

namespace logquant::cpu::LOGQUANT_ISA {

void quantize_page(const QuantizeArgs& args, int64_t task) {
  const PageFormat& f = args.format;
  const int64_t p = task % args.page_count, head = task / args.page_count % args.heads;
  const int64_t batch = task / args.page_count / args.heads;
  Arena arena(thread_scratch(quantizer_scratch(f)));
  int64_t* const rows = arena.take<int64_t>(f.page_tokens);
  const int32_t* const index =
      args.index == nullptr ? nullptr : args.index + batch * args.index_batch_stride + p * f.page_tokens;
  for (int t = 0; t < f.page_tokens; ++t) {
    rows[t] = index == nullptr ? args.index_start + args.index_step * (p * f.page_tokens + t) : index[t];
  }
  const auto base = [&](const Tokens& x) {
    const int64_t first = batch * x.batch_stride + head * x.head_stride;
    return static_cast<const char*>(x.data) + first * element_bytes(x.dtype);
  };
  const int16_t* const map = args.key_map.of(batch, head);
  const float* const weights = args.key_weights.of(batch, head, p * f.page_tokens);
  const float* const feedback = args.value_feedback.of(batch, head, p * f.page_tokens * f.page_tokens);
  int32_t* const page =
      args.pages.data + batch * args.pages.batch_stride + head * args.pages.head_stride + p * args.pages.page_stride;
  quantize_one_page(f, args.k.dtype, {base(args.k), base(args.v), args.k.token_stride, args.v.token_stride, rows}, map,
                    weights, feedback, page, arena);
}

}  // namespace logquant::cpu::LOGQUANT_ISA

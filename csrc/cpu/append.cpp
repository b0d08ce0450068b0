// A new token at the end of each row's window (logquant/ops/reference/decode_step.py). Compiled once, for the baseline
// of the architecture: it copies a few kilobytes a row, on one thread.

#include "append.h"

#include <cstring>

namespace logquant::cpu {
namespace {

// The token of every head of one row, from the only one of `from` to slot `slot` of `to`.
void copy_token(const Tokens& from, const MutableTokens& to, int64_t batch, int64_t heads, int64_t dim, int64_t slot) {
  const int64_t bytes = from.dtype == Dtype::kFloat32 ? 4 : 2;
  const auto* const source = static_cast<const char*>(from.data) + bytes * batch * from.batch_stride;
  auto* const target = static_cast<char*>(to.data) + bytes * (batch * to.batch_stride + slot * to.token_stride);
  for (int64_t h = 0; h < heads; ++h) {
    std::memcpy(target + bytes * h * to.head_stride, source + bytes * h * from.head_stride, bytes * dim);
  }
}

}  // namespace

void append(const AppendArgs& args) {
  for (int64_t b = 0; b < args.batch; ++b) {
    int32_t& used = args.lengths[2 * b + 1];
    copy_token(args.k, args.window_k, b, args.kv_heads, args.head_dim, used);
    copy_token(args.v, args.window_v, b, args.kv_heads, args.value_dim, used);
    if (args.query_slots > 0) {
      copy_token(args.q, args.queries, b, args.query_heads, args.head_dim, args.seen[b] % args.query_slots);
    }
    args.positions[b * args.positions_batch_stride + used] = static_cast<int32_t>(args.seen[b]);
    ++used;
    ++args.seen[b];
  }
}

}  // namespace logquant::cpu

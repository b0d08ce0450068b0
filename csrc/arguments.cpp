// See arguments.h.
#include "arguments.h"

#include <torch/csrc/stable/ops.h>

#include <bitset>
#include <cmath>
#include <limits>
#include <utility>

#include "checks.h"
#include "format.h"

namespace logquant {
namespace {

Dtype kernel_dtype(ScalarType type) {
  if (type == ScalarType::Float) return Dtype::kFloat32;
  return type == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBFloat16;
}

template <class View>
View tokens_view(const Tensor& t) {
  return {t.data_ptr(), kernel_dtype(t.scalar_type()), t.stride(0), t.stride(1), t.stride(2)};
}

template <class View>
View pages_view(const Tensor& t) {
  return {static_cast<int32_t*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// The stride along a dimension that may have size 1 and then stands for all.
int64_t broadcast_stride(const Tensor& t, int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }

Tensor with_contiguous_last_dim(const Tensor& t) {
  return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

OptionalTensor contiguous(const OptionalTensor& t) {
  if (!t) return std::nullopt;
  return torch::stable::contiguous(*t);
}

const int32_t* int32_data(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }

// Every entry names an existing channel and a digit that its code can have, and no other entry names the same.
KeyMap checked_key_map(const OptionalTensor& key_map, const PageFormat& format, int64_t batch, int64_t heads) {
  if (!key_map) {
    LOGQUANT_CHECK(format.key_columns == format.head_dim, "key_map is needed: the format has ", format.key_columns,
                   " key columns for ", format.head_dim, " channels");
    return {};
  }
  const Tensor& map = *key_map;
  check_broadcast(map, "key_map", ScalarType::Short, {batch, heads, format.key_columns});
  LOGQUANT_CHECK(map.size(2) == format.key_columns, "key_map must have ", format.key_columns, " columns, got ",
                 shape_of(map));
  LOGQUANT_CHECK(map.stride(2) == 1, "key_map must be contiguous in its last dimension");
  const auto* entries = static_cast<const int16_t*>(map.const_data_ptr());
  for (int64_t b = 0; map.is_cpu() && b < map.size(0); ++b) {
    for (int64_t h = 0; h < map.size(1); ++h) {
      const int16_t* row = entries + b * map.stride(0) + h * map.stride(1);
      std::bitset<4 * kMaxHeadDim> seen;
      for (int64_t c = 0; c < format.key_columns; ++c) {
        const int channel = column_channel(row[c]), digit = column_digit(row[c]);
        LOGQUANT_CHECK(channel >= 0 && channel < format.head_dim && (digit + 1) * format.key_bits <= kMaxCodeBits,
                       "key_map must hold 4 * channel + digit with a channel below ", format.head_dim,
                       " and a digit below ", kMaxCodeBits / format.key_bits, ", got ", row[c], " in column ", c);
        LOGQUANT_CHECK(!seen[row[c]], "key_map must name each digit of a channel once, got ", row[c],
                       " again in column ", c);
        seen[row[c]] = true;
      }
    }
  }
  return {entries, broadcast_stride(map, 0), broadcast_stride(map, 1)};
}

KeyWeights checked_key_weights(const OptionalTensor& key_weights, int64_t batch, int64_t heads, int64_t taken) {
  if (!key_weights) return {};
  const Tensor& weights = *key_weights;
  check_broadcast(weights, "key_weights", ScalarType::Float, {batch, heads, taken});
  LOGQUANT_CHECK(weights.size(2) <= 1 || weights.stride(2) == 1,
                 "key_weights must be contiguous in its last dimension");
  return {static_cast<const float*>(weights.const_data_ptr()), broadcast_stride(weights, 0),
          broadcast_stride(weights, 1)};
}

ValueFeedback checked_value_feedback(const OptionalTensor& value_feedback, const PageFormat& format, int64_t batch,
                                     int64_t heads, int64_t taken) {
  if (!value_feedback) return {};
  const Tensor& feedback = *value_feedback;
  LOGQUANT_CHECK(format.value_param_bits == 8, "value_feedback needs value_param_bits 8, got ",
                 format.value_param_bits);
  check_broadcast(feedback, "value_feedback", ScalarType::Float, {batch, heads, taken, format.page_tokens});
  LOGQUANT_CHECK(feedback.size(2) == taken, "value_feedback must have ", taken, " tokens, got ", feedback.size(2));
  LOGQUANT_CHECK(taken == 0 || (feedback.stride(3) == 1 && feedback.stride(2) == format.page_tokens),
                 "value_feedback must be contiguous in its last two dimensions");
  return {static_cast<const float*>(feedback.const_data_ptr()), broadcast_stride(feedback, 0),
          broadcast_stride(feedback, 1)};
}

void check_range(const Tensor& t, const char* name, int64_t low, int64_t high) {
  if (!t.is_cpu()) return;
  const int32_t* data = int32_data(t);
  for (int64_t b = 0; b < t.size(0); ++b) {
    for (int64_t i = 0; i < t.size(1); ++i) {
      const int32_t value = data[b * t.stride(0) + i * t.stride(1)];
      LOGQUANT_CHECK(value >= low && value < high, name, " must lie between ", low, " and ", high - 1, ", got ", value);
    }
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------------------ quantize
QuantizeCall quantize_call(const Tensor& k_in, const Tensor& v_in, const Fields& fields, const OptionalTensor& index,
                           const OptionalTensor& key_map, const OptionalTensor& key_weights,
                           const OptionalTensor& value_feedback) {
  const PageFormat format = checked_format(fields);
  check_same_device(
      k_in, "k", {{"v", &v_in}},
      {{"index", &index}, {"key_map", &key_map}, {"key_weights", &key_weights}, {"value_feedback", &value_feedback}});
  check_tokens(k_in, "k", format.head_dim);
  check_tokens(v_in, "v", format.value_dim);
  check_same_dtype(v_in, "v", k_in, "k");
  check_leading_dims(v_in, "v", k_in, "k", 3);
  const int64_t batch = k_in.size(0), heads = k_in.size(1), tokens = k_in.size(2);
  int64_t taken = tokens;
  if (index) {
    check_broadcast(*index, "index", ScalarType::Int, {batch, index->dim() == 2 ? index->size(1) : 0});
    check_range(*index, "index", 0, tokens);
    taken = index->size(1);
  }
  LOGQUANT_CHECK(taken % format.page_tokens == 0, index ? "index" : "k", " must have a multiple of ",
                 format.page_tokens, " tokens, got ", taken);
  const KeyMap map = checked_key_map(key_map, format, batch, heads);
  const KeyWeights weights = checked_key_weights(key_weights, batch, heads, taken);
  const ValueFeedback feedback = checked_value_feedback(value_feedback, format, batch, heads, taken);

  QuantizeCall call;
  call.k = with_contiguous_last_dim(k_in);
  call.v = with_contiguous_last_dim(v_in);
  call.index = contiguous(index);
  call.key_map = key_map;
  call.key_weights = key_weights;
  call.value_feedback = value_feedback;
  const int64_t page_count = taken / format.page_tokens;
  call.pages = torch::stable::new_empty(call.k, {batch, heads, page_count, format.words()}, ScalarType::Int);
  QuantizeArgs& args = call.args;
  args.format = format;
  args.k = tokens_view<Tokens>(call.k);
  args.v = tokens_view<Tokens>(call.v);
  args.pages = pages_view<MutablePages>(call.pages);
  args.key_map = map;
  args.key_weights = weights;
  args.value_feedback = feedback;
  if (call.index) {
    args.index = int32_data(*call.index);
    args.index_batch_stride = broadcast_stride(*call.index, 0);
  }
  args.batch = batch;
  args.heads = heads;
  args.page_count = page_count;
  args.tokens = tokens;
  return call;
}

// ---------------------------------------------------------------------------------------------------- dequantize
DequantizeCall dequantize_call(const Tensor& pages_in, const Fields& fields, ScalarType dtype,
                               const OptionalTensor& key_map) {
  const PageFormat format = checked_format(fields);
  check_same_device(pages_in, "pages", {}, {{"key_map", &key_map}});
  check_pages(pages_in, format, 4);
  LOGQUANT_CHECK(is_kernel_dtype(dtype), "dtype must be float32, float16 or bfloat16, got ",
                 torch::headeronly::toString(dtype));
  const int64_t batch = pages_in.size(0), heads = pages_in.size(1), page_count = pages_in.size(2);
  const KeyMap map = checked_key_map(key_map, format, batch, heads);
  DequantizeCall call;
  call.pages = with_contiguous_last_dim(pages_in);
  call.key_map = key_map;
  const int64_t tokens = page_count * format.page_tokens;
  call.k = torch::stable::new_empty(call.pages, {batch, heads, tokens, format.head_dim}, dtype);
  call.v = torch::stable::new_empty(call.pages, {batch, heads, tokens, format.value_dim}, dtype);
  DequantizeArgs& args = call.args;
  args.format = format;
  args.pages = pages_view<Pages>(call.pages);
  args.key_map = map;
  args.k = tokens_view<MutableTokens>(call.k);
  args.v = tokens_view<MutableTokens>(call.v);
  args.batch = batch;
  args.heads = heads;
  args.page_count = page_count;
  return call;
}

// --------------------------------------------------------------------------------------------------------- evict_
EvictCall evict_call(const Tensor& window_k, const Tensor& window_v, const Tensor& pages, const Fields& fields,
                     int64_t page, int64_t tokens, int64_t start, int64_t step, int64_t count,
                     const OptionalTensor& key_map, const OptionalTensor& key_weights,
                     const OptionalTensor& value_feedback) {
  const PageFormat format = checked_format(fields);
  check_same_device(window_k, "window_k", {{"window_v", &window_v}, {"pages", &pages}},
                    {{"key_map", &key_map}, {"key_weights", &key_weights}, {"value_feedback", &value_feedback}});
  check_tokens(window_k, "window_k", format.head_dim);
  check_tokens(window_v, "window_v", format.value_dim);
  check_same_dtype(window_v, "window_v", window_k, "window_k");
  check_leading_dims(window_v, "window_v", window_k, "window_k", 3);
  check_pages(pages, format, 4);
  check_leading_dims(pages, "pages", window_k, "window_k", 2);
  for (const auto& [tensor, name] : {std::pair{&window_k, "window_k"}, {&window_v, "window_v"}, {&pages, "pages"}}) {
    LOGQUANT_CHECK(tensor->numel() == 0 || tensor->stride(3) == 1, name,
                   " is changed in place and must be contiguous in its last dimension");
    for (int64_t dim = 0; dim < 3; ++dim) {
      LOGQUANT_CHECK(tensor->size(dim) <= 1 || tensor->stride(dim) != 0, name,
                     " is changed in place and must not be expanded, got stride 0 in dimension ", dim);
    }
  }
  const int64_t capacity = window_k.size(2), pages_written = count / format.page_tokens;
  LOGQUANT_CHECK(tokens >= 0 && tokens <= capacity, "tokens must lie between 0 and the window's capacity ", capacity,
                 ", got ", tokens);
  LOGQUANT_CHECK(count > 0 && count % format.page_tokens == 0, "count must be a positive multiple of ",
                 format.page_tokens, ", got ", count);
  LOGQUANT_CHECK(start >= 0 && step >= 1 && start < tokens && (count - 1) <= (tokens - 1 - start) / step,
                 "start, step and count must name slots below ", tokens, ", got ", start, ", ", step, " and ", count);
  LOGQUANT_CHECK(page >= 0 && page <= pages.size(2) - pages_written, "page must leave room for ", pages_written,
                 " pages of ", pages.size(2), ", got ", page);
  EvictCall call{{}, window_k, window_v, pages, key_map, key_weights, value_feedback};
  EvictArgs& args = call.args;
  args.format = format;
  args.key_map = checked_key_map(key_map, format, window_k.size(0), window_k.size(1));
  args.key_weights = checked_key_weights(key_weights, window_k.size(0), window_k.size(1), count);
  args.value_feedback = checked_value_feedback(value_feedback, format, window_k.size(0), window_k.size(1), count);
  args.k = tokens_view<MutableTokens>(window_k);
  args.v = tokens_view<MutableTokens>(window_v);
  args.pages = pages_view<MutablePages>(pages);
  args.pages.data += page * args.pages.page_stride;
  args.batch = window_k.size(0);
  args.heads = window_k.size(1);
  args.tokens = tokens;
  args.start = start;
  args.step = step;
  args.count = count;
  return call;
}

// ---------------------------------------------------------------------------------------------------- page_scores
PageScoresCall page_scores_call(const Tensor& q_in, const Tensor& pages_in, const Fields& fields, double scale,
                                const OptionalTensor& key_map, const OptionalTensor& means_in,
                                const OptionalTensor& mean_scales_in) {
  const PageFormat format = checked_format(fields);
  check_same_device(q_in, "q", {{"pages", &pages_in}},
                    {{"key_map", &key_map}, {"means", &means_in}, {"mean_scales", &mean_scales_in}});
  check_tokens(q_in, "q", format.head_dim);
  check_pages(pages_in, format, 4);
  const int64_t batch = q_in.size(0), query_heads = q_in.size(1), queries = q_in.size(2);
  const int64_t kv_heads = pages_in.size(1), page_count = pages_in.size(2);
  LOGQUANT_CHECK(pages_in.size(0) == batch, "pages must have q's batch size ", batch, ", got ", pages_in.size(0));
  LOGQUANT_CHECK(kv_heads > 0 && query_heads % kv_heads == 0, "q must have a multiple of the pages' ", kv_heads,
                 " heads, got ", query_heads);
  LOGQUANT_CHECK(std::isfinite(scale), "scale must be finite, got ", scale);
  LOGQUANT_CHECK(means_in.has_value() == mean_scales_in.has_value(), "means and mean_scales must be given together");
  PageScoresCall call;
  call.q = with_contiguous_last_dim(q_in);
  call.pages = with_contiguous_last_dim(pages_in);
  call.key_map = key_map;
  PageScoresArgs& args = call.args;
  args.format = format;
  args.batch = batch;
  args.kv_heads = kv_heads;
  args.group = query_heads / kv_heads;
  args.queries = queries;
  args.q = tokens_view<Tokens>(call.q);
  args.pages = pages_view<Pages>(call.pages);
  args.page_count = page_count;
  args.key_map = checked_key_map(key_map, format, batch, kv_heads);
  args.scale = static_cast<float>(scale);
  if (means_in) {
    check_shape(*means_in, "means", ScalarType::Char, {batch, kv_heads, page_count, format.head_dim});
    check_shape(*mean_scales_in, "mean_scales", ScalarType::Float, {batch, kv_heads, page_count});
    call.means = with_contiguous_last_dim(*means_in);
    call.mean_scales = with_contiguous_last_dim(*mean_scales_in);
    args.means = static_cast<const int8_t*>(call.means->const_data_ptr());
    args.means_batch_stride = call.means->stride(0);
    args.means_head_stride = call.means->stride(1);
    args.means_page_stride = call.means->stride(2);
    args.mean_scales = {static_cast<const float*>(call.mean_scales->const_data_ptr()), call.mean_scales->stride(0),
                        call.mean_scales->stride(1)};
  }
  call.scores = torch::stable::new_empty(call.q, {batch, query_heads, queries, page_count}, ScalarType::Float);
  args.scores = static_cast<float*>(call.scores.data_ptr());
  return call;
}

// ---------------------------------------------------------------------------------------------------- choose_pages
ChoosePagesCall choose_pages_call(const Tensor& scores, const Tensor& counts, int64_t heads, int64_t most,
                                  const OptionalTensor& others, const OptionalTensor& used) {
  check_same_device(scores, "scores", {{"counts", &counts}}, {{"others", &others}, {"used", &used}});
  LOGQUANT_CHECK(scores.dim() == 4, "scores must have shape [batch, query heads, queries, pages], got ",
                 shape_of(scores));
  check_dtype(scores, "scores", ScalarType::Float);
  const int64_t batch = scores.size(0), query_heads = scores.size(1), queries = scores.size(2);
  const int64_t page_count = scores.size(3);
  LOGQUANT_CHECK(heads > 0 && query_heads > 0 && query_heads % heads == 0, "scores must be of a multiple of ", heads,
                 " query heads, got ", query_heads);
  LOGQUANT_CHECK(most >= 0 && most <= page_count, "most must be at most ", page_count, " pages, got ", most);
  check_broadcast(counts, "counts", ScalarType::Int, {batch, counts.dim() == 2 && counts.size(1) == 1 ? 1 : queries});
  if (others) check_shape(*others, "others", ScalarType::Float, {batch, query_heads, queries, page_count});
  if (used) check_shape(*used, "used", ScalarType::Int, {batch});
  ChoosePagesCall call;
  call.scores = torch::stable::contiguous(scores);
  call.counts = counts;
  call.others = contiguous(others);
  call.used = used;
  call.pages = torch::stable::new_empty(call.scores, {batch, heads, queries, most}, ScalarType::Int);
  cpu::ChoosePagesArgs& args = call.args;
  args.scores = static_cast<const float*>(call.scores.const_data_ptr());
  if (call.others) args.others = static_cast<const float*>(call.others->const_data_ptr());
  args.batch = batch;
  args.heads = heads;
  args.group = query_heads / heads;
  args.queries = queries;
  args.page_count = page_count;
  args.counts = int32_data(counts);
  args.counts_batch_stride = broadcast_stride(counts, 0);
  args.counts_query_stride = broadcast_stride(counts, 1);
  if (used) {
    args.used = int32_data(*used);
    args.used_stride = used->stride(0);
  }
  args.most = most;
  args.pages = static_cast<int32_t*>(call.pages.data_ptr());
  return call;
}

// ------------------------------------------------------------------------------------------------- choose_leaving
ChooseLeavingCall choose_leaving_call(const Tensor& weight, int64_t first, int64_t last, int64_t count,
                                      const std::vector<int64_t>& ranks) {
  LOGQUANT_CHECK(weight.dim() == 2, "weight must have shape [rows, slots], got ", shape_of(weight));
  check_dtype(weight, "weight", ScalarType::Float);
  const int64_t rows = weight.size(0), slots = weight.size(1), page_tokens = static_cast<int64_t>(ranks.size());
  LOGQUANT_CHECK(slots <= std::numeric_limits<int32_t>::max(), "weight must be of at most ",
                 std::numeric_limits<int32_t>::max(), " slots, got ", slots);
  LOGQUANT_CHECK(first >= 0 && first <= last && last <= slots, "first and last must be in order and between 0 and ",
                 slots, ", got ", first, " and ", last);
  LOGQUANT_CHECK(page_tokens >= 1 && page_tokens <= kMostPageTokens, "ranks must be of 1 to ", kMostPageTokens,
                 " tokens of a page, got ", page_tokens);
  LOGQUANT_CHECK(count >= 0 && count <= last - first && count % page_tokens == 0, "count must be a multiple of ",
                 page_tokens, " of at most ", last - first, " slots, got ", count);
  ChooseLeavingCall call;
  ChooseLeavingArgs& args = call.args;
  std::bitset<kMostPageTokens> taken;
  for (int64_t place = 0; place < page_tokens; ++place) {
    const int64_t rank = ranks[place];
    LOGQUANT_CHECK(rank >= 0 && rank < page_tokens && !taken[rank], "ranks must hold each number below ", page_tokens,
                   " once, got ", rank, " in place ", place);
    taken[rank] = true;
    args.places[rank] = static_cast<uint8_t>(place);
  }
  call.weight = torch::stable::contiguous(weight);
  call.leaving = torch::stable::new_empty(call.weight, {rows, count}, ScalarType::Int);
  call.staying = torch::stable::new_empty(call.weight, {rows, slots - count}, ScalarType::Int);
  args.weight = static_cast<const float*>(call.weight.const_data_ptr());
  args.rows = rows;
  args.slots = slots;
  args.first = first;
  args.last = last;
  args.count = count;
  args.page_tokens = static_cast<int>(page_tokens);
  args.leaving = static_cast<int32_t*>(call.leaving.data_ptr());
  args.staying = static_cast<int32_t*>(call.staying.data_ptr());
  return call;
}

// --------------------------------------------------------------------------------------------------------- attend
AttendCall attend_call(const Tensor& q_in, const Tensor& pages_in, const Tensor& window_k_in, const Tensor& window_v_in,
                       const Fields& fields, double scale, double softcap, const OptionalTensor& key_map,
                       const OptionalTensor& positions_in, const OptionalTensor& mask,
                       const OptionalTensor& query_positions_in, const OptionalTensor& sinks_in,
                       const OptionalTensor& page_table_in, const OptionalTensor& lengths_in,
                       const OptionalTensor& attention_in) {
  const PageFormat format = checked_format(fields);
  check_same_device(q_in, "q", {{"pages", &pages_in}, {"window_k", &window_k_in}, {"window_v", &window_v_in}},
                    {{"key_map", &key_map},
                     {"positions", &positions_in},
                     {"mask", &mask},
                     {"query_positions", &query_positions_in},
                     {"sinks", &sinks_in},
                     {"page_table", &page_table_in},
                     {"lengths", &lengths_in},
                     {"attention", &attention_in}});
  check_tokens(q_in, "q", format.head_dim);
  check_tokens(window_k_in, "window_k", format.head_dim);
  check_tokens(window_v_in, "window_v", format.value_dim);
  check_same_dtype(window_k_in, "window_k", q_in, "q");
  check_same_dtype(window_v_in, "window_v", q_in, "q");
  check_leading_dims(window_v_in, "window_v", window_k_in, "window_k", 3);
  const int64_t batch = q_in.size(0), query_heads = q_in.size(1), queries = q_in.size(2);
  const int64_t kv_heads = window_k_in.size(1), window_tokens = window_k_in.size(2);
  LOGQUANT_CHECK(window_k_in.size(0) == batch, "window_k must have q's batch size ", batch, ", got ",
                 window_k_in.size(0));
  LOGQUANT_CHECK(kv_heads > 0 && query_heads % kv_heads == 0, "q must have a multiple of window_k's ", kv_heads,
                 " heads, got ", query_heads);
  LOGQUANT_CHECK(std::isfinite(scale), "scale must be finite, got ", scale);
  LOGQUANT_CHECK(std::isfinite(softcap) && softcap >= 0, "softcap must be 0 or a positive number, got ", softcap);

  check_pages(pages_in, format, page_table_in ? 3 : 4);
  int64_t page_count = 0;
  if (page_table_in) {
    page_count = page_table_in->dim() == 2 ? page_table_in->size(1) : 0;
    check_shape(*page_table_in, "page_table", ScalarType::Int, {batch, page_count});
    check_range(*page_table_in, "page_table", 0, pages_in.size(0));
    LOGQUANT_CHECK(pages_in.size(1) == kv_heads, "pages must have ", kv_heads, " heads, got ", shape_of(pages_in));
  } else {
    check_leading_dims(pages_in, "pages", window_k_in, "window_k", 2);
    page_count = pages_in.size(2);
  }
  const int64_t slots = page_count * format.page_tokens + window_tokens;

  AttendCall call;
  call.key_map = key_map;
  call.mask = mask;
  AttendArgs& args = call.args;
  args.format = format;
  args.batch = batch;
  args.kv_heads = kv_heads;
  args.group = query_heads / kv_heads;
  args.queries = queries;
  args.page_count = page_count;
  args.window_tokens = window_tokens;
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.key_map = checked_key_map(key_map, format, batch, kv_heads);

  if (positions_in) check_broadcast(*positions_in, "positions", ScalarType::Int, {batch, slots});
  call.positions = contiguous(positions_in);
  if (const OptionalTensor& positions = call.positions) {
    args.positions = int32_data(*positions);
    args.positions_batch_stride = broadcast_stride(*positions, 0);
  }
  if (query_positions_in) {
    check_broadcast(*query_positions_in, "query_positions", ScalarType::Int, {batch, queries});
  }
  call.query_positions = contiguous(query_positions_in);
  if (const OptionalTensor& query_positions = call.query_positions) {
    args.query_positions = int32_data(*query_positions);
    args.query_positions_batch_stride = broadcast_stride(*query_positions, 0);
  }
  call.page_table = contiguous(page_table_in);
  if (const OptionalTensor& page_table = call.page_table) {
    args.page_table = int32_data(*page_table);
    args.page_table_batch_stride = page_table->stride(0);
  }
  if (lengths_in) {
    check_broadcast(*lengths_in, "lengths", ScalarType::Int, {batch, 2});
    const int32_t* data = int32_data(*lengths_in);
    for (int64_t b = 0; lengths_in->is_cpu() && b < lengths_in->size(0); ++b) {
      const int32_t pages_used = data[b * lengths_in->stride(0)];
      const int32_t window_used = data[b * lengths_in->stride(0) + lengths_in->stride(1)];
      LOGQUANT_CHECK(pages_used >= 0 && pages_used <= page_count && window_used >= 0 && window_used <= window_tokens,
                     "lengths must be at most ", page_count, " pages and ", window_tokens, " window tokens, got ",
                     pages_used, " and ", window_used);
    }
  }
  call.lengths = contiguous(lengths_in);
  if (const OptionalTensor& lengths = call.lengths) {
    args.lengths = int32_data(*lengths);
    args.lengths_batch_stride = broadcast_stride(*lengths, 0);
  }
  if (sinks_in) check_shape(*sinks_in, "sinks", ScalarType::Float, {query_heads});
  call.sinks = contiguous(sinks_in);
  if (call.sinks) args.sinks = static_cast<const float*>(call.sinks->const_data_ptr());
  if (mask) {
    const ScalarType type = mask->scalar_type();
    LOGQUANT_CHECK(type == ScalarType::Bool || is_kernel_dtype(type), "mask must be bool, float32, float16 or bfloat16",
                   ", got ", torch::headeronly::toString(type));
    check_broadcast(*mask, "mask", type, {batch, query_heads, queries, mask->dim() == 4 ? mask->size(3) : 0});
    using Kind = AttendArgs::MaskKind;
    args.mask_kind = type == ScalarType::Bool    ? Kind::kBool
                     : type == ScalarType::Float ? Kind::kFloat32
                     : type == ScalarType::Half  ? Kind::kFloat16
                                                 : Kind::kBFloat16;
    args.mask = mask->const_data_ptr();
    args.mask_batch_stride = broadcast_stride(*mask, 0);
    args.mask_head_stride = broadcast_stride(*mask, 1);
    args.mask_query_stride = broadcast_stride(*mask, 2);
    args.mask_position_stride = mask->stride(3);
    args.mask_positions = mask->size(3);
  }

  call.q = with_contiguous_last_dim(q_in);
  call.pages = with_contiguous_last_dim(pages_in);
  call.window_k = with_contiguous_last_dim(window_k_in);
  call.window_v = with_contiguous_last_dim(window_v_in);
  if (attention_in) {
    const int64_t slots_before = attention_in->dim() == 3 ? attention_in->size(2) : 0;
    check_shape(*attention_in, "attention", ScalarType::Float, {batch, kv_heads, slots_before});
    LOGQUANT_CHECK(slots_before <= window_tokens, "attention must have at most window_k's ", window_tokens,
                   " slots, got ", slots_before);
    call.attention = with_contiguous_last_dim(*attention_in);
    args.attention = {static_cast<const float*>(call.attention->const_data_ptr()), call.attention->stride(0),
                      call.attention->stride(1)};
    args.attention_slots = slots_before;
  }
  if (!call.attention) {
    call.attention_out = torch::stable::new_empty(call.q, {0}, ScalarType::Float);
  } else if (query_heads * queries == 0) {  // nobody to give anything: no kernel runs
    call.attention_out = torch::stable::pad(*call.attention, {0, window_tokens - args.attention_slots});
  } else {
    call.attention_out = torch::stable::new_empty(call.q, {batch, kv_heads, window_tokens}, ScalarType::Float);
    if (window_tokens > 0) args.attention_out = static_cast<float*>(call.attention_out.data_ptr());
  }
  call.out = torch::stable::new_empty(call.q, {batch, query_heads, queries, format.value_dim});
  call.lse = torch::stable::new_empty(call.q, {batch, query_heads, queries}, ScalarType::Float);
  args.q = tokens_view<Tokens>(call.q);
  args.window_k = tokens_view<Tokens>(call.window_k);
  args.window_v = tokens_view<Tokens>(call.window_v);
  if (page_table_in) {
    args.page_blocks = pages_in.size(0);
    args.pages = {int32_data(call.pages), 0, call.pages.stride(1), call.pages.stride(0)};
  } else {
    args.pages = pages_view<Pages>(call.pages);
  }
  args.out = call.out.data_ptr();
  args.lse = static_cast<float*>(call.lse.data_ptr());
  return call;
}

// ------------------------------------------------------------------------------------------------- decode_step_
DecodeStepCall decode_step_call(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& pages,
                                const Tensor& window_k, const Tensor& window_v, const Tensor& positions,
                                const Tensor& lengths, const Tensor& attention, const Tensor& queries,
                                const Tensor& seen, const Fields& fields, double scale, double softcap,
                                const OptionalTensor& key_map, const OptionalTensor& mask,
                                const OptionalTensor& sinks) {
  const PageFormat format = checked_format(fields);
  check_same_device(q_in, "q",
                    {{"k", &k_in},
                     {"v", &v_in},
                     {"positions", &positions},
                     {"lengths", &lengths},
                     {"attention", &attention},
                     {"queries", &queries},
                     {"seen", &seen}},
                    {});
  check_tokens(q_in, "q", format.head_dim);
  check_tokens(window_k, "window_k", format.head_dim);
  check_tokens(queries, "queries", format.head_dim);
  const int64_t batch = q_in.size(0), query_heads = q_in.size(1);
  const int64_t kv_heads = window_k.size(1), slots = window_k.size(2), dim = format.head_dim;
  check_shape(q_in, "q", window_k.scalar_type(), {batch, query_heads, 1, dim});
  check_shape(k_in, "k", window_k.scalar_type(), {batch, kv_heads, 1, dim});
  check_shape(v_in, "v", window_k.scalar_type(), {batch, kv_heads, 1, format.value_dim});
  // Where none are kept, nobody may know of how many heads.
  const int64_t kept_heads = queries.size(2) == 0 ? queries.size(1) : query_heads;
  check_shape(queries, "queries", window_k.scalar_type(), {batch, kept_heads, queries.size(2), dim});
  check_pages(pages, format, 4);
  const int64_t in_pages = pages.size(2) * format.page_tokens;
  check_shape(positions, "positions", ScalarType::Int, {batch, in_pages + slots});
  check_shape(lengths, "lengths", ScalarType::Int, {batch, 2});
  check_shape(seen, "seen", ScalarType::Long, {batch});
  const int64_t counted = attention.dim() == 3 ? attention.size(2) : 0;
  check_shape(attention, "attention", ScalarType::Float, {batch, kv_heads, counted});
  LOGQUANT_CHECK(counted == 0 || counted == slots, "attention must have no slot, or window_k's ", slots, ", got ",
                 counted);
  // What is changed in place must be where it says.
  for (const Named& written : {Named{"window_k", &window_k}, Named{"window_v", &window_v}, Named{"queries", &queries},
                               Named{"positions", &positions}, Named{"lengths", &lengths}, Named{"seen", &seen},
                               Named{"attention", &attention}}) {
    LOGQUANT_CHECK(written.tensor->is_contiguous(), written.name, " must be contiguous");
  }

  DecodeStepCall call;
  const OptionalTensor given = counted == 0 ? OptionalTensor() : OptionalTensor(attention);
  const OptionalTensor by_position = mask ? OptionalTensor(positions) : OptionalTensor();
  call.attend = attend_call(q_in, pages, window_k, window_v, fields, scale, softcap, key_map, by_position, mask,
                            std::nullopt, sinks, std::nullopt, lengths, given);
  if (counted > 0) call.attend.args.attention_out = static_cast<float*>(attention.data_ptr());
  if (lengths.is_cpu()) {
    const int32_t* const data = int32_data(lengths);
    for (int64_t b = 0; b < batch; ++b) {
      LOGQUANT_CHECK(data[2 * b + 1] < slots, "window_k must have room for another token, has ", slots,
                     " slots, all of them in use in row ", b,
                     ": cache.make_room() between steps moves tokens to pages");
    }
  }
  call.q = call.attend.q;
  call.k = with_contiguous_last_dim(k_in);
  call.v = with_contiguous_last_dim(v_in);
  AppendArgs& args = call.append;
  args.q = tokens_view<Tokens>(call.q);
  args.k = tokens_view<Tokens>(call.k);
  args.v = tokens_view<Tokens>(call.v);
  args.window_k = tokens_view<MutableTokens>(window_k);
  args.window_v = tokens_view<MutableTokens>(window_v);
  args.queries = tokens_view<MutableTokens>(queries);
  args.batch = batch;
  args.kv_heads = kv_heads;
  args.query_heads = query_heads;
  args.head_dim = dim;
  args.value_dim = format.value_dim;
  args.window_slots = slots;
  args.query_slots = queries.size(2);
  args.positions = static_cast<int32_t*>(positions.data_ptr()) + in_pages;
  args.positions_batch_stride = positions.stride(0);
  args.lengths = static_cast<int32_t*>(lengths.data_ptr());
  args.seen = static_cast<int64_t*>(seen.data_ptr());
  return call;
}

}  // namespace logquant

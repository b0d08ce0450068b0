// What the choice of pages from their scores goes by (reference/choose_pages.py): plain pointers and sizes, no torch.
#pragma once

#include <cstdint>

namespace logquant::cpu {

struct ChoosePagesArgs {
  // [batch, query head, query, page], contiguous; `others` say the second half, unless nullptr.
  const float *scores = nullptr, *others = nullptr;
  int64_t batch = 0, heads = 0, group = 1, queries = 0, page_count = 0;  // heads: KV heads, of `group` query heads each
  const int32_t* counts = nullptr;  // how many pages each query reads; its strides are 0 where one number is for all
  int64_t counts_batch_stride = 0, counts_query_stride = 0;
  const int32_t* used = nullptr;  // [batch]: pages that a row has; nullptr: all
  int64_t used_stride = 0;
  int64_t most = 0;
  int32_t* pages = nullptr;  // [batch, KV head, query, most], contiguous
};

}  // namespace logquant::cpu

// The choice of the tokens that leave the window (logquant/ops/reference/choose_leaving.py): its arguments on every
// device. Plain pointers and sizes, no torch.
#pragma once

#include <cstdint>
#include <cstring>

#include "format.h"

namespace logquant {

inline constexpr int kMostPageTokens = 128;

struct ChooseLeavingArgs {
  const float* weight = nullptr;  // [row, slot], contiguous
  int64_t rows = 0, slots = 0;
  int64_t first = 0, last = 0;  // only slots from first to below last may leave
  int64_t count = 0;            // of them that do: whole pages, at most last - first
  int page_tokens = 0;
  uint8_t places[kMostPageTokens] = {};  // by rank, of the page's greatest weight first: where in it the token goes
  int32_t* leaving = nullptr;            // [row, count], contiguous
  int32_t* staying = nullptr;            // [row, slots - count], contiguous
};

// In the order in which torch sorts floats: -0 is 0, and a NaN is above all.
LOGQUANT_HOST_DEVICE inline uint32_t sort_key(float weight) {
  if (weight != weight) return 0xFFFFFFFFu;
  if (weight == 0.0f) return 0x80000000u;
  uint32_t bits;
  memcpy(&bits, &weight, sizeof bits);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

}  // namespace logquant

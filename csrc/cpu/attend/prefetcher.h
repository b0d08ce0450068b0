// Fetches the next page into the first-level cache while a page is worked on, a few lines at a time: a burst would
// stall, and what comes earlier is gone by the time it is needed.
#pragma once

#include "../simd.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

constexpr int kCacheLine = 64;

struct Prefetcher {
  const char* at = nullptr;
  const char* end = nullptr;

  Prefetcher() = default;
  LOGQUANT_INLINE Prefetcher(const int32_t* page, int words)
      : at(reinterpret_cast<const char*>(page)), end(reinterpret_cast<const char*>(page + words)) {}

  LOGQUANT_INLINE void fetch(int lines) {
    for (int i = 0; i < lines && at < end; ++i, at += kCacheLine) prefetch(at);
  }
};

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA

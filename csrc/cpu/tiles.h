// Matrix tiles: the AMX-INT8 instructions that attend/tiled_dot.h uses. With LOGQUANT_EMULATED_TILES they are plain C++
// with the same meaning, which ends the program where a processor would raise an exception: for tests on machines
// without AMX, and for sanitizers, which do not see what AMX instructions read and write (CMakeLists.txt).
//
// A thread has 8 tiles of up to 16 rows of 64 bytes. It configures them before their first use, which zeroes them, and
// releases them after the last, so that the system need not save them any longer.
#pragma once

#include "simd.h"

#if (defined(__AMX_TILE__) && defined(__AMX_INT8__)) || defined(LOGQUANT_EMULATED_TILES)
#define LOGQUANT_TILES
#endif

#if defined(LOGQUANT_TILES)
#if defined(LOGQUANT_EMULATED_TILES)
#include <cstdio>
#include <cstdlib>
#endif

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

constexpr int kTiles = 8, kTileRows = 16, kTileRowBytes = 64;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};  // of each tile
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

#if !defined(LOGQUANT_EMULATED_TILES)
// Not gcc's intrinsics: they take no constant of a template for a tile, and leave it unsaid what memory they read, so
// that the stores to it may come too late.
LOGQUANT_INLINE void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
LOGQUANT_INLINE void tile_release() { asm volatile("tilerelease"); }

template <int tile>
LOGQUANT_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// The tile's rows lie `stride` bytes apart.
template <int tile>
LOGQUANT_INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
LOGQUANT_INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}

// sums[m][n] += a[m][4k + j] * b[k][4n + j], summed over k and over j = 0 .. 3: int32, int8 and uint8.
template <int sums, int a, int b>
LOGQUANT_INLINE void tile_dot() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
}
#else
struct EmulatedTiles {
  TileConfig config;
  bool configured = false;
  uint8_t data[kTiles][kTileRows][kTileRowBytes];
};
thread_local EmulatedTiles emulated_tiles;

inline void tile_check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "matrix tiles: %s\n", what);
  std::abort();
}

inline void tile_configure(const TileConfig& config) {
  tile_check(!emulated_tiles.configured, "configured twice, and not released in between");
  tile_check(config.palette == 1 && config.start_row == 0, "a configuration of another kind");
  for (const uint8_t byte : config.reserved) tile_check(byte == 0, "reserved bytes that are not 0");
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], bytes = config.row_bytes[i];
    tile_check(rows <= (i < kTiles ? kTileRows : 0) && bytes <= kTileRowBytes, "configured larger than tiles are");
    tile_check((rows == 0) == (bytes == 0), "rows without bytes, or bytes without rows");
  }
  emulated_tiles = {config, true, {}};
}

inline void tile_release() { emulated_tiles.configured = false; }

template <int tile>
auto& configured_tile() {
  static_assert(0 <= tile && tile < kTiles);
  tile_check(emulated_tiles.configured, "used before they are configured, or after their release");
  tile_check(emulated_tiles.config.rows[tile] != 0, "one is used that is not configured");
  return emulated_tiles.data[tile];
}

template <int tile>
void tile_zero() {
  __builtin_memset(configured_tile<tile>(), 0, kTileRows * kTileRowBytes);
}

template <int tile>
void tile_load(const void* p, int64_t stride) {
  tile_zero<tile>();
  for (int i = 0; i < emulated_tiles.config.rows[tile]; ++i) {
    __builtin_memcpy(emulated_tiles.data[tile][i], static_cast<const char*>(p) + i * stride,
                     emulated_tiles.config.row_bytes[tile]);
  }
}

template <int tile>
void tile_store(void* p, int64_t stride) {
  const auto& rows = configured_tile<tile>();
  for (int i = 0; i < emulated_tiles.config.rows[tile]; ++i) {
    __builtin_memcpy(static_cast<char*>(p) + i * stride, rows[i], emulated_tiles.config.row_bytes[tile]);
  }
}

template <int sums, int a, int b>
void tile_dot() {
  static_assert(sums != a && sums != b && a != b);
  auto &sum_rows = configured_tile<sums>(), &a_rows = configured_tile<a>(), &b_rows = configured_tile<b>();
  const uint8_t* const rows = emulated_tiles.config.rows;
  const uint16_t* const bytes = emulated_tiles.config.row_bytes;
  tile_check(bytes[a] % 4 == 0 && bytes[b] % 4 == 0, "rows that do not hold whole groups of four bytes");
  tile_check(rows[sums] == rows[a] && bytes[sums] == bytes[b] && bytes[a] == 4 * rows[b], "shapes that do not fit");
  for (int m = 0; m < rows[sums]; ++m) {
    uint32_t row[kTileRowBytes / 4];  // wraps around
    __builtin_memcpy(row, sum_rows[m], sizeof(row));
    for (int k = 0; k < rows[b]; ++k) {
      for (int i = 0; i < bytes[b]; ++i) {
        row[i / 4] += static_cast<uint32_t>(static_cast<int8_t>(a_rows[m][4 * k + i % 4]) * b_rows[k][i]);
      }
    }
    __builtin_memcpy(sum_rows[m], row, sizeof(row));
  }
}
#endif

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
#endif

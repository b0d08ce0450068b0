// Integer dot products on matrix tiles (AMX-INT8), for blocks of two query rows and more: of codes of every width, with
// exactly the sums that dot_codes.h has.
//
// One multiplication of tiles adds A [2 NR][64] bytes times B [16][16][4] bytes to sums [2 NR][16]:
//   B  16 lanes (tokens, or channels of values) side by side, as dot_codes has them: with b-bit codes, each word makes
//      8/b rows (word >> b*i) & byte_mask(b), so that 16 rows are 4 words of 2-bit codes. Vector by vector, words
//      become rows: nothing is shuffled. (Keys come transposed, by load_key_words. To have tokens as rows of A would
//      take no transposition of the words, but one of the sums, from [token][row]: with 8 rows more shuffles, with 4
//      rows two thirds as many, and it would be code of its own.)
//   A  per query row the high and the low bytes of its int16 codes: code = 256 * high + low, both signed, which is why
//      codes go up to 0x7F7F (kMaxInt16Code). Zeros where the words end within 16 rows; there, what B holds counts
//      nothing.
//
// Operations per page of 64 tokens and 128 channels of 2 bits, keys and values together, with 4 | 8 query rows, without
// loads of vectors:
//                                      int16, by dot_codes   here
//   multiplications                    2048 | 4096           16 of tiles, with 20 loads and 12 stores of tiles
//   broadcasts of codes                512 | 2048            none
//   shifts and masks of words          960                   448, and 256 stores
//   of the rows' bytes, and of sums    96 | 192              368 | 736
#pragma once

#include "../tasks.h"
#include "../tiles.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

// Whether blocks of NR rows go through tiles; the format does not matter.
#if defined(LOGQUANT_TILES)
template <int NR>
constexpr bool kTiled = NR > 1;
#else
template <int NR>
constexpr bool kTiled = false;
#endif

#if defined(LOGQUANT_TILES)
// Dot products of NR rows of int16 codes with the codes of lanes, down `words` words of each lane, as dot_codes has
// them. With several groups, the rows of codes differ from group to group of lanes.
template <int NR>
class TiledDot {
 public:
  TiledDot(int bits, int words, int lanes, int groups, Arena& arena)
      : bits_(bits), words_(words), lanes_(lanes), groups_(groups), steps_((words * (8 / bits) + 15) / 16) {
    b_ = arena.take<int32_t>(lanes * steps_ * kTileRows);
    a_ = arena.take<int32_t>(groups * steps_ * kRows * kLanes);
    sums_ = arena.take<int32_t>(kRows * lanes);
  }

  // Calls each() once a vector of words.
  template <class Each>
  LOGQUANT_INLINE void unpack(const int32_t* words, Each&& each) const {
    unpack_with(words, [](auto, int64_t, int64_t, I32 codes) { return codes; }, each);
  }

  // The same of a page's values.
  template <class Each>
  LOGQUANT_INLINE void unpack_values(const PageFormat& f, const int32_t* page, Each&& each) const {
    const int32_t* const words = page + f.value_codes();
    if (f.fine_values == 0) return unpack(words, each);
    unpack_with(
        words,
        [&](auto bits, int64_t w, int64_t lane, I32 codes) __attribute__((always_inline)) {
          // The high digits come next to the low ones, in the upper byte of both halves.
          const I32 fine = load(fine_digits_at(f, page, static_cast<int>(lane)));
          return codes | (shift_right(fine, 2 * static_cast<int>(w)) & fine_digits_mask(f)) << bits();
        },
        each);
  }

  // last_row(bits, word, lane, codes): what becomes of the last row of bytes that a vector of words makes.
  template <class LastRow, class Each>
  LOGQUANT_INLINE void unpack_with(const int32_t* words, LastRow&& last_row, Each&& each) const {
    with_bits(bits_, [&](auto bits) __attribute__((always_inline)) {
      constexpr int kPlaces = 8 / bits, kMask = static_cast<int>(byte_mask(bits));
      const int64_t count = words_, lanes = lanes_, tiles_size = steps_ * kTileRows * kLanes;
      int32_t* first = b_;
      for (int64_t w = 0; w < count; ++w, words += lanes, first += kPlaces * kLanes) {
        int32_t* rows = first;
        for (int64_t lane = 0; lane < lanes; lane += kLanes, rows += tiles_size) {
          each();
          const I32 x = load(words + lane);
          unroll<kPlaces>([&](auto i) __attribute__((always_inline)) {
            const I32 codes = (i == 0 ? x : shift_right(x, bits * i)) & kMask;
            store(rows + i * kLanes, i == kPlaces - 1 ? last_row(bits, w, lane, codes) : codes);
          });
        }
      }
    });
  }

  // codes: [groups][NR][32 / bits * words]. Up to 128 bytes past the last are read.
  LOGQUANT_INLINE void split(const int16_t* codes) const {
    I32 lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    with_bits(bits_, [&](auto bits) __attribute__((always_inline)) {
      constexpr int kPlaces = 8 / bits;
      const int rows = words_ * kPlaces, total = groups_ * NR, group_size = steps_ * kRows * kLanes;  // rows of B
      int32_t* const a = a_;
      for (int row = 0; row < total; ++row) {
        const int32_t* const pairs = reinterpret_cast<const int32_t*>(codes) + row * 2 * rows;
        int32_t* out = a + row / NR * group_size + row % NR * kLanes;
        for (int done = 0; done < rows; done += kLanes, out += kRows * kLanes) {
          const I32 low = load(pairs + 2 * done), high = load(pairs + 2 * done + kLanes);
          const I32 here = lane < splat(rows - done);
          // Of each word, the pairs in the lower and those in the upper bytes of its halves.
          const I32 even = every_second_run<kPlaces, 0>(low, high) & here;
          const I32 odd = every_second_run<kPlaces, 1>(low, high) & here;
          constexpr int kLow = 0x00FF00FF, kHigh = ~kLow;
          store(out, (shift_right(rounded(even), 8) & kLow) | (rounded(odd) & kHigh));
          store(out + NR * kLanes, (even & kLow) | ((odd << 8) & kHigh));
        }
      }
    });
  }

  LOGQUANT_INLINE void multiply() const {
    for (int group = 0; group < groups_; ++group) {
      int lane = group * (lanes_ / groups_);
      const int end = lane + lanes_ / groups_;
      for (; lane + 4 * kLanes <= end; lane += 4 * kLanes) multiply_tiles<4>(group, lane);
      for (; lane < end; lane += kLanes) multiply_tiles<1>(group, lane);
    }
  }

  // Calls f(lane, the sums of kLanes lanes) for row r and the lanes first .. last - 1.
  template <class F>
  LOGQUANT_INLINE void sums(int r, int64_t first, int64_t last, F&& f) const {
    const int32_t *const high = sums_ + r * lanes_, *const low = high + NR * lanes_;
    for (int64_t lane = first; lane < last; lane += kLanes) {
      f(lane, to_float((load(high + lane) << 8) + load(low + lane)));
    }
  }

  static constexpr TileConfig config() {
    TileConfig config;
    for (int i = 0; i < kB + 2; ++i) {
      config.rows[i] = i < kB ? kRows : kTileRows;
      config.row_bytes[i] = kTileRowBytes;
    }
    return config;
  }

 private:
  static constexpr int kRows = 2 * NR;  // high bytes, then low bytes
  static constexpr int kA = 4, kB = 5;  // tiles: up to 4 of sums, one of A, two of B
  static_assert(kRows <= kTileRows && kLanes * 4 == kTileRowBytes);

  template <int kRun, int kOdd>
  static LOGQUANT_INLINE I32 every_second_run(I32 low, I32 high) {
    return [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
      return __builtin_shufflevector(low, high, (i / kRun * 2 * kRun + kOdd * kRun + i % kRun)...);
    }(std::make_integer_sequence<int, kLanes>{});
  }

  // The high bytes that leave signed low bytes.
  static LOGQUANT_INLINE I32 rounded(I32 pairs) {
    typedef int16_t I16 __attribute__((vector_size(4 * kLanes)));
    return bits_as<I32>(bits_as<I16>(pairs) + 128);
  }

  template <int kCount>
  LOGQUANT_INLINE void multiply_tiles(int group, int first) const {
    const int64_t steps = steps_, stride = lanes_;
    const int32_t* a = a_ + group * steps * kRows * kLanes;
    const int32_t* b = b_ + first * steps * kTileRows;
    int32_t* const sums = sums_ + first;
    unroll<kCount>([&](auto i) __attribute__((always_inline)) { tile_zero<i>(); });
    for (int64_t step = 0; step < steps; ++step, a += kRows * kLanes, b += kTileRows * kLanes) {
      tile_load<kA>(a, kTileRowBytes);
      unroll<kCount>([&](auto i) __attribute__((always_inline)) {
        tile_load<kB + i % 2>(b + i * steps * kTileRows * kLanes, kTileRowBytes);
        tile_dot<i, kA, kB + i % 2>();
      });
    }
    unroll<kCount>([&](auto i) __attribute__((always_inline)) {
      tile_store<i>(sums + i * kLanes, stride * static_cast<int64_t>(sizeof(int32_t)));
    });
  }

  int bits_, words_, lanes_, groups_;
  int steps_;      // multiplications per vector of lanes
  int32_t* b_;     // [lanes / 16][steps][16][16 lanes]
  int32_t* a_;     // [groups][steps][2 NR][16]
  int32_t* sums_;  // [2 NR][lanes]
};
#endif

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA

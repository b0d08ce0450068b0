// The 8-bit parameters of fitted formats: a page's scales and zeros become fp16 in shared memory.
//
// Layout: of a team, fp16: scales of key channels and of values, zeros of keys, zeros with the mean of the codes (where
// q' is compensated), scales by key column. Zeros are whole numbers of scales / 8. Scale bytes go through ex2.
// Parallelisation: the threads of a team take four bytes each; then a column each, for the scales by column.
// Memory traffic: shared memory only.
#pragma once

#include "fragments.cuh"
#include "thread.cuh"

namespace logquant::cuda::tensor {

// 8-bit scales are unpacked into fp16, times this: of eight consecutive ones, which is all that their fractions can be,
// the rounding errors are then 2.5 times smaller than those of any eight; and fewer are subnormal.
inline constexpr float kScaleShift = 3.0f + 127.0f / 1024.0f, kScaleUnit = 8.7181585f;  // 2^kScaleShift

// Four scale bytes as fp16, times kScaleUnit; kPoisonScale as a number, too.
LOGQUANT_DEVICE uint2 unpack_scales(uint32_t bytes) {
  float scale[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // As the second byte of the bits of 2^12, a byte e adds e / 8.
    const float x = __uint_as_float(ptx::select_bytes(bytes, 0x45800000u, 0x7604u | i << 4));
    scale[i] = ptx::exp2(x + (-4096.0f + (kScaleExponent - 127) + kScaleShift));
  }
  return {ptx::pack_f16(scale[0], scale[1]), ptx::pack_f16(scale[2], scale[3])};
}
// Whether a byte is kPoisonScale: then some bit 0x80808080 is set.
LOGQUANT_DEVICE uint32_t poisoned(uint32_t bytes) { return bytes & (~bytes - 0x01010101u); }

LOGQUANT_DEVICE float power_of_two(int x) { return __uint_as_float(static_cast<uint32_t>(127 + x) << 23); }

template <class K>
class FittedParameters {
  using S = typename K::PageShape;
  using L = Layout<K>;

 public:
  using Thread = ThreadInfo<K>;

  LOGQUANT_DEVICE void start(const Thread& thread) {
    offset = ptx::keep(L::kUnpacked + thread.team * L::kUnpackedBytes);
  }

  // Columns of a channel: its digits are marked, a byte each, where parameters will be unpacked.
  static LOGQUANT_DEVICE void mark_digits(const Thread& thread) {
    unsigned char* const marks = thread.shared + L::kUnpacked;
    for (int c = threadIdx.x; c < S::kDim; c += K::kThreads) reinterpret_cast<uint32_t*>(marks)[c] = 0;
    __syncthreads();
    const int16_t* const key_map = thread.block.key_map(thread.args);
    for (int j = threadIdx.x; j < S::kColumns; j += K::kThreads) {
      const int entry = key_map[j];
      marks[4 * channel_of(entry, S::kDim) + column_digit(entry)] = 1;
    }
    __syncthreads();
  }
  static LOGQUANT_DEVICE int columns_of(const Thread& thread, int channel) {
    return static_cast<int>(read<uint32_t>(thread.shared + L::kUnpacked + 4 * channel) * 0x01010101u >> 24);
  }

  // What digit `digit` of a channel with `columns` columns weighs, in units of the scale.
  static LOGQUANT_DEVICE float digit_weight(int digit, int columns) {
    return power_of_two(S::kKeyBits * (digit - columns) + 2);
  }

  // What stays the same from page to page, while digits are marked.
  LOGQUANT_DEVICE void prepare(const Thread& thread) {
    const int16_t* const key_map = thread.block.key_map(thread.args);
#pragma unroll
    for (int i = 0; i < kGathers; ++i) {
      const int column = min(i * K::kTeamThreads + thread.team_thread(), S::kColumns - 1);
      scale_of_column[i] = 2 * channel_of(key_map[column], S::kDim);
    }
    if constexpr (K::kCompensated) {
#pragma unroll
      for (int i = 0; i < 2 * kZeroRounds; ++i) {
        const int c = min(i / 2 * kAtOnce + 4 * thread.team_thread() + i % 2 * 2, S::kDim - 2);
        mean_offset[i] = ptx::pack_f16(kByteZero - code_mean(columns_of(thread, c)),
                                       kByteZero - code_mean(columns_of(thread, c + 1)));
      }
    }
  }

  LOGQUANT_DEVICE unsigned char* unpacked(const Thread& thread) const { return thread.shared + offset; }
  LOGQUANT_DEVICE unsigned char* value_scales(const Thread& thread) const { return unpacked(thread) + 2 * S::kDim; }

  // Those of a page. Returns whether a scale is poisoned: it is a NaN then.
  LOGQUANT_DEVICE bool unpack(const Thread& thread, const unsigned char* stage) const {
    const unsigned char* const bytes = stage + L::kKeyParams;
    unsigned char* const to = unpacked(thread);
    // All that is read first, then all that is written: the compiler must keep the order of the two.
    uint32_t scales[kScaleRounds], zeros[kZeroRounds], poison = 0;
    const auto each = [&](int count, const auto& f) __attribute__((always_inline)) {
#pragma unroll
      for (int i = 0; i < (count + kAtOnce - 1) / kAtOnce; ++i) {
        if (kAtOnce * i + kAtOnce <= count || kAtOnce * i + 4 * thread.team_thread() < count) {
          f(i, K::kTeamThreads * i + thread.team_thread());
        }
      }
    };
    each(L::kScales, [&](int i, int word) { scales[i] = read<uint32_t>(bytes + 4 * word); });
    each(S::kDim, [&](int i, int word) { zeros[i] = read<uint32_t>(bytes + L::kKeyZeros + 4 * word); });
    each(L::kScales, [&](int i, int word) {
      *reinterpret_cast<uint2*>(to + 8 * word) = unpack_scales(scales[i]);
      poison |= poisoned(scales[i]);
    });
    const bool any = thread.any_in_team((poison & 0x80808080u) != 0);
    if (any) {
#pragma unroll 1
      for (int c = 4 * thread.team_thread(); c < L::kScales; c += c % 4 == 3 ? kAtOnce - 3 : 1) {
        if (bytes[c] == kPoisonScale) reinterpret_cast<uint16_t*>(to)[c] = kPoison;
      }
    }
    each(S::kDim, [&](int i, int word) {
      const uint32_t four = zeros[i] ^ 0x80808080u, zero = ptx::pack_f16(kByteZero, kByteZero);
      const uint32_t low = ptx::select_bytes(four, 0x64646464u, 0x4140);
      const uint32_t high = ptx::select_bytes(four, 0x64646464u, 0x4342);
      *reinterpret_cast<uint2*>(to + L::kUnpackedZeros + 8 * word) = {ptx::sub_f16x2(low, zero),
                                                                      ptx::sub_f16x2(high, zero)};
      if constexpr (K::kCompensated) {
        *reinterpret_cast<uint2*>(to + L::kUnpackedMeans + 8 * word) = {ptx::sub_f16x2(low, mean_offset[2 * i]),
                                                                        ptx::sub_f16x2(high, mean_offset[2 * i + 1])};
      }
    });
    thread.sync_team();
    spread_by_column(thread, to);
    thread.sync_team();
    return any;
  }

 private:
  static constexpr int kAtOnce = 4 * K::kTeamThreads;  // bytes that a team unpacks at a time
  static constexpr int kScaleRounds = (L::kScales + kAtOnce - 1) / kAtOnce;
  static constexpr int kZeroRounds = (S::kDim + kAtOnce - 1) / kAtOnce;
  static constexpr int kGathers = S::kFitted ? (S::kColumns + K::kTeamThreads - 1) / K::kTeamThreads : 1;
  static constexpr float kByteZero = 1152.0f;  // a zero byte, its sign flipped, as the low byte of 1024, less this

  // The mean of the codes of a channel with `columns` columns, in units of zeros.
  static LOGQUANT_DEVICE float code_mean(int columns) {
    return 2.0f / kZeroUnit * (1.0f - power_of_two(-S::kKeyBits * columns));
  }

  LOGQUANT_DEVICE void spread_by_column(const Thread& thread, unsigned char* to) const {
    uint16_t by_column[kGathers];
#pragma unroll
    for (int i = 0; i < kGathers; ++i) by_column[i] = read<uint16_t>(to + scale_of_column[i]);
#pragma unroll
    for (int i = 0; i < kGathers; ++i) {
      const int first = i * K::kTeamThreads;
      if (first + K::kTeamThreads <= S::kColumns || first + thread.team_thread() < S::kColumns) {
        // 32 columns never cross a skew.
        const int at = K::kPaired ? L::Columns::skewed(2 * (first + thread.team_thread()))
                                  : L::Columns::skewed(2 * first) + 2 * thread.lane;
        *reinterpret_cast<uint16_t*>(to + L::kColumnScales + at) = by_column[i];
      }
    }
  }

  uint32_t offset = 0;            // of what is unpacked, from `shared` on
  int scale_of_column[kGathers];  // where, in bytes, of this thread's columns
  uint32_t mean_offset[2 * kZeroRounds];
};

}  // namespace logquant::cuda::tensor

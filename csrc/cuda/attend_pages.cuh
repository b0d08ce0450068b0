// Split-K decode attention over packed pages and the exact window, on tensor cores, compiled for one page format.
//
// A block is four warps and one split of a KV head's slots, for a tile of 8 or 16 query rows. Blocks of the first
// page_splits take pages, a warp one page at a time; the others take the window. Grid (splits, batch * KV heads,
// tiles). Where the output of 16 rows would not fit in a warp's registers, a block is two warps that share each page:
// each computes S of 8 rows and then O of all 16 for half of the channels; p' goes through shared memory.
//
// Notation: lane = 4g + t. Keys (tokens) and values (channels) are the M = 16 operand A of mma.m16n8k16, eight query
// rows are N = 8, operand B, so that few rows cost no padding and every code is turned into an operand once.
//   S[token, row]    = sum over columns K[token, column] * q'[row, column]
//   O[channel, row] += sum over tokens V[token, channel] * p'[row, token]
// * A lane owns whole words of a token's columns where there are four or more, then halves, then quarters of a word
//   (Pairs); of values, the page_tokens / 4 tokens from page_tokens / 4 * t on. The order of k is thus not that of the
//   page, which a sum does not mind; q', p' and the parameters follow it by being read in the same order.
// * Rows of the m-tile i of S are the tokens G/4 * (r % 8 / 2) + 4i + 2 (r / 8) + r % 2: then movmatrix.trans of the
//   packed accumulators is the B operand of the second product, in the order of the value words.
// * No dequantisation. word & (lane_mask << b*i) is the fp16 subnormal code * 2^(b*i - 24), for the low eight bits of
//   both halves of the word and, shifted by eight, for the others. 2^-(b*i) and the scale sit in q' or p', 2^24 in the
//   fp32 factor of the exponent or in the epilogue. LOGQUANT_NORMAL_CODES computes (1024 + code * 2^(b*i)) - 1024
//   instead, one HADD2 a pair more, should an mma ever flush subnormals. Do not fold the 1024 into a correction: sums
//   of tensor cores truncate, and 1024 * sum p' is 1000 times the result.
// * Zeros: sum q * zero is mma whose rows of A are all the zero vector: the sum arrives where S is. sum p * zero and
//   sum p are mma with rows 0.. = zeros of the value groups and then a row of ones. A quad of words is the A operand as
//   LDS.128 left it: rows 0-7 see words 0 and 2, rows 8-15 words 1 and 3, each with its own B and accumulator, of which
//   the other half is garbage.
// * Fitted formats (8-bit parameters, format.h): first a page's parameters are unpacked to fp16 in shared memory,
//   scales by ex2; key scales are then spread by column. Zeros of keys are whole numbers of scales / 8, so that
//   sum q' * zero, with the q' that codes see, rounds no worse than q' does; q' is the operand A here, for the two
//   halves of its rows have a use. Values have no zeros: sum p' * (code - mean) is sum p' * code - mean * sum p'. O is
//   rotated back once, when the warps' parts are added.
// * fp16 models are compensated: q' and p' are rounded, and codes have a mean, so half of the rounding noise is common
//   to all tokens of a page. mean * (sum q * scale - sum q' * 2^(b*i)) is added back, by mma, and the same for p'. Of
//   fitted keys, where q' multiplies the zeros too, it is (zero + mean) times what each q' lost; values need none.
// * bf16 models use fp16 arithmetic for pages: q is scaled per row by a power of two into [1, 2), p is relative to a
//   reference exponent that leaves p and p' inside fp16. The reference moves only when p' reaches 2^15: a vote. Masks,
//   positions, softcap and poisoned scales take the branch that moves it; the plain loop skips that.
//
// Memory: each page once for 16 rows, by cp.async into a ring of two pages for each warp or pair, plus 4 (Dv + 2) bytes
// a row and split. Budget for D = 128, 2 bits, 8 rows: 168 registers, 48 KB of shared memory, so that three blocks fit
// on an SM: 12 warps with a page each in flight, 61 KB, and an H100 needs 20 KB an SM (3.35 TB/s * 800 ns / 132).
// Instructions a token: tests/test_cuda_budget.py; an H100 is memory-bound below 22.
#pragma once

#include "attend.cuh"

#ifndef LOGQUANT_NORMAL_CODES
#define LOGQUANT_NORMAL_CODES 0
#endif

namespace logquant::cuda {

template <int D, int DV, int C, int KeyBits, int ValueBits, int G, int GV, int ParamBits = 16>
struct Shape {
  static constexpr int kDim = D, kValueDim = DV, kColumns = C, kKeyBits = KeyBits, kValueBits = ValueBits, kTokens = G;
  static constexpr int kGroup = GV, kGroups = DV / GV;
  static constexpr PageFormat kFormat{D, DV, G, KeyBits, ValueBits, C, GV, ParamBits, ParamBits};
  // 8-bit parameters and a column map: one does not come without the other here.
  static constexpr bool kFitted = ParamBits == 8;
  static_assert(format_error(kFormat) == nullptr && kGroups <= 4 && kFitted == (C != D));
};

namespace tensor {

inline constexpr int kStages = 2;
inline constexpr float kUnit = LOGQUANT_NORMAL_CODES ? 1.0f : 16777216.0f;  // 1 / what a code of 1 is as an operand

// 8-bit scales are unpacked into fp16, times this: of eight consecutive ones, which is all that their fractions can be,
// the rounding errors are then 2.5 times smaller than those of any eight; and fewer are subnormal.
inline constexpr float kScaleShift = 3.0f + 127.0f / 1024.0f, kScaleUnit = 8.7181585f;  // 2^kScaleShift

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }
// The smallest multiple of 16 from x on that is `remainder` modulo 128: for rows that must fall on different banks.
constexpr int pitch(int x, int remainder) {
  return round_up(x, 16) + ((remainder - round_up(x, 16)) % 128 + 128) % 128;
}

// How `count` pairs of 16-bit elements fall to the four lanes t: first `whole` (of whole words), then `half`, then
// `quarter` consecutive pairs each. Pair n of lane t is at byte offset(t, n) of a row of 4 * count pairs.
template <int count, int bits>
struct Pairs {
  static constexpr int kPerWord = 16 / bits, kUnitPairs = kPerWord > 4 ? kPerWord : 4;
  static constexpr int kCount = count, kWhole = count / kUnitPairs * kUnitPairs;
  static constexpr int kHalf = (count - kWhole) & 4, kQuarter = count & 2, kQuads = (count + 3) / 4;
  static_assert(kWhole + kHalf + kQuarter == count);
  static LOGQUANT_DEVICE constexpr int offset(int t, int n) {
    const int first = n < kWhole ? 0 : n < kWhole + kHalf ? kWhole : kWhole + kHalf;
    const int size = n < kWhole ? kWhole : n < kWhole + kHalf ? kHalf : kQuarter;
    return 16 * first + 4 * size * t + 4 * (n - first);
  }
  static LOGQUANT_DEVICE constexpr int element(int t, int n) { return offset(t, n) / 2; }
  // Rows whose lanes lie 64 bytes apart get 16 bytes after each such part, against bank conflicts.
  static constexpr int kSkew = kWhole % 16 == 0 ? 4 * kWhole : 0;
  static LOGQUANT_DEVICE constexpr int skewed(int byte) {
    return kSkew ? byte + byte / (kSkew ? kSkew : 1) * 16 : byte;
  }
};

// The words of one row (a token's columns, a channel's tokens) that lane t holds.
template <int words, int bits>
struct Words {
  static constexpr int kWhole = words / 4, kHalf = words / 2 % 2, kQuarter = words % 2;
  static constexpr int kCount = kWhole + kHalf + kQuarter, kPairs = words * 16 / bits / 4;
  static LOGQUANT_DEVICE constexpr int pairs_before(int w) {
    constexpr int kPerWord = 16 / bits;
    return w <= kWhole ? w * kPerWord : w == kCount ? kPairs : kWhole * kPerWord + kPerWord / 2;
  }
};

// One page in shared memory, and what a block keeps beside the ring.
template <class S, bool compensated, int tiles>
struct Layout {
  // A team has a ring of pages, and works on one page at a time: a warp, or, where the output of 16 rows would not fit
  // in its registers, the two warps of a block. Each of a pair takes 8 rows of S and half of the channels of O.
  static constexpr bool kPaired = tiles == 2 && S::kValueDim > (compensated || S::kFitted ? 128 : 192);
  static constexpr int kWarps = kPaired ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kTeams = kPaired ? 1 : kWarps, kTeamThreads = kThreads / kTeams;
  static constexpr int kScoreTiles = kPaired ? 1 : tiles;  // of S, of a warp

  static constexpr int kKeyWords = S::kColumns * S::kKeyBits / 32, kValueRows = S::kTokens * S::kValueBits / 32;
  using KeyWords = Words<kKeyWords, S::kKeyBits>;
  using ValueWords = Words<kValueRows, S::kValueBits>;
  using Columns = Pairs<S::kColumns / 8, S::kKeyBits>;
  static_assert(KeyWords::kPairs == Columns::kCount);

  static constexpr int kKeyBlock = S::kTokens / 4 * kKeyWords * 4;
  static constexpr int kKeyPitch =
      kKeyWords % 16 == 0 ? kKeyBlock : pitch(kKeyBlock, round_up(8 * kKeyWords, 16) % 128);
  static constexpr int kValueBlocks = kValueRows < 4 ? kValueRows : 4;
  static constexpr int kValueBlock = kValueRows / kValueBlocks * S::kValueDim * 4;
  static constexpr int kValuePitch = pitch(kValueBlock, 32);
  static constexpr int kKeyParams = 4 * kKeyPitch;
  // Fitted: the scales of keys and of values, a byte each, and the zeros of keys.
  static constexpr int kScales = S::kDim + S::kGroups * S::kTokens;
  static constexpr int kKeyZeros = S::kFitted ? kScales : Columns::skewed(2 * S::kDim);
  static constexpr int kValues = kKeyParams + (S::kFitted ? kScales + S::kDim : Columns::skewed(4 * S::kDim));
  static constexpr int kValueParams = kValues + kValueBlocks * kValuePitch;
  static constexpr int kStage = kValueParams + (S::kFitted ? 0 : 4 * S::kGroups * S::kTokens);

  // Fitted parameters of a team's page as fp16: the scales of keys and of values, zeros, zeros with the mean of the
  // codes, and scales by column.
  static constexpr int kUnpackedZeros = 2 * kScales, kUnpackedMeans = kUnpackedZeros + 2 * S::kDim;
  static constexpr int kColumnScales = kUnpackedMeans + (compensated ? 2 * S::kDim : 0);
  static constexpr int kUnpackedBytes = round_up(kColumnScales + Columns::skewed(2 * S::kColumns), 16);
  static constexpr int kUnpackedAtOnce = 4 * kTeamThreads;
  static constexpr int kScaleRounds = (kScales + kUnpackedAtOnce - 1) / kUnpackedAtOnce;
  static constexpr int kZeroRounds = (S::kDim + kUnpackedAtOnce - 1) / kUnpackedAtOnce;

  // Before the rings: a row of ones, one of zeros; a quad of negative weights of values and one of ones, with seven
  // quads of zeros before and after each (sum_pairs); a quad of negative weights of keys; the tables of q; what each
  // team unpacks; what a pair exchanges.
  static constexpr int kZeros = 2 * S::kTokens, kMinus = 4 * S::kTokens + 7 * 16, kOnes = kMinus + 8 * 16;
  static constexpr int kKeyMinus = kOnes + 8 * 16;
  static constexpr int kConstants = kKeyMinus + 16;
  static constexpr bool kQueryInRegisters = Columns::kCount <= 16 && tiles == 1 && !S::kFitted;
  static constexpr int kChannelQuads = (S::kDim + 31) / 32;
  // Of fitted formats, q by channel and q' by column; of plain ones, where they are the same, both by column.
  static constexpr int kTable = Columns::kQuads * 512, kQueryTable = S::kFitted ? kChannelQuads * 512 : kTable;
  static constexpr int kQuery = kConstants, kScaledQuery = kQuery + (kQueryInRegisters ? 0 : tiles * kQueryTable);
  static constexpr int kUnpacked = kScaledQuery + (kQueryInRegisters ? 0 : tiles * kTable);
  // Pairs: p' of each warp's rows for the other's groups, how far references moved, and at the end sum p * zero.
  static constexpr bool kWholeGroups = S::kGroups % 2 == 0;
  static constexpr int kOwnGroups = kPaired && kWholeGroups ? S::kGroups / 2 : S::kGroups;
  static constexpr int kPassed = kUnpacked + (S::kFitted ? kTeams * kUnpackedBytes : 0);
  static constexpr int kPassedFactors = kPassed + (kPaired ? 2 * 16 * S::kTokens * kOwnGroups : 0);
  static constexpr int kPassedZeros = kPassedFactors + (kPaired ? 4 * 16 : 0);
  static constexpr int kRings = kPassedZeros + (kPaired ? 4 * 16 * S::kGroups : 0);
  static constexpr int kRingBytes = kRings + kTeams * kStages * kStage;
  static constexpr int kMergeBytes = kTeams * 8 * tiles * (S::kValueDim + 2) * 4;
  static constexpr int kBytes = kRingBytes > kMergeBytes ? kRingBytes : kMergeBytes;

  // Rows of the small product of parameters and p: zeros of each group, ones, and scales of each group; the last in a
  // product of their own where nine rows would be needed.
  static constexpr bool kScalesApart = compensated && !S::kFitted && 2 * S::kGroups + 1 > 8;
  // Value channels of an m-tile: 32 at a time where a group has them.
  static constexpr bool kWide = S::kGroup % 32 == 0 || S::kGroups == 1;
  static constexpr int kWideBlocks = kWide ? S::kValueDim / 32 : 0, kTiles = S::kValueDim / 16;

  // Of a pair, each warp takes half of the groups, or else every other 32 channels of every group.
  static constexpr int kOwnTiles = kPaired ? kTiles / 2 : kTiles;
  static constexpr int kOwnWideBlocks = kPaired ? kWideBlocks / 2 : kWideBlocks;
  static constexpr int kTilesOfGroup = kOwnTiles / kOwnGroups;
  // What the second warp adds to the numbers of groups and tiles of the first.
  static constexpr int kNextGroups = kPaired && kWholeGroups ? S::kGroups / 2 : 0;
  static constexpr int kNextTiles = !kPaired ? 0 : kWholeGroups ? kTiles / 2 : 2;
  static LOGQUANT_DEVICE constexpr int first_warps_tile(int j) {
    return kPaired && !kWholeGroups ? j / 2 * 4 + j % 2 : j;
  }
  static_assert(!kPaired || (kWide && kTilesOfGroup % 2 == 0));
  static_assert(kRings % 16 == 0 && kStage % 16 == 0);
};

template <class U>
LOGQUANT_DEVICE U read(const unsigned char* p) {
  return *reinterpret_cast<const U*>(p);
}
LOGQUANT_DEVICE void put(uint32_t* to, uint4 v) {
  to[0] = v.x;
  to[1] = v.y;
  to[2] = v.z;
  to[3] = v.w;
}

// Pair i of a word as the two fp16 code * 2^(bits * (i % (8 / bits))) / kUnit; shifted = word >> 8.
template <int bits>
LOGQUANT_DEVICE uint32_t code_pair(uint32_t word, uint32_t shifted, int i) {
  constexpr int kPerByte = 8 / bits;
  const uint32_t mask = lane_mask(bits) << bits * (i % kPerByte), x = i < kPerByte ? word : shifted;
  return LOGQUANT_NORMAL_CODES ? ptx::sub_f16x2(ptx::and_or(x, mask, 0x64006400u), 0x64006400u) : x & mask;
}
// Both halves 2^(bits * (i % (8 / bits))), or its inverse, or its negative.
template <int bits>
LOGQUANT_DEVICE constexpr uint32_t weight(int i) {
  return 0x3C003C00u + 0x04000400u * static_cast<uint32_t>(bits * (i % (8 / bits)));
}
template <int bits>
LOGQUANT_DEVICE constexpr uint32_t inverse_weight(int i) {
  return 0x3C003C00u - 0x04000400u * static_cast<uint32_t>(bits * (i % (8 / bits)));
}
template <int bits>
LOGQUANT_DEVICE constexpr uint32_t negative_weight(int i) {
  return weight<bits>(i) | 0x80008000u;
}

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

template <int n>
LOGQUANT_DEVICE uint32_t max_of(const uint32_t* v) {
  if constexpr (n == 1) {
    return v[0];
  } else {
    return ptx::max_nan_f16x2(max_of<n / 2>(v), max_of<n - n / 2>(v + n / 2));
  }
}

LOGQUANT_DEVICE float max_over_tokens(float x) {  // over g
  x = fmaxf(x, __shfl_xor_sync(ptx::kFullMask, x, 4));
  x = fmaxf(x, __shfl_xor_sync(ptx::kFullMask, x, 8));
  return fmaxf(x, __shfl_xor_sync(ptx::kFullMask, x, 16));
}

template <class T, class S, int tiles>
class TensorAttention {
  static constexpr bool kCompensated = std::is_same_v<T, __half>;
  using L = Layout<S, kCompensated, tiles>;
  using KeyWords = typename L::KeyWords;
  using ValueWords = typename L::ValueWords;
  using Columns = typename L::Columns;
  static constexpr int kTokenPairs = S::kTokens / 8, kKeyTiles = S::kTokens / 16;
  static_assert(4 * kKeyTiles <= 32);  // bits of `hidden`
  static constexpr int kScoreTiles = L::kScoreTiles;
  static constexpr bool kAllGroups = S::kGroups * tiles <= 2;      // keep p' of all groups, not of one at a time
  static constexpr bool kSubtracted = kCompensated || S::kFitted;  // sum p' is needed beside sum p * zero
  static constexpr float kKeyMean = code_mask(S::kKeyBits) / 2.0f, kValueMean = code_mask(S::kValueBits) / 2.0f;
  using A4 = uint32_t[4];
  using B2 = uint32_t[2];

 public:
  LOGQUANT_DEVICE TensorAttention(const AttendArgs& args, unsigned char* shared_memory)
      : a(args),
        // Saves instructions, but takes a register, which some formats have no room for.
        shared(S::kFitted || S::kDim == 112 ? shared_memory : ptx::keep_shared(shared_memory)),
        warp(threadIdx.x / 32),
        half(L::kPaired ? warp : 0),
        team(L::kPaired ? 0 : warp),
        lane(ptx::keep(static_cast<int>(threadIdx.x % 32))),
        g(lane / 4),
        t(lane % 4),
        batch(blockIdx.y / static_cast<int>(args.kv_heads)),
        kv_head(blockIdx.y % static_cast<int>(args.kv_heads)),
        first_row(blockIdx.z * 8 * tiles),
        row_total(static_cast<int>(args.group * args.queries)) {}

  LOGQUANT_DEVICE void run() {
#pragma unroll
    for (int u = 0; u < kScoreTiles; ++u) {
#pragma unroll
      for (int r = 0; r < 2; ++r) top[u][r] = -INFINITY, sum[u][r] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < tiles * L::kOwnTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[j][i] = 0.0f;
    }
    const int split = ptx::block_x();
    if (split < a.page_splits) {
      page_part(split);
    } else {
      window_part(split - a.page_splits);
    }
    merge();
  }

 private:
  // The first of the rows whose scores this warp computes.
  LOGQUANT_DEVICE int first_score_row() const { return first_row + 8 * half; }

  // Which thread of its team this is.
  LOGQUANT_DEVICE int member() const { return L::kPaired ? static_cast<int>(threadIdx.x) : lane; }
  LOGQUANT_DEVICE static void sync_team() {
    if constexpr (L::kPaired) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
  LOGQUANT_DEVICE static bool any_in_team(bool x) {
    return L::kPaired ? __syncthreads_or(x) != 0 : __any_sync(ptx::kFullMask, x) != 0;
  }

  LOGQUANT_DEVICE const T* query(int row) const {
    return static_cast<const T*>(a.q.data) + query_offset(a, row_of(a, batch, kv_head, row));
  }

  // ---------------------------------------------------------------------------------------------------------- pages
  // Immediate offsets of cp.async are below this either way: `source` is so far into a page that most use no register.
  static constexpr int kReach = 2048;

  // Where the next page of this warp lies: a step from the last, or in the table.
  LOGQUANT_DEVICE void seek(int page) {
    if (a.page_table != nullptr) {
      source = reinterpret_cast<const unsigned char*>(page_at(a, batch, kv_head, page)) + (16 * member() + kReach);
    } else {
      source += source_step;
    }
  }

  // `bytes` of the page from `first` on, in blocks that get `to_pitch` each in shared memory.
  template <int bytes, int block, int to_pitch>
  LOGQUANT_DEVICE void copy(unsigned char* to, int first) const {
    constexpr int kStep = 16 * L::kTeamThreads,
                  kAtOnce = kStep % block == 0 ? kStep : block;  // whole blocks: constants
    const int first_byte = 16 * member();
    const int own = first_byte / block * (to_pitch - block) + first_byte;  // of `to`; `source` has it already
#pragma unroll
    for (int start = 0; start < bytes; start += kAtOnce) {
      const int end = start + kAtOnce < bytes ? start + kAtOnce : bytes, target = start / block * to_pitch;
#pragma unroll
      for (int i = start; i < end; i += kStep) {
        if (i + kStep <= end || i + first_byte < end) {
          ptx::cp_async16(to + target + i - start + own, source + (first + i - kReach));
        }
      }
    }
  }

  LOGQUANT_DEVICE void fetch(unsigned char* stage) const {
    constexpr PageFormat f = S::kFormat;
    constexpr int kAny = 16 * L::kTeamThreads;
    copy<4 * L::kKeyBlock, L::kKeyBlock, L::kKeyPitch>(stage, 0);
    copy<L::kValueBlocks * L::kValueBlock, L::kValueBlock, L::kValuePitch>(stage + L::kValues, 4 * f.value_codes());
    if constexpr (S::kFitted) {
      copy<S::kDim, kAny, kAny>(stage + L::kKeyParams, 4 * f.key_params());
      copy<S::kGroups * S::kTokens, kAny, kAny>(stage + L::kKeyParams + S::kDim, 4 * f.value_params());
      copy<S::kDim, kAny, kAny>(stage + L::kKeyParams + L::kKeyZeros, 4 * f.key_params() + f.key_zeros());
    } else {
      constexpr int kSkew = Columns::kSkew ? Columns::kSkew : 4 * S::kDim;
      copy<4 * S::kDim, kSkew, kSkew + 16>(stage + L::kKeyParams, 4 * f.key_params());
      copy<4 * S::kGroups * S::kTokens, kAny, kAny>(stage + L::kValueParams, 4 * f.value_params());
    }
  }

  // Four pairs of a row of 16-bit elements from pair n on; zeros past the last.
  LOGQUANT_DEVICE void read_quad(uint32_t (&to)[4], const unsigned char* row, int n) const {
    const unsigned char* const p = row + Columns::skewed(Columns::offset(t, n));
    if (n + 4 <= Columns::kCount) {
      put(to, read<uint4>(p));
    } else {
      const uint2 two = read<uint2>(p);
      to[0] = two.x;
      to[1] = two.y;
      to[2] = to[3] = 0;
    }
  }

  // Quads of fitted channels: a lane has 4 consecutive pairs of 32 channels, 2 of the last 16.
  static LOGQUANT_DEVICE constexpr bool whole_quad(int quad) { return 32 * quad + 32 <= S::kDim; }
  LOGQUANT_DEVICE int quad_channel(int quad, int i) const { return 32 * quad + (whole_quad(quad) ? 8 : 4) * t + 2 * i; }
  LOGQUANT_DEVICE void read_channels(uint32_t (&to)[4], const unsigned char* row, int quad) const {
    if (whole_quad(quad)) {
      put(to, read<uint4>(row + 2 * quad_channel(quad, 0)));
    } else {
      const uint2 two = read<uint2>(row + 2 * quad_channel(quad, 0));
      to[0] = two.x;
      to[1] = two.y;
      to[2] = to[3] = 0;
    }
  }

  LOGQUANT_DEVICE const int16_t* key_map() const {
    return a.key_map.data + batch * a.key_map.batch_stride + kv_head * a.key_map.head_stride;
  }

  // Columns of a channel: its digits are marked, a byte each, where parameters will be unpacked.
  LOGQUANT_DEVICE void mark_digits() {
    for (int c = threadIdx.x; c < S::kDim; c += L::kThreads) reinterpret_cast<uint32_t*>(shared + L::kUnpacked)[c] = 0;
    __syncthreads();
    for (int j = threadIdx.x; j < S::kColumns; j += L::kThreads) {
      const int entry = key_map()[j];
      shared[L::kUnpacked + 4 * channel_of(entry, S::kDim) + column_digit(entry)] = 1;
    }
    __syncthreads();
  }
  LOGQUANT_DEVICE int columns_of(int channel) const {
    return static_cast<int>(read<uint32_t>(shared + L::kUnpacked + 4 * channel) * 0x01010101u >> 24);
  }
  static LOGQUANT_DEVICE float power_of_two(int x) { return __uint_as_float(static_cast<uint32_t>(127 + x) << 23); }
  static constexpr float kByteZero = 1152.0f;  // a zero byte, its sign flipped, as the low byte of 1024, less this

  // q of 8 rows a tile as B operands, scaled by a power of two a row into fp16's best range.
  LOGQUANT_DEVICE void load_query() {
    const float sign = a.scale > 0.0f ? 1.0f : a.scale < 0.0f ? -1.0f : 0.0f;
    const float size = a.scale != 0.0f ? fabsf(a.scale) * kLog2e : 1.0f;
#pragma unroll
    for (int u = 0; u < kScoreTiles; ++u) {
      const int row = first_score_row() + 8 * u + g;
      const T* const q = query(min(row, row_total - 1));
      const float use = row < row_total ? 1.0f : 0.0f;
      float most = 0.0f;
      for (int c = 2 * t; c < S::kDim; c += 8) {
        most = fmaxf(most, fmaxf(fabsf(Element<T>::wide(q[c])), fabsf(Element<T>::wide(q[c + 1]))) * use);
      }
      most = fmaxf(most, __shfl_xor_sync(ptx::kFullMask, most, 1));
      most = fmaxf(most, __shfl_xor_sync(ptx::kFullMask, most, 2));
      int exponent = most > 0.0f ? static_cast<int>(__float_as_uint(most) >> 23) - 127 : 0;
      exponent = min(max(exponent, -120), 120);
      const float down = power_of_two(-exponent) * sign;
      const float up = power_of_two(exponent) * size * (S::kFitted ? 1.0f / kScaleUnit : 1.0f);
      const auto pair = [&](int c, int d, float x, float y) {
        return row < row_total ? ptx::pack_f16(Element<T>::wide(q[c]) * (down * x), Element<T>::wide(q[d]) * (down * y))
                               : 0u;
      };
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        code_factor[u][r] = __shfl_sync(ptx::kFullMask, up, (2 * t + r) * 4);
        constant_factor[u][r] = code_factor[u][r] * (S::kFitted ? kZeroUnit : 1.0f);
        code_factor[u][r] *= kUnit;
      }
      uint32_t* const table = reinterpret_cast<uint32_t*>(shared + L::kQuery + (u + half) * L::kQueryTable);
      uint32_t* const scaled = reinterpret_cast<uint32_t*>(shared + L::kScaledQuery + (u + half) * L::kTable);
      if constexpr (L::kQueryInRegisters) {
#pragma unroll
        for (int n = 0; n < 4 * Columns::kQuads; ++n) {
          const int c = Columns::element(t, n);
          query_pairs[n] = n < Columns::kCount ? pair(c, c + 1, 1.0f, 1.0f) : 0u;
          scaled_pairs[n] = ptx::mul_f16x2(query_pairs[n], inverse_weight<S::kKeyBits>(n));
        }
      } else if (team == 0) {
        for (int n = 0; n < 4 * Columns::kQuads; ++n) {
          uint32_t x = 0;
          if (n < Columns::kCount) {
            const int j = Columns::element(t, n);
            if constexpr (S::kFitted) {
              const int first = key_map()[j], second = key_map()[j + 1];
              const int c = channel_of(first, S::kDim), d = channel_of(second, S::kDim);
              x = pair(c, d, digit_weight(column_digit(first), columns_of(c)),
                       digit_weight(column_digit(second), columns_of(d)));
            } else {
              x = pair(j, j + 1, 1.0f, 1.0f);
            }
          }
          if constexpr (!S::kFitted) table[(n / 4 * 32 + lane) * 4 + even_odd(n)] = x;
          scaled[(n / 4 * 32 + lane) * 4 + n % 4] = ptx::mul_f16x2(x, inverse_weight<S::kKeyBits>(n));
        }
        if constexpr (S::kFitted) {
          for (int n = 0; n < 4 * L::kChannelQuads; ++n) {
            const bool used = whole_quad(n / 4) || n % 4 < 2;
            const int c = quad_channel(n / 4, n % 4);
            table[(n / 4 * 32 + lane) * 4 + n % 4] = used ? pair(c, c + 1, 1.0f, 1.0f) : 0u;
          }
        }
      }
    }
    if constexpr (S::kFitted) {
#pragma unroll
      for (int i = 0; i < kGathers; ++i) {  // where the scale of each of this lane's columns is
        gather[i] = 2 * channel_of(key_map()[min(i * L::kTeamThreads + member(), S::kColumns - 1)], S::kDim);
      }
      if constexpr (kCompensated) {
#pragma unroll
        for (int i = 0; i < 2 * L::kZeroRounds; ++i) {
          const int c = min(i / 2 * L::kUnpackedAtOnce + 4 * member() + i % 2 * 2, S::kDim - 2);
          mean_offset[i] =
              ptx::pack_f16(kByteZero - code_mean(columns_of(c)), kByteZero - code_mean(columns_of(c + 1)));
        }
      }
    }
  }

  // What digit `digit` of a channel with `columns` columns weighs, in units of the scale, and the mean of the codes of
  // such a channel, in those of zeros.
  static LOGQUANT_DEVICE float digit_weight(int digit, int columns) {
    return power_of_two(S::kKeyBits * (digit - columns) + 2);
  }
  static LOGQUANT_DEVICE float code_mean(int columns) {
    return 2.0f / kZeroUnit * (1.0f - power_of_two(-S::kKeyBits * columns));
  }

  // Where pair n of q stands in its quad in shared memory: the even pairs, an operand of the products with parameters,
  // then the odd ones.
  static LOGQUANT_DEVICE constexpr int even_odd(int n) { return n % 4 / 2 + n % 2 * 2; }

  LOGQUANT_DEVICE void read_query(uint32_t (&to)[4], int table, int bytes, int u, int quad) const {
    put(to, read<uint4>(shared + table + (u + half) * bytes + (quad * 32 + lane) * 16));
  }

  LOGQUANT_DEVICE void page_part(int split) {
    uint32_t* const constants = reinterpret_cast<uint32_t*>(shared);
    for (int i = threadIdx.x; i < L::kConstants / 4; i += L::kThreads) {
      constexpr int b = S::kValueBits;
      const int n = i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4;
      constants[i] = i < L::kZeros / 4 || i / 4 == L::kOnes / 16 ? Operand<__half>::kOnes
                     : i / 4 == L::kKeyMinus / 16                ? negative_weight<S::kKeyBits>(n)
                     : i / 4 == L::kMinus / 16                   ? negative_weight<b>(n)
                                                                 : 0u;
    }
    if constexpr (!S::kFitted) {
      row_offset = (g == S::kGroups ? 0 : L::kZeros) + t * 4 * kTokenPairs;
      row_in_stage = 0;
      if (g < S::kGroups) {
        row_in_stage = ~0u;
        row_offset = L::kValueParams + 2 * (S::kGroups + g) * S::kTokens + t * 4 * kTokenPairs;
      } else if (kCompensated && !L::kScalesApart && g > S::kGroups && g <= 2 * S::kGroups) {
        row_in_stage = ~0u;
        row_offset = L::kValueParams + 2 * (g - S::kGroups - 1) * S::kTokens + t * 4 * kTokenPairs;
      }
      row_in_stage = ptx::keep(row_in_stage);
      row_offset = ptx::keep(row_offset);
    }
    stage_at = L::kRings + team * kStages * L::kStage;
    unpacked_at = ptx::keep(L::kUnpacked + team * L::kUnpackedBytes);
    const uint32_t both_stages = ptx::keep(2 * stage_at + L::kStage);
    const int pages = used(a, batch, 0), step = a.page_splits * L::kTeams;
    const int first = split * L::kTeams + team;
    source_step = ptx::keep(step * a.pages.page_stride * 4);
    if (first < pages) {
      source = reinterpret_cast<const unsigned char*>(page_at(a, batch, kv_head, first)) + (16 * member() + kReach);
      fetch(shared + stage_at);
    }
    ptx::cp_async_commit();
    if constexpr (S::kFitted) mark_digits();
    load_query();
    __syncthreads();  // constants and tables

    int next = first;
    while (next < pages) {
      next = ptx::keep(next + step);
      ptx::cp_async_wait<0>();
      sync_team();  // the page is there for all, and all are done with the other stage
      if (next < pages) {
        seek(next);
        fetch(shared + (both_stages - stage_at));
      }
      ptx::cp_async_commit();
      attend_page(shared + stage_at, next - step);
      stage_at = both_stages - stage_at;
    }
    ptx::cp_async_wait<0>();
    finish_pages();
  }

  LOGQUANT_DEVICE void attend_page(const unsigned char* stage, int page) {
    float constant[kScoreTiles][2];
    float s[kScoreTiles][kKeyTiles][4];
    unsigned char* const unpacked = shared + unpacked_at;
    bool poison = false;
    if constexpr (S::kFitted) poison = unpack_parameters(unpacked, stage + L::kKeyParams);
    scores(stage, unpacked, s, constant);

    uint32_t p[kScoreTiles][kTokenPairs];                                    // weights as B operands
    uint32_t scaled[kScoreTiles][kAllGroups ? S::kGroups : 1][kTokenPairs];  // p', or p times the largest scale
    uint32_t scales[kAllGroups ? S::kGroups : 1][kTokenPairs];
    const unsigned char* const value_scales =
        (S::kFitted ? unpacked + 2 * S::kDim : stage + L::kValueParams) + t * 4 * kTokenPairs;
    const auto read_scales = [&]() __attribute__((always_inline)) {
      if constexpr (kAllGroups) {
#pragma unroll
        for (int group = 0; group < S::kGroups; ++group) read_token_pairs(scales[group], value_scales, group);
      } else {
        read_token_pairs(scales[0], value_scales, 0);
#pragma unroll
        for (int group = 1; group < S::kGroups; ++group) {
          uint32_t others[kTokenPairs];
          read_token_pairs(others, value_scales, group);
#pragma unroll
          for (int i = 0; i < kTokenPairs; ++i) scales[0][i] = ptx::max_nan_f16x2(scales[0][i], others[i]);
        }
      }
    };
    const auto weigh = [&](const auto& exponent) __attribute__((always_inline)) {
#pragma unroll
      for (int u = 0; u < kScoreTiles; ++u) {
#pragma unroll
        for (int i = 0; i < kTokenPairs; ++i) {
          p[u][i] = ptx::movmatrix_trans(
              ptx::pack_f16(ptx::exp2(exponent(u, i / 2, i % 2 * 2)), ptx::exp2(exponent(u, i / 2, i % 2 * 2 + 1))));
          const uint32_t y = plain_weight(i) ? p[u][i] : ptx::mul_f16x2(p[u][i], inverse_weight<S::kValueBits>(i));
#pragma unroll
          for (int group = 0; group < (kAllGroups ? S::kGroups : 1); ++group) {
            scaled[u][group][i] = ptx::mul_f16x2(y, scales[group][i]);
          }
        }
      }
    };
    uint32_t hidden[kScoreTiles];  // by mask_scores; else not used below
    float factors[kScoreTiles][2];
#pragma unroll
    for (int u = 0; u < kScoreTiles; ++u) factors[u][0] = factors[u][1] = 1.0f;
    // Of fitted formats only where they are used, for spare_hidden_scales may write some.
    if constexpr (!S::kFitted) read_scales();
    bool moves = !a.plain || poison;
    // Weights that masks will replace are not computed; but with this branch plain formats of dim 128 spill registers.
    if ((S::kDim == 128 && !S::kFitted) || !moves) {
      if constexpr (S::kFitted) read_scales();
      float common[kScoreTiles][2];
#pragma unroll
      for (int u = 0; u < kScoreTiles; ++u) {
#pragma unroll
        for (int r = 0; r < 2; ++r) common[u][r] = fmaf(constant[u][r], constant_factor[u][r], -top[u][r]);
      }
      weigh([&](int u, int i, int k) { return fmaf(s[u][i][k], code_factor[u][k % 2], common[u][k % 2]); });
      // p' >= 2^15, infinite or NaN anywhere (an infinite p ends up there too): the first page, then almost never.
      constexpr int kScaled = sizeof scaled / 4;
      const bool far = ((max_of<kScaled>(&scaled[0][0][0]) + 0x08000800u) & 0x80008000u) != 0;
      moves = __any_sync(ptx::kFullMask, far) != 0 || moves;
    }
    if (moves) {
      // Not in place: if s could change here, the accumulators would be copied in the plain loop, too.
      float score[kScoreTiles][kKeyTiles][4];
#pragma unroll
      for (int u = 0; u < kScoreTiles; ++u) {
        hidden[u] = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float common = constant[u][k % 2] * constant_factor[u][k % 2];
#pragma unroll
          for (int i = 0; i < kKeyTiles; ++i) score[u][i][k] = fmaf(s[u][i][k], code_factor[u][k % 2], common);
        }
      }
      if (!a.plain) mask_scores(score, page * S::kTokens, hidden);
      if constexpr (S::kFitted) {
        if (poison) spare_hidden_scales(unpacked + 2 * S::kDim, hidden);
        read_scales();
      }
      move_reference(score, max_of<sizeof scales / 4>(&scales[0][0]), factors);
      weigh([&](int u, int i, int k) { return score[u][i][k] - top[u][k % 2]; });
    }
    if constexpr (S::kFitted) {
#pragma unroll
      for (int u = 0; u < kScoreTiles; ++u) sum_pairs(sums_even[u], sums_odd[u], L::kOnes, S::kGroups, p[u]);
    } else {
      parameter_sums(p, hidden);
    }
    if constexpr (kSubtracted && kAllGroups) {
#pragma unroll
      for (int u = 0; u < kScoreTiles; ++u) {
#pragma unroll
        for (int group = 0; group < S::kGroups; ++group) subtract_rounded(u, group, scaled[u][group]);
      }
    }
    const auto weigh_group = [&](uint32_t (&to)[kTokenPairs], int u, int group) __attribute__((always_inline)) {
      uint32_t group_scales[kTokenPairs];
      read_token_pairs(group_scales, value_scales, group);
#pragma unroll
      for (int i = 0; i < kTokenPairs; ++i) {
        const uint32_t y = plain_weight(i) ? p[u][i] : ptx::mul_f16x2(p[u][i], inverse_weight<S::kValueBits>(i));
        to[i] = ptx::mul_f16x2(y, group_scales[i]);
      }
      if constexpr (kSubtracted) subtract_rounded(u, group, to);
    };
    // p' of a pair: each warp keeps what it needs of its rows, and passes the other what that needs.
    uint32_t kept[L::kPaired ? L::kOwnGroups : 1][kTokenPairs];
    if constexpr (L::kPaired) {
#pragma unroll
      for (int n = 0; n < L::kOwnGroups; ++n) {
        weigh_group(kept[n], 0, n + half * L::kNextGroups);
        uint32_t passed[kTokenPairs];
        if constexpr (L::kWholeGroups) weigh_group(passed, 0, n + (1 - half) * L::kNextGroups);
        pass(n, L::kWholeGroups ? passed : kept[n]);
      }
      if (any_in_team(moves)) exchange_factors(factors[0]);
    }

    // Values. Groups follow each other, so p' of one at a time is enough.
#pragma unroll
    for (int n = 0; n < L::kOwnGroups; ++n) {
      uint32_t own[tiles][kTokenPairs] = {};
      if constexpr (L::kPaired) {
        take_passed(own[1], n);
      } else if constexpr (!kAllGroups) {
#pragma unroll
        for (int u = 0; u < tiles; ++u) weigh_group(own[u], u, n);
      }
      const auto operand = [&](int u, int i) {
        return kAllGroups             ? scaled[L::kPaired ? 0 : u][kAllGroups ? n : 0][i]
               : L::kPaired && u == 0 ? kept[L::kPaired ? n : 0][i]
                                      : own[u][i];
      };
#pragma unroll
      for (int j = n * L::kTilesOfGroup; j < (n + 1) * L::kTilesOfGroup; ++j) {
        const bool wide = j / 2 < L::kOwnWideBlocks;
        if (wide && j % 2) continue;  // done with its neighbour
        const unsigned char* const words = stage + L::kValues + (L::kValueBlocks == 4 ? t : t / 2) * L::kValuePitch +
                                           64 * (L::first_warps_tile(j) + half * L::kNextTiles) + (wide ? 16 : 8) * g;
        if (wide) {
          uint4 held[ValueWords::kCount];
#pragma unroll
          for (int f = 0; f < ValueWords::kCount; ++f) held[f] = read<uint4>(words + f * 4 * S::kValueDim);
          value_tile(j, operand, [&](int f, int h) { return h ? held[f].y : held[f].x; });
          value_tile(j + 1, operand, [&](int f, int h) { return h ? held[f].w : held[f].z; });
        } else {
          uint2 held[ValueWords::kCount];
#pragma unroll
          for (int f = 0; f < ValueWords::kCount; ++f) held[f] = read<uint2>(words + f * 4 * S::kValueDim);
          value_tile(j, operand, [&](int f, int h) { return h ? held[f].y : held[f].x; });
        }
      }
    }
  }

  static LOGQUANT_DEVICE constexpr bool plain_weight(int i) { return i % (8 / S::kValueBits) == 0; }

  LOGQUANT_DEVICE void read_token_pairs(uint32_t (&to)[kTokenPairs], const unsigned char* rows, int row) const {
#pragma unroll
    for (int i = 0; i < kTokenPairs; i += 4) put(to + i, read<uint4>(rows + row * 2 * S::kTokens + 4 * i));
  }

  // Fitted parameters of a page as fp16. Returns whether a scale is poisoned: it is a NaN then.
  LOGQUANT_DEVICE bool unpack_parameters(unsigned char* to, const unsigned char* bytes) {
    constexpr int kAtOnce = L::kUnpackedAtOnce;
    // All that is read first, then all that is written: the compiler must keep the order of the two.
    uint32_t scales[L::kScaleRounds], zeros[L::kZeroRounds], poison = 0;
    const auto each = [&](int count, const auto& f) __attribute__((always_inline)) {
#pragma unroll
      for (int i = 0; i < (count + kAtOnce - 1) / kAtOnce; ++i) {
        if (kAtOnce * i + kAtOnce <= count || kAtOnce * i + 4 * member() < count) f(i, L::kTeamThreads * i + member());
      }
    };
    each(L::kScales, [&](int i, int word) { scales[i] = read<uint32_t>(bytes + 4 * word); });
    each(S::kDim, [&](int i, int word) { zeros[i] = read<uint32_t>(bytes + L::kKeyZeros + 4 * word); });
    each(L::kScales, [&](int i, int word) {
      *reinterpret_cast<uint2*>(to + 8 * word) = unpack_scales(scales[i]);
      poison |= poisoned(scales[i]);
    });
    const bool any = any_in_team((poison & 0x80808080u) != 0);
    if (any) {
#pragma unroll 1
      for (int c = 4 * member(); c < L::kScales; c += c % 4 == 3 ? kAtOnce - 3 : 1) {
        if (bytes[c] == kPoisonScale) reinterpret_cast<uint16_t*>(to)[c] = kPoison;
      }
    }
    each(S::kDim, [&](int i, int word) {
      const uint32_t four = zeros[i] ^ 0x80808080u, zero = ptx::pack_f16(kByteZero, kByteZero);
      const uint32_t low = ptx::select_bytes(four, 0x64646464u, 0x4140);
      const uint32_t high = ptx::select_bytes(four, 0x64646464u, 0x4342);
      *reinterpret_cast<uint2*>(to + L::kUnpackedZeros + 8 * word) = {ptx::sub_f16x2(low, zero),
                                                                      ptx::sub_f16x2(high, zero)};
      if constexpr (kCompensated) {
        *reinterpret_cast<uint2*>(to + L::kUnpackedMeans + 8 * word) = {ptx::sub_f16x2(low, mean_offset[2 * i]),
                                                                        ptx::sub_f16x2(high, mean_offset[2 * i + 1])};
      }
    });
    sync_team();
    uint16_t by_column[kGathers];
#pragma unroll
    for (int i = 0; i < kGathers; ++i) by_column[i] = read<uint16_t>(to + gather[i]);
#pragma unroll
    for (int i = 0; i < kGathers; ++i) {
      const int first = i * L::kTeamThreads;
      if (first + L::kTeamThreads <= S::kColumns || first + member() < S::kColumns) {
        // 32 columns never cross a skew.
        const int at = L::kPaired ? Columns::skewed(2 * (first + member())) : Columns::skewed(2 * first) + 2 * lane;
        *reinterpret_cast<uint16_t*>(to + L::kColumnScales + at) = by_column[i];
      }
    }
    sync_team();
    return any;
  }

  // For each row of q the part of the score that all tokens share: with q' = q * scale rounded, as codes see it,
  // sum q' * zero, and what rounding took from sum q * scale * (zero + mean of the codes). It is sums[0] + sums[3] of
  // the lanes g = row, the others are garbage: operand A is q' and below what it lost, even columns of B are zeros, odd
  // ones zeros with the mean. Where nothing is compensated, each half has half of the channels.
  LOGQUANT_DEVICE void channel_sums(const unsigned char* unpacked, float (&sums)[kScoreTiles][4]) const {
    const unsigned char* const zeros = unpacked + (kCompensated && g % 2 ? L::kUnpackedMeans : L::kUnpackedZeros);
#pragma unroll
    for (int quad = 0; quad < L::kChannelQuads; ++quad) {
      A4 scale, zero;
      read_channels(scale, unpacked, quad);
      if constexpr (kCompensated) {
        read_channels(zero, zeros, quad);
      } else {
        const uint2 two = read<uint2>(zeros + 2 * quad_channel(quad, whole_quad(quad) ? g % 2 * 2 : 0));
        zero[0] = two.x, zero[1] = two.y;
      }
#pragma unroll
      for (int u = 0; u < kScoreTiles; ++u) {
        A4 q, rounded, lost;
        read_query(q, L::kQuery, L::kQueryTable, u, quad);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          rounded[i] = ptx::mul_f16x2(q[i], scale[i]);
          if constexpr (kCompensated) lost[i] = ptx::mul_sub_f16x2(q[i], scale[i], rounded[i]);
        }
        if constexpr (kCompensated) {
          ptx::mma<__half>(sums[u], {rounded[0], lost[0], rounded[1], lost[1]}, {zero[0], zero[1]});
          if (whole_quad(quad)) {
            ptx::mma<__half>(sums[u], {rounded[2], lost[2], rounded[3], lost[3]}, {zero[2], zero[3]});
          }
        } else {
          ptx::mma<__half>(sums[u], {rounded[0], rounded[2], rounded[1], rounded[3]}, {zero[0], zero[1]});
        }
      }
    }
  }

  // S, and for each row of q the part of the score that all tokens share.
  LOGQUANT_DEVICE void scores(const unsigned char* stage, const unsigned char* unpacked,
                              float (&s)[kScoreTiles][kKeyTiles][4], float (&constant)[kScoreTiles][2]) {
    constexpr bool kCompensatedHere = kCompensated && !S::kFitted;
    const unsigned char* const scale_row = S::kFitted ? unpacked + L::kColumnScales : stage + L::kKeyParams;
    float of_channels[kScoreTiles][4] = {};
    if constexpr (S::kFitted) channel_sums(unpacked, of_channels);
    A4 minus = {};
    if constexpr (kCompensatedHere) put(minus, read<uint4>(shared + L::kKeyMinus));
    uint32_t q[kScoreTiles][4 * Columns::kQuads];  // q' = q * scale * 2^-(b*i)
    float zero_even[kScoreTiles][4], zero_odd[kScoreTiles][4], mean_even[kScoreTiles][4], mean_odd[kScoreTiles][4];
#pragma unroll
    for (int u = 0; u < kScoreTiles; ++u) {
#pragma unroll
      for (int i = 0; i < 4; ++i) zero_even[u][i] = zero_odd[u][i] = mean_even[u][i] = mean_odd[u][i] = 0.0f;
#pragma unroll
      for (int i = 0; i < kKeyTiles; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) s[u][i][k] = 0.0f;
      }
    }
    const unsigned char* const rows = stage + (g / 2) * L::kKeyPitch + g % 2 * 4 * L::kKeyWords;
#pragma unroll
    for (int quad = 0; quad < Columns::kQuads; ++quad) {
      A4 scale, zero;
      read_quad(scale, scale_row, 4 * quad);
      if constexpr (!S::kFitted) read_quad(zero, stage + L::kKeyParams + L::kKeyZeros, 4 * quad);
#pragma unroll
      for (int u = 0; u < kScoreTiles; ++u) {
        A4 original = {}, reduced = {};
        if constexpr (L::kQueryInRegisters) {
#pragma unroll
          for (int i = 0; i < 4; ++i) original[i] = query_pairs[4 * quad + i], reduced[i] = scaled_pairs[4 * quad + i];
        } else {
          if (!S::kFitted) read_query(original, L::kQuery, L::kQueryTable, u, quad);
          read_query(reduced, L::kScaledQuery, L::kTable, u, quad);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) q[u][4 * quad + i] = ptx::mul_f16x2(reduced[i], scale[i]);
        constexpr bool kHeld = L::kQueryInRegisters;
        const B2 even = {original[0], original[kHeld ? 2 : 1]}, odd = {original[kHeld ? 1 : 2], original[3]};
        if constexpr (!S::kFitted) {
          ptx::mma<__half>(zero_even[u], zero, even);
          ptx::mma<__half>(zero_odd[u], zero, odd);
        }
        if constexpr (kCompensatedHere) {
          ptx::mma<__half>(mean_even[u], scale, even);
          ptx::mma<__half>(mean_odd[u], scale, odd);
          const B2 first = {q[u][4 * quad], q[u][4 * quad + 1]}, second = {q[u][4 * quad + 2], q[u][4 * quad + 3]};
          ptx::mma<__half>(mean_even[u], minus, first);
          if (4 * quad + 2 < Columns::kCount) ptx::mma<__half>(mean_odd[u], minus, second);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i) code_scores(rows + 16 * i * L::kKeyWords, i, q, s);
#pragma unroll
    for (int u = 0; u < kScoreTiles; ++u) {
      const float total = of_channels[u][0] + of_channels[u][3];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (S::kFitted) {
          constant[u][r] = __shfl_sync(ptx::kFullMask, total, 8 * t + 4 * r);
        } else {
          constant[u][r] = zero_even[u][r] + zero_odd[u][2 + r];
          if constexpr (kCompensated)
            constant[u][r] = fmaf(kKeyMean, mean_even[u][r] + mean_odd[u][2 + r], constant[u][r]);
        }
      }
    }
  }

  // The m-tile i of S.
  LOGQUANT_DEVICE void code_scores(const unsigned char* tile, int i,
                                   const uint32_t (&q)[kScoreTiles][4 * Columns::kQuads],
                                   float (&s)[kScoreTiles][kKeyTiles][4]) const {
    uint32_t words[2][KeyWords::kCount];
#pragma unroll
    for (int h = 0; h < 2; ++h) read_key_words(words[h], tile + 8 * h * L::kKeyWords);
#pragma unroll
    for (int w = 0; w < KeyWords::kCount; ++w) {
      const uint32_t x = words[0][w], y = words[1][w], x8 = x >> 8, y8 = y >> 8;
      constexpr int b = S::kKeyBits;
      const int first = KeyWords::pairs_before(w), end = KeyWords::pairs_before(w + 1);
#pragma unroll
      for (int n = 0; n < end - first; n += 2) {
        const A4 codes = {code_pair<b>(x, x8, n), code_pair<b>(y, y8, n), code_pair<b>(x, x8, n + 1),
                          code_pair<b>(y, y8, n + 1)};
#pragma unroll
        for (int u = 0; u < kScoreTiles; ++u) {
          const B2 rows_of_q = {q[u][first + n], q[u][first + n + 1]};
          ptx::mma<__half>(s[u][i], codes, rows_of_q);
        }
      }
    }
  }

  LOGQUANT_DEVICE void read_key_words(uint32_t (&to)[KeyWords::kCount], const unsigned char* row) const {
    constexpr int whole = KeyWords::kWhole;
    const unsigned char* const own = row + t * 4 * whole;
    if constexpr (whole % 4 == 0 && L::kKeyWords % 4 == 0) {
#pragma unroll
      for (int w = 0; w < whole; w += 4) put(to + w, read<uint4>(own + 4 * w));
    } else if constexpr (whole % 2 == 0 && L::kKeyWords % 2 == 0) {
#pragma unroll
      for (int w = 0; w < whole; w += 2) {
        const uint2 two = read<uint2>(own + 4 * w);
        to[w] = two.x;
        to[w + 1] = two.y;
      }
    } else {
#pragma unroll
      for (int w = 0; w < whole; ++w) to[w] = read<uint32_t>(own + 4 * w);
    }
    if constexpr (KeyWords::kHalf) to[whole] = read<uint32_t>(row + 4 * (4 * whole + t / 2)) >> 8 * (t % 2);
    if constexpr (KeyWords::kQuarter) to[KeyWords::kCount - 1] = read<uint32_t>(row + 4 * (L::kKeyWords - 1)) >> 4 * t;
  }

  // -inf where a row does not see a slot, even if the key holds a NaN; bit 4i + k of `hidden` says so of element k of
  // the m-tile i.
  LOGQUANT_DEVICE void mask_scores(float (&score)[kScoreTiles][kKeyTiles][4], int first,
                                   uint32_t (&hidden)[kScoreTiles]) const {
#pragma unroll
    for (int u = 0; u < kScoreTiles; ++u) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_score_row() + 8 * u + 2 * t + r;
        if (row >= row_total) continue;
        const Row where = row_of(a, batch, kv_head, row);
#pragma unroll
        for (int i = 0; i < kKeyTiles; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int token = S::kTokens / 4 * (g / 2) + 4 * i + 2 * h + g % 2;
            float& x = score[u][i][2 * h + r];
            x = seen_score(a, where, first + token, x);
            if (x == -INFINITY) hidden[u] |= 1u << (4 * i + 2 * h + r);
          }
        }
      }
    }
  }

  // Moves the reference to where this page's largest weight, with its scale, is 2^8.
  LOGQUANT_DEVICE void move_reference(const float (&score)[kScoreTiles][kKeyTiles][4], uint32_t largest_scales,
                                      float (&factors)[kScoreTiles][2]) {
    float scale = fmaxf(Operand<__half>::low(largest_scales), Operand<__half>::high(largest_scales));
    scale = fmaxf(scale, __shfl_xor_sync(ptx::kFullMask, scale, 1));
    scale = fmaxf(scale, __shfl_xor_sync(ptx::kFullMask, scale, 2));
    const float margin = static_cast<float>(max(static_cast<int>(__float_as_uint(scale) >> 23) - 126, 0)) - 8.0f;
#pragma unroll
    for (int u = 0; u < kScoreTiles; ++u) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float most = score[u][0][r];
#pragma unroll
        for (int i = 0; i < kKeyTiles; ++i) most = fmaxf(most, fmaxf(score[u][i][r], score[u][i][2 + r]));
        const float moved = fmaxf(fmaxf(top[u][r], max_over_tokens(most) + margin), kLowest);
        factors[u][r] = ptx::exp2(top[u][r] - moved);
        top[u][r] = moved;
        sums_even[u][r] *= factors[u][r];
        sums_odd[u][2 + r] *= factors[u][r];
        if constexpr (L::kScalesApart) means_even[u][r] *= factors[u][r], means_odd[u][2 + r] *= factors[u][r];
        rescale(u, r, factors[u][r]);
      }
    }
  }
  LOGQUANT_DEVICE void rescale(int u, int r, float factor) {
#pragma unroll
    for (int j = u * L::kOwnTiles; j < (u + 1) * L::kOwnTiles; ++j) out[j][r] *= factor, out[j][2 + r] *= factor;
  }

  // p' of the n-th group of the other warp of a pair, for this warp's rows.
  LOGQUANT_DEVICE uint4* box(int n, int from) const {
    return reinterpret_cast<uint4*>(shared + L::kPassed) + (from * L::kOwnGroups + n) * (kTokenPairs / 4 * 32) + lane;
  }
  LOGQUANT_DEVICE void pass(int n, const uint32_t (&p)[kTokenPairs]) const {
#pragma unroll
    for (int i = 0; i < kTokenPairs; i += 4) box(n, half)[i / 4 * 32] = {p[i], p[i + 1], p[i + 2], p[i + 3]};
  }
  LOGQUANT_DEVICE void take_passed(uint32_t (&p)[kTokenPairs], int n) const {
#pragma unroll
    for (int i = 0; i < kTokenPairs; i += 4) put(p + i, box(n, 1 - half)[i / 4 * 32]);
  }
  // Where a reference has moved.
  LOGQUANT_DEVICE void exchange_factors(const float (&own)[2]) {
    float* const factors = reinterpret_cast<float*>(shared + L::kPassedFactors) + 2 * t;
    if (g == 0) factors[8 * half] = own[0], factors[8 * half + 1] = own[1];
    sync_team();
#pragma unroll
    for (int r = 0; r < 2; ++r) rescale(1, r, factors[8 * (1 - half) + r]);
  }

  // sum p * zero and sum p (and, for the compensation, sum p * scale).
  LOGQUANT_DEVICE void parameter_sums(const uint32_t (&p)[kScoreTiles][kTokenPairs],
                                      const uint32_t (&hidden)[kScoreTiles]) {
    const unsigned char* const row = shared + (row_offset + (stage_at & row_in_stage));
    A4 words[kTokenPairs / 4];
#pragma unroll
    for (int n = 0; n < kTokenPairs; n += 4) put(words[n / 4], read<uint4>(row + 4 * n));
    if (!a.plain) spare_hidden_zeros(words, hidden);
#pragma unroll
    for (int n = 0; n < kTokenPairs; n += 4) {
#pragma unroll
      for (int u = 0; u < kScoreTiles; ++u) {
        const B2 even = {p[u][n], p[u][n + 2]}, odd = {p[u][n + 1], p[u][n + 3]};
        ptx::mma<__half>(sums_even[u], words[n / 4], even);
        ptx::mma<__half>(sums_odd[u], words[n / 4], odd);
        if constexpr (L::kScalesApart) {
          A4 scale_words;
          put(scale_words, read<uint4>((row_in_stage ? row - 2 * S::kGroups * S::kTokens : row) + 4 * n));
          ptx::mma<__half>(means_even[u], scale_words, even);
          ptx::mma<__half>(means_odd[u], scale_words, odd);
        }
      }
    }
  }

  // A NaN times a weight of 0 would be a NaN for rows that do not see the token. So NaNs are taken out of the operands,
  // and rows that do see one get a NaN into the sum of its group.
  LOGQUANT_DEVICE static bool take_nans(A4& words, A4& nans) {  // nans: 1 where one was
    bool any = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t mask = not_finite<__half>(words[i]);
      nans[i] = mask & Operand<__half>::kOnes;
      words[i] &= ~mask;
      any = any || mask != 0;
    }
    return any;
  }
  LOGQUANT_DEVICE static void seen_tokens(const uint32_t (&hidden)[kScoreTiles],
                                          uint32_t (&seen)[kScoreTiles][kTokenPairs]) {
#pragma unroll
    for (int u = 0; u < kScoreTiles; ++u) {
#pragma unroll
      for (int i = 0; i < kTokenPairs; ++i) {
        const uint32_t pair = hidden[u] >> 2 * i;
        seen[u][i] = ptx::movmatrix_trans(ptx::pack_f16(pair & 1 ? 0.0f : 1.0f, pair & 2 ? 0.0f : 1.0f));
      }
    }
  }
  LOGQUANT_DEVICE void spoil_sums(const A4& nans, int n, const uint32_t (&seen)[kScoreTiles][kTokenPairs]) {
#pragma unroll
    for (int u = 0; u < kScoreTiles; ++u) {
      float count_even[4] = {}, count_odd[4] = {};
      ptx::mma<__half>(count_even, nans, {seen[u][n], seen[u][n + 2]});
      ptx::mma<__half>(count_odd, nans, {seen[u][n + 1], seen[u][n + 3]});
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (count_even[r] + count_odd[2 + r] > 0.0f) sums_even[u][r] = NAN;
      }
    }
  }
  LOGQUANT_DEVICE void spare_hidden_zeros(A4 (&words)[kTokenPairs / 4], const uint32_t (&hidden)[kScoreTiles]) {
    A4 nans[kTokenPairs / 4];
    bool any = false;
#pragma unroll
    for (int n = 0; n < kTokenPairs / 4; ++n) any = take_nans(words[n], nans[n]) || any;
    if (!__any_sync(ptx::kFullMask, any)) return;
    uint32_t seen[kScoreTiles][kTokenPairs];
    seen_tokens(hidden, seen);
#pragma unroll
    for (int n = 0; n < kTokenPairs / 4; ++n) spoil_sums(nans[n], 4 * n, seen);
  }
  // Fitted values have no zeros: their poisoned scales are NaNs, also where there are no masks, for p' that are NaN
  // would spoil the sums of all rows and groups.
  LOGQUANT_DEVICE void spare_hidden_scales(unsigned char* scales, const uint32_t (&hidden)[kScoreTiles]) {
    uint32_t seen[kScoreTiles][kTokenPairs];
    seen_tokens(hidden, seen);
    const auto each_quad = [&](const auto& f) __attribute__((always_inline)) {
#pragma unroll
      for (int i = 0; i < S::kGroups * kTokenPairs; i += 4) {
        const int group = i / kTokenPairs, n = i % kTokenPairs;
        uint4* const quad = reinterpret_cast<uint4*>(scales + 2 * group * S::kTokens + 4 * (t * kTokenPairs + n));
        A4 words, nans;
        put(words, *quad);
        take_nans(words, nans);
        f(quad, words, nans, group, n);
      }
    };
    each_quad([&](uint4*, const A4&, A4& nans, int group, int n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) nans[i] = g == group ? nans[i] : 0;
      spoil_sums(nans, n, seen);
    });
    sync_team();
    if (g == 0 && half == 0) {
      each_quad(
          [](uint4* quad, const A4& words, const A4&, int, int) { *quad = {words[0], words[1], words[2], words[3]}; });
    }
    sync_team();
  }

  // Adds the sum of weights (L::kMinus or kOnes) times pairs to even[r] + odd[2 + r] of the lanes g = row: they read
  // the weights, and others zeros beside them.
  LOGQUANT_DEVICE void sum_pairs(float (&even)[4], float (&odd)[4], int weights, int row, const uint32_t* pairs) const {
    A4 operand;
    put(operand, read<uint4>(shared + 16 * g + (weights - 16 * row)));
#pragma unroll
    for (int n = 0; n < kTokenPairs; n += 4) {
      ptx::mma<__half>(even, operand, {pairs[n], pairs[n + 1]});
      ptx::mma<__half>(odd, operand, {pairs[n + 2], pairs[n + 3]});
    }
  }

  // Minus sum p' * 2^(b*i), into the row of the group's scales (fitted: of the group): the compensation of p', or what
  // the mean of the codes, which fitted values are stored without, has added.
  LOGQUANT_DEVICE void subtract_rounded(int u, int group, const uint32_t* scaled) {
    const int row = L::kScalesApart || S::kFitted ? group : S::kGroups + 1 + group;
    sum_pairs(L::kScalesApart ? means_even[u] : sums_even[u], L::kScalesApart ? means_odd[u] : sums_odd[u], L::kMinus,
              row, scaled);
  }

  // The m-tile j of O: word(f, h) is the f-th word of this lane's channel in the tile's half h.
  template <class Operands, class Word>
  LOGQUANT_DEVICE void value_tile(int j, const Operands& operand, const Word& word) {
    constexpr int b = S::kValueBits;
    constexpr int kPairs = ValueWords::kWhole ? 16 / b : 8 / b;  // of a word that are this lane's
#pragma unroll
    for (int f = 0; f < ValueWords::kCount; ++f) {
      uint32_t x = word(f, 0), y = word(f, 1);
      if constexpr (!ValueWords::kWhole) x >>= 8 * (t % 2), y >>= 8 * (t % 2);
      const uint32_t x8 = x >> 8, y8 = y >> 8;
#pragma unroll
      for (int n = 0; n < kPairs; n += 2) {
        const A4 codes = {code_pair<b>(x, x8, n), code_pair<b>(y, y8, n), code_pair<b>(x, x8, n + 1),
                          code_pair<b>(y, y8, n + 1)};
#pragma unroll
        for (int u = 0; u < tiles; ++u) {
          const B2 weights = {operand(u, f * kPairs + n), operand(u, f * kPairs + n + 1)};
          ptx::mma<__half>(out[u * L::kOwnTiles + j], codes, weights);
        }
      }
    }
  }

  LOGQUANT_DEVICE void finish_pages() {
    float* const passed = reinterpret_cast<float*>(shared + L::kPassedZeros);  // [group][row]
#pragma unroll
    for (int u = 0; u < kScoreTiles; ++u) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float total = sums_even[u][r] + sums_odd[u][2 + r];
        const float apart = means_even[u][r] + means_odd[u][2 + r];
        sum[u][r] = __shfl_sync(ptx::kFullMask, total, 4 * S::kGroups + t);
#pragma unroll
        for (int group = 0; group < S::kGroups; ++group) {
          float zeros = __shfl_sync(ptx::kFullMask, total, 4 * group + t);
          if constexpr (S::kFitted) {
            zeros *= kValueMean;
          } else if constexpr (kCompensated) {
            const float mean = L::kScalesApart ? __shfl_sync(ptx::kFullMask, apart, 4 * group + t)
                                               : __shfl_sync(ptx::kFullMask, total, 4 * (S::kGroups + 1 + group) + t);
            zeros = fmaf(kValueMean, mean, zeros);
          }
          if constexpr (L::kPaired) {
            if (g == 0) passed[16 * group + 8 * half + 2 * t + r] = zeros;
          } else {
            finish_group(u, group, r, zeros);
          }
        }
      }
    }
    if constexpr (L::kPaired) {
      sync_team();
#pragma unroll
      for (int i = 0; i < 2 * L::kOwnGroups; ++i) {
        const int u = i % 2, n = i / 2;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          finish_group(u, n, r, passed[16 * (n + half * L::kNextGroups) + 8 * (u ^ half) + 2 * t + r]);
        }
      }
    }
  }
  LOGQUANT_DEVICE void finish_group(int u, int n, int r, float zeros) {
#pragma unroll
    for (int j = n * L::kTilesOfGroup; j < (n + 1) * L::kTilesOfGroup; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& x = out[u * L::kOwnTiles + j][2 * h + r];
        x = fmaf(x, kUnit, zeros) * (S::kFitted ? 1.0f / kScaleUnit : 1.0f);
      }
    }
  }

  // --------------------------------------------------------------------------------------------------------- window
  // Exact tokens, 16 at a time and warp, straight from global memory. A lane takes 8 of every 32 channels, then 4 of
  // the last 16: the same order of k for q and keys. Of a pair, each warp does its eight rows alone.
  template <int dim>
  struct WindowRow {
    static constexpr int kWords = dim / 8;
    uint32_t words[kWords];
    LOGQUANT_DEVICE void load(const T* row, int t, bool ok) {
#pragma unroll
      for (int n = 0; n < kWords; ++n) words[n] = 0;
      if (!ok) return;
#pragma unroll
      for (int c = 0; c + 32 <= dim; c += 32) put(words + c / 8, ptx::load<uint4>(row + c + 8 * t));
      if constexpr (dim % 32 != 0) {
        const uint2 two = ptx::load<uint2>(row + dim - 16 + 4 * t);
        words[kWords - 2] = two.x;
        words[kWords - 1] = two.y;
      }
    }
  };

  // Channels that are read at once. Where q would take too many registers, it is read again (from L1) for each 16
  // tokens, and keys and values come in parts.
  static constexpr bool kKeepQuery = S::kDim * kScoreTiles <= 128;
  template <int dim>
  static constexpr int kChunk = kKeepQuery ? dim : 64;

  // Calls f<first, count>() for each part of the channels.
  template <int dim, int first = 0, class F>
  LOGQUANT_DEVICE static void for_chunks(const F& f) {
    constexpr int count = dim - first < kChunk<dim> ? dim - first : kChunk<dim>;
    f.template operator()<first, count>();
    if constexpr (first + count < dim) for_chunks<dim, first + count>(f);
  }

  LOGQUANT_DEVICE void window_part(int split) {
    WindowRow<kKeepQuery ? S::kDim : 16> q[kScoreTiles];
    float totals[kScoreTiles][4];
#pragma unroll
    for (int u = 0; u < kScoreTiles; ++u) {
      if constexpr (kKeepQuery) {
        const int row = first_score_row() + 8 * u + g;
        q[u].load(query(min(row, row_total - 1)), t, row < row_total);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) totals[u][i] = 0.0f;
    }
    const int tokens = used(a, batch, 1);
    const int first_slot = static_cast<int>(a.page_count) * S::kTokens;
    const T* const keys =
        static_cast<const T*>(a.window_k.data) + batch * a.window_k.batch_stride + kv_head * a.window_k.head_stride;
    const T* const values =
        static_cast<const T*>(a.window_v.data) + batch * a.window_v.batch_stride + kv_head * a.window_v.head_stride;
    for (int base = (split * L::kTeams + team) * 16; base < tokens; base += a.window_splits * L::kTeams * 16) {
      float scores[kScoreTiles][4] = {};
      for_chunks<S::kDim>([&]<int first, int count>() __attribute__((always_inline)) {
        WindowRow<count> k[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int token = base + g + 8 * h;
          k[h].load(keys + token * a.window_k.token_stride + first, t, token < tokens);
        }
#pragma unroll
        for (int u = 0; u < kScoreTiles; ++u) {
          WindowRow<kKeepQuery ? 16 : count> part;
          if constexpr (!kKeepQuery) {
            const int row = first_score_row() + 8 * u + g;
            part.load(query(min(row, row_total - 1)) + first, t, row < row_total);
          }
          const uint32_t* const own = kKeepQuery ? q[u].words : part.words;
#pragma unroll
          for (int n = 0; n < count / 8; n += 2) {
            const A4 operand = {k[0].words[n], k[1].words[n], k[0].words[n + 1], k[1].words[n + 1]};
            const B2 rows = {own[n], own[n + 1]};
            ptx::mma<T>(scores[u], operand, rows);
          }
        }
      });
      B2 p[kScoreTiles];
      B2 seen[kScoreTiles];
#pragma unroll
      for (int u = 0; u < kScoreTiles; ++u) {
        float (&s)[4] = scores[u];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = base + g + 8 * (i / 2), row = first_score_row() + 8 * u + 2 * t + i % 2;
          s[i] *= a.scale * kLog2e;
          if (!a.plain && token < tokens && row < row_total) {
            s[i] = seen_score(a, row_of(a, batch, kv_head, row), first_slot + token, s[i]);
          }
          if (token >= tokens) s[i] = -INFINITY;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          seen[u][h] = Operand<T>::pack(s[2 * h] == -INFINITY ? 0.0f : 1.0f, s[2 * h + 1] == -INFINITY ? 0.0f : 1.0f);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float most = max_over_tokens(fmaxf(s[r], s[2 + r]));
          const float moved = fmaxf(fmaxf(top[u][r], most), kLowest), factor = ptx::exp2(top[u][r] - moved);
          top[u][r] = moved;
          totals[u][r] *= factor;
#pragma unroll
          for (int j = 0; j < L::kTiles; ++j)
            out[u * L::kTiles + j][r] *= factor, out[u * L::kTiles + j][2 + r] *= factor;
          s[r] = ptx::exp2(s[r] - moved);
          s[2 + r] = ptx::exp2(s[2 + r] - moved);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) p[u][h] = ptx::movmatrix_trans(Operand<T>::pack(s[2 * h], s[2 * h + 1]));
        const A4 ones = {Operand<T>::kOnes, Operand<T>::kOnes, Operand<T>::kOnes, Operand<T>::kOnes};
        ptx::mma<T>(totals[u], ones, p[u]);
      }
      for_chunks<S::kValueDim>([&]<int first, int count>() __attribute__((always_inline)) {
        WindowRow<count> v[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int token = base + g + 8 * h;
          v[h].load(values + token * a.window_v.token_stride + first, t, token < tokens);
        }
        if (!a.plain) spare_hidden_values<first / 16>(v, seen);
#pragma unroll
        for (int j = 0; j < count / 16;
             ++j) {  // an m-tile: words 2j (rows 0-7) and 2j + 1 (rows 8-15) of lanes' values
          const A4 operand = {ptx::movmatrix_trans(v[0].words[2 * j]), ptx::movmatrix_trans(v[0].words[2 * j + 1]),
                              ptx::movmatrix_trans(v[1].words[2 * j]), ptx::movmatrix_trans(v[1].words[2 * j + 1])};
#pragma unroll
          for (int u = 0; u < kScoreTiles; ++u) ptx::mma<T>(out[u * L::kTiles + first / 16 + j], operand, p[u]);
        }
      });
    }
#pragma unroll
    for (int u = 0; u < kScoreTiles; ++u) {
#pragma unroll
      for (int r = 0; r < 2; ++r) sum[u][r] = totals[u][r];
    }
  }

  // As spare_hidden, for values of the window that are not finite.
  template <int first_tile, int count>
  LOGQUANT_DEVICE void spare_hidden_values(WindowRow<count> (&v)[2], const B2 (&seen_tokens)[kScoreTiles]) {
    bool any = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int n = 0; n < count / 8; ++n) {
        any = any || not_finite<T>(v[h].words[n]) != 0;
      }
    }
    if (!__any_sync(ptx::kFullMask, any)) return;
    B2 seen[kScoreTiles];
#pragma unroll
    for (int u = 0; u < kScoreTiles; ++u) {
#pragma unroll
      for (int h = 0; h < 2; ++h) seen[u][h] = ptx::movmatrix_trans(seen_tokens[u][h]);
    }
#pragma unroll
    for (int j = 0; j < count / 16; ++j) {
      A4 bad;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t& word = v[i / 2].words[2 * j + i % 2];
        const uint32_t mask = not_finite<T>(word);
        word &= ~mask;
        bad[i] = ptx::movmatrix_trans(mask & Operand<T>::kOnes);
      }
#pragma unroll
      for (int u = 0; u < kScoreTiles; ++u) {
        float spoiled[4] = {};
        ptx::mma<T>(spoiled, bad, seen[u]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (spoiled[i] > 0.0f) out[u * L::kTiles + first_tile + j][i] = NAN;
        }
      }
    }
  }

  // ---------------------------------------------------------------------------------------------------------- merge
  // The warps' parts into one, and that to global memory.
  LOGQUANT_DEVICE void merge() {
    const int split = ptx::block_x();
    const bool pages = split < a.page_splits;
    constexpr int kRows = 8 * tiles, kDim = S::kValueDim;
    float* const parts = reinterpret_cast<float*>(shared);  // [team][row][channel]
    float* const sums = parts + L::kTeams * kRows * kDim;   // [team][row][2]
    __syncthreads();
    const auto put_tile = [&](const float (&x)[4], int row, int low_channel, int high_channel) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        parts[(row + r) * kDim + low_channel] = x[r];
        parts[(row + r) * kDim + high_channel] = x[2 + r];
      }
    };
    const int own_row = team * kRows + 2 * t;
#pragma unroll
    for (int u = 0; u < kScoreTiles; ++u) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = own_row + 8 * (u + half) + r;
        if (g == 0) sums[2 * row] = top[u][r], sums[2 * row + 1] = sum[u][r];
      }
    }
#pragma unroll
    for (int i = 0; i < tiles * L::kOwnTiles; ++i) {
      if (pages) {  // of a pair, the other's rows come second
        const int u = i / L::kOwnTiles ^ half, j = L::first_warps_tile(i % L::kOwnTiles) + half * L::kNextTiles;
        put_tile(out[i], own_row + 8 * u, page_channel(j, 0), page_channel(j, 1));
      } else {
        const int u = i / L::kTiles + half, j = i % L::kTiles;
        put_tile(out[i], own_row + 8 * u, window_channel(j, 0), window_channel(j, 1));
      }
    }
    __syncthreads();
    // A warp takes 64 channels of a row at a time, a lane two that are 32 apart.
    constexpr int kBlocks64 = (kDim + 63) / 64;
    for (int i = warp; i < min(kRows, row_total - first_row) * kBlocks64; i += L::kWarps) {
      const int row = i / kBlocks64, block = i % kBlocks64;
      float reference = -INFINITY, total = 0.0f;
#pragma unroll
      for (int w = 0; w < L::kTeams; ++w) reference = fmaxf(reference, sums[2 * (w * kRows + row)]);
      const float finite = reference == -INFINITY ? 0.0f : reference;
      float x[2] = {};
#pragma unroll
      for (int w = 0; w < L::kTeams; ++w) {
        const float factor = ptx::exp2(sums[2 * (w * kRows + row)] - finite);
        total += factor * sums[2 * (w * kRows + row) + 1];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int c = 64 * block + 32 * h + lane;
          if (c < kDim) x[h] += factor * parts[(w * kRows + row) * kDim + c];
        }
      }
      if (S::kFitted && pages) rotate(x);
      const int64_t at = partial_index(a, batch, kv_head, split, first_row + row);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int c = 64 * block + 32 * h + lane;
        if (c < kDim) a.partial_out[at * kDim + c] = x[h];
      }
      if (block == 0 && lane == 0) {
        a.partial_sums[2 * at] = reference;
        a.partial_sums[2 * at + 1] = total;
      }
    }
  }

  // Undoes the rotation of fitted values, of 64 channels.
  LOGQUANT_DEVICE void rotate(float (&x)[2]) const {
    constexpr int kBlock = S::kFormat.hadamard_block();
#pragma unroll
    for (int step = 1; step < (kBlock < 32 ? kBlock : 32); step *= 2) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float other = __shfl_xor_sync(ptx::kFullMask, x[h], step);
        x[h] = other + (lane & step ? -x[h] : x[h]);
      }
    }
    if constexpr (kBlock == 64) {
      const float low = x[0] + x[1];
      x[1] = x[0] - x[1];
      x[0] = low;
    }
    constexpr float kFactor = kBlock == 64 ? 0.125f : kBlock == 32 ? 0.17677669529663687f : 0.25f;
    static_assert(!S::kFitted || kBlock >= 16);
#pragma unroll
    for (int h = 0; h < 2; ++h) x[h] *= kFactor;
  }

  LOGQUANT_DEVICE int page_channel(int j, int h) const {
    return j / 2 < L::kWideBlocks ? 32 * (j / 2) + 4 * g + 2 * (j % 2) + h : 16 * j + 2 * g + h;
  }
  LOGQUANT_DEVICE int window_channel(int j, int h) const {
    return j / 2 < S::kValueDim / 32 ? 32 * (j / 2) + 8 * (g / 2) + 4 * (j % 2) + 2 * h + g % 2
                                     : 16 * j + 4 * (g / 2) + 2 * h + g % 2;
  }

  static constexpr int kGathers = S::kFitted ? (S::kColumns + L::kTeamThreads - 1) / L::kTeamThreads : 1;

  const AttendArgs& a;
  unsigned char* const shared;
  const int warp, half, team;  // half: which of a pair
  const int lane, g, t;
  const int batch, kv_head;
  const int first_row, row_total;
  // Of rows 8 * tile + 2t and 2t + 1.
  float top[kScoreTiles][2];  // the reference exponent
  float sum[kScoreTiles][2];  // of weights relative to it
  float code_factor[kScoreTiles][2], constant_factor[kScoreTiles][2];
  float out[tiles * L::kOwnTiles][4];  // by tile of rows (a pair: its own first), then of channels
  float sums_even[kScoreTiles][4] = {}, sums_odd[kScoreTiles][4] = {};
  float means_even[kScoreTiles][4] = {}, means_odd[kScoreTiles][4] = {};
  uint32_t query_pairs[L::kQueryInRegisters ? 4 * Columns::kQuads : 1];
  uint32_t scaled_pairs[L::kQueryInRegisters ? 4 * Columns::kQuads : 1];
  int gather[kGathers];
  uint32_t mean_offset[2 * L::kZeroRounds];
  const unsigned char* source = nullptr;  // of the next page, this lane's 16 bytes, kReach further
  int64_t source_step = 0;
  uint32_t stage_at = 0;  // of the page at hand, from `shared` on
  uint32_t unpacked_at = 0;
  // Where this lane's row of the product of parameters and p lies: in the stage (all bits set), or in the constants.
  uint32_t row_in_stage = 0, row_offset = 0;
};

// Blocks that shared memory and registers leave room for on an SM: 228 KB (163 KB on sm_80 hold fewer 4-bit pages
// still).
template <class T, class S, int tiles>
using KernelLayout = Layout<S, std::is_same_v<T, __half>, tiles>;

// Before Hopper ptxas spills a register of one format at three blocks, so that has two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class S>
inline constexpr bool kTwoBlocks = S::kFitted && S::kValueDim == 112;
#else
template <class S>
inline constexpr bool kTwoBlocks = false;
#endif

template <class T, class S, int tiles>
inline constexpr int kBlocks =
    KernelLayout<T, S, tiles>::kPaired || (S::kValueDim <= 64 && tiles == 1)                                    ? 4
    : !kTwoBlocks<S> && S::kValueDim <= 128 && tiles == 1 && 3 * KernelLayout<T, S, tiles>::kBytes <= 200 << 10 ? 3
                                                                                                                : 2;

template <class T, class S, int tiles>
__global__ void __launch_bounds__(KernelLayout<T, S, tiles>::kThreads, kBlocks<T, S, tiles>)
    attend_pages(__grid_constant__ const AttendArgs args) {
  LOGQUANT_DYNAMIC_SHARED(shared);
  TensorAttention<T, S, tiles>(args, shared).run();
}

template <class T, class S, int tiles>
cudaError_t launch_tiles(const AttendArgs& args, cudaStream_t stream) {
  using L = KernelLayout<T, S, tiles>;
  constexpr int kRows = 8 * tiles;
  const dim3 grid(args.page_splits + args.window_splits, args.batch * args.kv_heads,
                  (row_count(args) + kRows - 1) / kRows);
  return ptx::launch(&attend_pages<T, S, tiles>, grid, L::kThreads, L::kBytes, stream, args);
}

template <class T, class S>
cudaError_t launch(const AttendArgs& args, cudaStream_t stream) {
  return row_count(args) > 8 ? launch_tiles<T, S, 2>(args, stream) : launch_tiles<T, S, 1>(args, stream);
}

}  // namespace tensor
}  // namespace logquant::cuda

// One source per format (attend_*.cu) defines its kernels with this, and attend_tensor.cu lists them.
#define LOGQUANT_TENSOR_KERNELS(name, ...)                                                                  \
  namespace logquant::cuda {                                                                                \
  extern const TensorKernel name[2];                                                                        \
  const TensorKernel name[2] = {                                                                            \
      {Shape<__VA_ARGS__>::kFormat, Dtype::kFloat16, &tensor::launch<__half, Shape<__VA_ARGS__>>},          \
      {Shape<__VA_ARGS__>::kFormat, Dtype::kBFloat16, &tensor::launch<__nv_bfloat16, Shape<__VA_ARGS__>>}}; \
  }

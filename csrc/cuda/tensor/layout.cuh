// The order in which lanes hold a page's words and elements, and where everything lies in shared memory.
//
// Layout, of shared memory: constants; tables of q where registers do not hold it; 8-bit parameters that each team has
// unpacked; what the warps of a pair exchange; the rings of pages. Rows that lanes read side by side fall on different
// banks by their pitch or a skew. At the end all of it is the teams' parts of the output (merge.cuh).
// Parallelisation: a lane owns whole words of a token's columns where there are four or more, then halves, then
// quarters of a word; of values, the page_tokens / 4 tokens from page_tokens / 4 * t on. q', p' and the parameters
// follow this order of k by being read in it. Memory traffic: none of its own.
#pragma once

#include "shape.cuh"

namespace logquant::cuda::tensor {

inline constexpr int kStages = 2;  // of a ring

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }
// The smallest multiple of 16 from x on that is `remainder` modulo 128: for rows that must fall on different banks.
constexpr int pitch(int x, int remainder) {
  return round_up(x, 16) + ((remainder - round_up(x, 16)) % 128 + 128) % 128;
}

// How `count` pairs of 16-bit elements fall to the four lanes t: first `whole` (of whole words), then `half`, then
// `quarter` consecutive pairs each. Pair n of lane t is at byte offset(t, n) of a row of 4 * count pairs.
template <int count, int bits>
struct LanePairs {
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
struct LaneWords {
  static constexpr int kWhole = words / 4, kHalf = words / 2 % 2, kQuarter = words % 2;
  static constexpr int kCount = kWhole + kHalf + kQuarter, kPairs = words * 16 / bits / 4;
  static LOGQUANT_DEVICE constexpr int pairs_before(int w) {
    constexpr int kPerWord = 16 / bits;
    return w <= kWhole ? w * kPerWord : w == kCount ? kPairs : kWhole * kPerWord + kPerWord / 2;
  }
};

// The channels of q that a lane has of fitted formats, where they are no columns: 4 consecutive pairs of each 32, 2 of
// the last 16.
template <int dim>
struct LaneChannels {
  static constexpr int kQuads = (dim + 31) / 32;
  static LOGQUANT_DEVICE constexpr bool whole(int quad) { return 32 * quad + 32 <= dim; }
  static LOGQUANT_DEVICE constexpr int channel(int t, int quad, int i) {
    return 32 * quad + (whole(quad) ? 8 : 4) * t + 2 * i;
  }
};

// Offsets and sizes in bytes, of K, a Config.
template <class K>
struct Layout {
  using S = typename K::PageShape;

  // A stage of a ring is a page: key codes, key parameters, value codes, value parameters.
  static constexpr int kKeyWords = S::kColumns * S::kKeyBits / 32, kValueRows = S::kTokens * S::kValueBits / 32;
  using KeyWords = LaneWords<kKeyWords, S::kKeyBits>;
  using ValueWords = LaneWords<kValueRows, S::kValueBits>;
  using Columns = LanePairs<S::kColumns / 8, S::kKeyBits>;
  using Channels = LaneChannels<S::kDim>;
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
  static constexpr int kFineDigits = kValueParams + (S::kFitted ? 0 : 4 * S::kGroups * S::kTokens);
  static constexpr int kStage = kFineDigits + S::kFineValues * S::kValueDim / 4;

  // Fitted parameters of a team's page as fp16: the scales of keys and of values, zeros, zeros with the mean of the
  // codes, and scales by column.
  static constexpr int kUnpackedZeros = 2 * kScales, kUnpackedMeans = kUnpackedZeros + 2 * S::kDim;
  static constexpr int kColumnScales = kUnpackedMeans + (K::kCompensated ? 2 * S::kDim : 0);
  static constexpr int kUnpackedBytes = round_up(kColumnScales + Columns::skewed(2 * S::kColumns), 16);

  // Constants: a row of ones, one of zeros; a quad of negative digit weights of values and one of ones, with seven
  // quads of zeros before and after each (sums.cuh); a quad of negative digit weights of keys. With fine values, a quad
  // of the negative digit weights of a word's last four pairs, also between zeros.
  static constexpr int kZeroRow = 2 * S::kTokens, kNegativeValueWeights = 4 * S::kTokens + 7 * 16;
  static constexpr int kOnes = kNegativeValueWeights + 8 * 16, kNegativeKeyWeights = kOnes + 8 * 16;
  static constexpr int kNegativeFineWeights = kNegativeKeyWeights + 8 * 16;
  static constexpr int kConstants = S::kFine ? kNegativeFineWeights + 8 * 16 : kNegativeKeyWeights + 16;

  // Tables of q. Of fitted formats, q by channel and q' by column; of plain ones, where they are the same, both by
  // column.
  static constexpr bool kQueryInRegisters = Columns::kCount <= 16 && K::kTiles == 1 && !S::kFitted;
  static constexpr int kScaledTable = Columns::kQuads * 512,
                       kQueryTable = S::kFitted ? Channels::kQuads * 512 : kScaledTable;
  static constexpr int kQuery = kConstants, kScaledQuery = kQuery + (kQueryInRegisters ? 0 : K::kTiles * kQueryTable);
  static constexpr int kUnpacked = kScaledQuery + (kQueryInRegisters ? 0 : K::kTiles * kScaledTable);

  // Pairs: p' of each warp's rows for the other's groups, how far references moved, and at the end sum p * zero.
  static constexpr int kExchangedWeights = kUnpacked + (S::kFitted ? K::kTeams * kUnpackedBytes : 0);
  static constexpr int kExchangedFactors = kExchangedWeights + (K::kPaired ? 2 * 16 * S::kTokens * K::kOwnGroups : 0);
  static constexpr int kExchangedZeros = kExchangedFactors + (K::kPaired ? 4 * 16 : 0);

  static constexpr int kRings = kExchangedZeros + (K::kPaired ? 4 * 16 * S::kGroups : 0);
  static constexpr int kRingBytes = kRings + K::kTeams * kStages * kStage;
  static constexpr int kMergeBytes = K::kTeams * K::kRows * (S::kValueDim + 2) * 4;
  static constexpr int kBytes = kRingBytes > kMergeBytes ? kRingBytes : kMergeBytes;
  static_assert(kRings % 16 == 0 && kStage % 16 == 0);
};

}  // namespace logquant::cuda::tensor

// What simd.h and tiles.h promise of an instruction set, against the same in plain numbers. Compiled once per set, as
// the kernels are; a set that this machine does not run is skipped.

#include "cpu/simd.h"

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

#include "cpu/tiles.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int kSkipped = 77;  // CMakeLists.txt

void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

bool same(float a, float b) { return a == b || (a != a && b != b); }

F32 only(int lane, float x, float others) {
  F32 v = splat(others);
  v[lane] = x;
  return v;
}

void test_floats() {
  const float numbers[] = {0.0f, 1.0f, -1.0f, 2.5f, -3e38f, 1e-40f, kInfinity, -kInfinity, kNan};
  for (const float a : numbers) {
    for (const float b : numbers) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const F32 x = only(lane, a, 1.0f), y = only(lane, b, 1.0f);
        check(same(min(x, y)[lane], a < b ? a : b), "min");
        check(same(max(x, y)[lane], a > b ? a : b), "max");
        check(any_above(x, y) == !(a <= b), "any_above");
        if (a >= 0.0f && b == b) check(max_abs(x, y)[lane] == std::fmax(a, std::fabs(b)), "max_abs");
      }
    }
  }
  F32 counted;
  for (int i = 0; i < kLanes; ++i) counted[i] = static_cast<float>(i + 1);
  check(reduce(counted, Min{}) == 1.0f && reduce(counted, Max{}) == kLanes, "reduce");
  check(reduce(counted, Add{}) == kLanes * (kLanes + 1) / 2, "reduce");
  for (int i = -70000; i <= 70000; ++i) {
    const float x = 0.5f * static_cast<float>(i);  // half of them ties
    check(round_to_int(splat(x))[i & (kLanes - 1)] == static_cast<int>(std::nearbyint(x)), "round_to_int");
    check(to_float(splat(i))[i & (kLanes - 1)] == static_cast<float>(i), "to_float");
    if (i >= 0) check(round_positive(splat(x))[i & (kLanes - 1)] == std::nearbyint(x), "round_positive");
  }
}

void test_bfloat16_dots() {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 1000; ++round) {
    F32 sum;
    I32 a, b;
    double expected[kLanes], size[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      sum[i] = normal(random);
      expected[i] = sum[i];
      size[i] = std::fabs(sum[i]);
      a[i] = b[i] = 0;
      for (int half = 0; half < 32; half += 16) {
        const auto x = std::bit_cast<uint32_t>(normal(random)) >> 16, y = std::bit_cast<uint32_t>(normal(random)) >> 16;
        a[i] = static_cast<int32_t>(static_cast<uint32_t>(a[i]) | x << half);
        b[i] = static_cast<int32_t>(static_cast<uint32_t>(b[i]) | y << half);
        const double product = static_cast<double>(std::bit_cast<float>(x << 16)) * std::bit_cast<float>(y << 16);
        expected[i] += product;
        size[i] += std::fabs(product);
      }
    }
    const F32 dots = dot_bfloat16(sum, a, b);
    for (int i = 0; i < kLanes; ++i) check(std::fabs(dots[i] - expected[i]) <= 3e-7 * size[i], "dot_bfloat16");
  }
}

void test_reductions() {
  F32 v[kLanes];
  I32 integers[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) {
      v[i][j] = static_cast<float>((i + 1) * (j == i ? 100 : 1));
      integers[i][j] = j == i ? -i : i;
    }
  }
  const F32 sums = reduce_lanes<kLanes>(v, Add{}), pair = reduce_lanes<2>(v, Add{});
  for (int i = 0; i < kLanes; ++i) {
    check(sums[i] == static_cast<float>((i + 1) * (99 + kLanes)), "reduce_lanes");
    check(reduce_lanes<1>(v + i, Max{})[0] == static_cast<float>(100 * (i + 1)), "reduce_lanes of one");
    check(reduce_lanes<1>(integers + i, Add{})[0] == (kLanes - 2) * i, "reduce_lanes of integers");
    check(max(integers[i], splat(0))[i] == 0 && max(splat(i), integers[i])[0] == i, "max of integers");
  }
  check(pair[0] == static_cast<float>(99 + kLanes) && pair[1] == 2 * pair[0], "reduce_lanes of two");
}

void test_transpose() {
  F32 square[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) square[i][j] = static_cast<float>(100 * i + j);
  }
  transpose(square);
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) check(square[i][j] == static_cast<float>(100 * j + i), "transpose");
  }
}

// Of tables that fit into registers and of others.
void test_tables() {
  std::mt19937 random(3);
  for (const int size : {kLanes, 64, 80, 128, 256}) {
    int32_t table[256], index[48], out[48];
    float floats[256], floats_out[48];
    for (int i = 0; i < 256; ++i) {
      table[i] = static_cast<int32_t>(random());
      floats[i] = static_cast<float>(table[i]);
    }
    for (int32_t& i : index) i = static_cast<int32_t>(random() % static_cast<unsigned>(size));
    lookup(table, size, index, 48, out);
    lookup(floats, size, index, 48, floats_out);
    for (int i = 0; i < 48; ++i) {
      check(out[i] == table[index[i]] && floats_out[i] == floats[index[i]], "lookup in a table");
    }
  }
}

float float_of(int half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float magnitude = exponent == 31  ? (fraction == 0 ? kInfinity : kNan)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

int stored_half(float x) {
  float in[kLanes];
  uint16_t out[kLanes];
  for (float& lane : in) lane = x;  // splat(-0.0f) is 0.0f
  store_half(out, load(in));
  for (const uint16_t half : out) check(half == out[0], "store_half: lanes differ");
  return out[0];
}

void test_halves() {
  for (int first = 0; first < 0x10000; first += kLanes) {
    uint16_t halves[kLanes];
    for (int i = 0; i < kLanes; ++i) halves[i] = static_cast<uint16_t>(first + i);
    const F32 x = load_half(halves);
    for (int i = 0; i < kLanes; ++i) {
      check(same(x[i], float_of(first + i)) && std::signbit(x[i]) == (first + i >= 0x8000), "load_half");
    }
  }
  // Around the border between each half and the next one; past the largest comes infinity.
  for (int half = 0; half < 0x7C00; ++half) {
    const float next = half == 0x7BFF ? 65536.0f : float_of(half + 1), border = 0.5f * (float_of(half) + next);
    for (const int sign : {0, 0x8000}) {
      const float factor = sign == 0 ? 1.0f : -1.0f;
      check(stored_half(factor * float_of(half)) == (half | sign), "store_half: exact");
      check(stored_half(factor * std::nextafter(border, 0.0f)) == (half | sign), "store_half: down");
      check(stored_half(factor * border) == ((half + (half & 1)) | sign), "store_half: to even");
      check(stored_half(factor * std::nextafter(border, kInfinity)) == ((half + 1) | sign), "store_half: up");
    }
  }
  check(stored_half(kInfinity) == 0x7C00 && stored_half(-3e38f) == 0xFC00, "store_half: infinity");
  check(stored_half(kNan) == kPoison, "store_half: NaN");
}

void test_integers() {
  std::mt19937 random(0);
  int32_t table[64];
  for (int32_t& x : table) x = static_cast<int32_t>(random());
  int32_t padded[kTablePadding] = {};  // lookup may read all of it
  std::memcpy(padded, table, sizeof(table));
  const int32_t (&eight)[8] = *reinterpret_cast<const int32_t (*)[8]>(table);
  for (int round = 0; round < 1000; ++round) {
    I32 sum, codes, index;
    for (int i = 0; i < kLanes; ++i) {
      sum[i] = static_cast<int32_t>(random() >> 4);
      codes[i] = static_cast<int32_t>(random() & 0x00FF00FF);
      index[i] = static_cast<int32_t>(random() % 64);
    }
    const int32_t pair = static_cast<int32_t>(random());
    const int low = static_cast<int16_t>(pair), high = pair >> 16;
    const I32 dots = dot_pairs(sum, codes, splat(pair)), gathered = gather(table, index),
              found = lookup(eight, index & 7);
    // Unaligned.
    const auto* const bytes = reinterpret_cast<const uint8_t*>(table) + 1 + round % 8;
    const auto* const shorts = reinterpret_cast<const uint16_t*>(table) + 1 + round % 8;
    const I32 wide_bytes = load_u8(bytes), wide_shorts = load_u16(shorts);
    const I32 signed_bytes = load_s8(reinterpret_cast<const int8_t*>(bytes));
    uint8_t narrow_bytes[kLanes];
    uint16_t narrow_shorts[kLanes + 1];
    store_u8(narrow_bytes, gathered);
    store_u16(narrow_shorts + 1, gathered);
    const I32 small = gathered >> 16, halves = shift_halves_right(gathered, 14);
    int16_t packed[2 * kLanes + 1];
    store_s16(packed + 1, small, dots >> 16);
    int32_t picked[kLanes], at[kLanes];
    store(at, index);
    lookup(padded, 64, at, kLanes, picked);
    for (int i = 0; i < kLanes; ++i) {
      check(dots[i] == sum[i] + (codes[i] & 0xFFFF) * low + (codes[i] >> 16) * high, "dot_pairs");
      check(gathered[i] == table[index[i]], "gather");
      check(found[i] == table[index[i] & 7] && picked[i] == table[index[i]], "lookup");
      check(packed[1 + i] == small[i] && packed[1 + kLanes + i] == dots[i] >> 16, "store_s16");
      const uint32_t word = static_cast<uint32_t>(gathered[i]);
      check(halves[i] == static_cast<int32_t>(word >> 30 << 16 | (word & 0xFFFF) >> 14), "shift_halves_right");
      uint16_t expected;
      std::memcpy(&expected, shorts + i, sizeof(expected));
      check(wide_bytes[i] == bytes[i] && wide_shorts[i] == expected, "load_u8 or load_u16");
      check(signed_bytes[i] == static_cast<int8_t>(bytes[i]), "load_s8");
      check(narrow_bytes[i] == static_cast<uint8_t>(gathered[i]), "store_u8");
      check(narrow_shorts[i + 1] == static_cast<uint16_t>(gathered[i]), "store_u16");
    }
  }
}

#if defined(LOGQUANT_TILES)
// Tiles of several shapes; what lies around them in memory is neither added nor overwritten.
template <int m, int k, int n>
void test_tiles(std::mt19937& random) {
  TileConfig config;
  config.rows[1] = config.rows[6] = m;
  config.row_bytes[1] = config.row_bytes[6] = 4 * n;
  config.rows[4] = m;
  config.row_bytes[4] = 4 * k;
  config.rows[7] = k;
  config.row_bytes[7] = 4 * n;
  uint8_t a[m][4 * k + 3], b[k][4 * n + 5];
  int32_t sums[m][n + 1];
  for (auto& row : a) {
    for (uint8_t& x : row) x = static_cast<uint8_t>(random());
  }
  for (auto& row : b) {
    for (uint8_t& x : row) x = static_cast<uint8_t>(random());
  }
  for (auto& row : sums) {
    for (int32_t& x : row) x = static_cast<int32_t>(random());
  }
  int32_t before[m][n + 1], zeros[m][n];
  std::memcpy(before, sums, sizeof(sums));
  std::memset(zeros, 1, sizeof(zeros));
  tile_configure(config);
  tile_load<1>(sums, sizeof(sums[0]));
  tile_load<4>(a, sizeof(a[0]));
  tile_load<7>(b, sizeof(b[0]));
  tile_dot<1, 4, 7>();
  tile_store<1>(sums, sizeof(sums[0]));
  tile_zero<6>();
  tile_store<6>(zeros, sizeof(zeros[0]));
  tile_release();
  for (int row = 0; row < m; ++row) {
    for (int column = 0; column <= n; ++column) {
      uint32_t expected = static_cast<uint32_t>(before[row][column]);
      for (int i = 0; column < n && i < 4 * k; ++i) {
        expected += static_cast<uint32_t>(static_cast<int8_t>(a[row][i]) * b[i / 4][4 * column + i % 4]);
      }
      check(static_cast<uint32_t>(sums[row][column]) == expected, "tile_dot");
      check(column == n || zeros[row][column] == 0, "tile_zero");
    }
  }
}
#endif

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA

#define LOGQUANT_NAME_OF(isa) #isa
#define LOGQUANT_NAME(isa) LOGQUANT_NAME_OF(isa)

int main() {
  using namespace logquant::cpu;
  using namespace logquant::cpu::LOGQUANT_ISA;
  bool available = false;
  for (const Kernels* set : available_kernels()) available |= std::strcmp(set->name, LOGQUANT_NAME(LOGQUANT_ISA)) == 0;
  if (available) use_kernels(LOGQUANT_NAME(LOGQUANT_ISA));  // which asks the system, where that is needed
  if (!available) return kSkipped;
  test_floats();
  test_halves();
  test_integers();
  test_bfloat16_dots();
  test_reductions();
  test_transpose();
  test_tables();
#if defined(LOGQUANT_TILES)
  std::mt19937 random(1);
  for (int round = 0; round < 100; ++round) {
    test_tiles<16, 16, 16>(random);
    test_tiles<4, 16, 16>(random);
    test_tiles<3, 5, 7>(random);
    test_tiles<1, 1, 1>(random);
  }
#endif
  std::puts("1 passed, 0 failed");
  return 0;
}

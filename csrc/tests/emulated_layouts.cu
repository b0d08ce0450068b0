// The emulated mma, ldmatrix and movmatrix against the layouts of fragment_layouts.h, on small integers: all sums
// exact.
#include <cstdio>
#include <vector>

#include "../cuda/ptx.cuh"
#include "fragment_layouts.h"

namespace ptx = logquant::cuda::ptx;

namespace {

struct Matrices {
  float a[16][16], b[16][8], c[16][8], d[16][8];
  uint16_t rows[32][8], loaded[32][8], transposed[32][8];
  uint16_t moved[8][8], moved_back[8][8];
};

uint32_t pair(const uint16_t* x) { return x[0] | uint32_t{x[1]} << 16; }

__global__ void run(Matrices* m) {
  LOGQUANT_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x;
  uint16_t a[8], b[4];
  float d[4];
  for (int i = 0; i < 8; ++i) {
    const layouts::Position p = layouts::a(lane, i);
    a[i] = static_cast<uint16_t>(ptx::pack_f16(m->a[p.row][p.column], 0.0f));
  }
  for (int i = 0; i < 4; ++i) {
    const layouts::Position p = layouts::b(lane, i), q = layouts::c(lane, i);
    b[i] = static_cast<uint16_t>(ptx::pack_f16(m->b[p.row][p.column], 0.0f));
    d[i] = m->c[q.row][q.column];
  }
  ptx::mma<__half>(d, {pair(a), pair(a + 2), pair(a + 4), pair(a + 6)}, {pair(b), pair(b + 2)});
  for (int i = 0; i < 4; ++i) {
    const layouts::Position p = layouts::c(lane, i);
    m->d[p.row][p.column] = d[i];
  }

  std::memcpy(shared + 16 * lane, m->rows[lane], 16);
  __syncwarp();
  uint32_t words[4];
  ptx::ldmatrix(words, shared + 16 * lane);
  std::memcpy(m->loaded[lane], words, sizeof words);
  ptx::ldmatrix_trans(words, shared + 16 * lane);
  std::memcpy(m->transposed[lane], words, sizeof words);

  // One matrix as ldmatrix gives it becomes what ldmatrix.trans gives of it, and back.
  uint16_t moved[2];
  for (int i = 0; i < 2; ++i) {
    const layouts::Position p = layouts::ldmatrix(lane, i);
    moved[i] = m->rows[p.row][p.column];
  }
  const uint32_t turned = ptx::movmatrix_trans(pair(moved)), back = ptx::movmatrix_trans(turned);
  for (int i = 0; i < 2; ++i) {
    const layouts::Position p = layouts::ldmatrix_trans(lane, i), q = layouts::ldmatrix(lane, i);
    m->moved[p.row][p.column] = static_cast<uint16_t>(turned >> 16 * i);
    m->moved_back[q.row][q.column] = static_cast<uint16_t>(back >> 16 * i);
  }
}

int failures = 0;
void check(bool ok, const char* what) {
  if (ok) return;
  std::printf("wrong: %s\n", what);
  ++failures;
}

}  // namespace

int main() {
  Matrices m{};
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) m.a[i][j] = static_cast<float>((i * 31 + j * 7) % 23 - 11);
    for (int j = 0; j < 8; ++j) m.b[i][j] = static_cast<float>((i * 13 + j * 5) % 19 - 9);
    for (int j = 0; j < 8; ++j) m.c[i][j] = static_cast<float>(i * 8 + j);
  }
  for (int i = 0; i < 32; ++i) {
    for (int j = 0; j < 8; ++j) m.rows[i][j] = static_cast<uint16_t>(8 * i + j + 1);
  }
  if (ptx::launch(run, 1, 32, 512, nullptr, &m) != cudaSuccess) return 1;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float want = m.c[i][j];
      for (int k = 0; k < 16; ++k) want += m.a[i][k] * m.b[k][j];
      check(m.d[i][j] == want, "mma");
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const layouts::Position p = layouts::ldmatrix(lane, i), q = layouts::ldmatrix_trans(lane, i);
      check(m.loaded[lane][i] == m.rows[p.row][p.column], "ldmatrix");
      check(m.transposed[lane][i] == m.rows[q.row][q.column], "ldmatrix.trans");
    }
  }
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) {
      check(m.moved[i][j] == m.rows[i][j], "movmatrix");
      check(m.moved_back[i][j] == m.rows[i][j], "movmatrix, twice");
    }
  }
  return failures != 0;
}

// Which element of a matrix the 16-bit (of accumulators: 32-bit) element of a lane's registers is.
#pragma once

namespace layouts {

struct Position {
  int row, column;
};
// Of mma.m16n8k16: a [16][16], b [16][8], c and d [16][8].
Position a(int lane, int element);
Position b(int lane, int element);
Position c(int lane, int element);
// Of ldmatrix.x4: row r of matrix i counts as row 8i + r.
Position ldmatrix(int lane, int element);
Position ldmatrix_trans(int lane, int element);

}  // namespace layouts

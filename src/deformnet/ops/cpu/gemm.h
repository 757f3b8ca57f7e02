// The matrix product inside the kernels: a block of rows times a panel of columns.
#pragma once

#include "common.h"

namespace deformnet::DEFORMNET_ISA {

// Columns of a panel: B is packed panel by panel, kPanel<A> columns wide, row after row.
template <class A>
constexpr int kPanel = kTileVectors * kLanes<A>;

// Numbers of the summed dimension that are taken at a time: a panel of so many rows stays in the nearest
// cache while all rows of the left factor pass by.
constexpr int64_t kPanelDepth = 256;
// How many rows of a panel ahead memory is asked for them.
constexpr int64_t kPrefetchRows = 64;

// The left factor A[row, s, k]: `segments` runs of `depth` numbers along the summed dimension. The step
// from row to row is known to the compiler, which has too few registers for as many pointers.
template <class A, ptrdiff_t row_stride>
struct LeftFactor {
  const A* data;
  ptrdiff_t k_stride;
  ptrdiff_t segment_stride;
  int64_t segments, depth;
};

// C[rows, n_valid] (+)= A * panel, rows <= kTileRows. The sum over k of one element has the same order
// whatever the number of rows, so results do not depend on how rows are split into blocks or threads.
// Not inlined: within a longer function the compiler runs out of registers.
template <class A, int rows, ptrdiff_t row_stride>
__attribute__((noinline)) void multiply_block(const LeftFactor<A, row_stride>& left, const A* panel, A* c, ptrdiff_t c_stride,
                           int n_valid, bool accumulate) {
  constexpr int lanes = kLanes<A>;
  Vec<A> total[rows][kTileVectors];
  A partial[kPanel<A>] = {};
  const bool full = n_valid == kPanel<A>;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const A* from = c + r * c_stride;
    if (accumulate && !full) {
      for (int j = 0; j < n_valid; ++j) partial[j] = from[j];
      from = partial;
    }
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v)
      total[r][v] = accumulate ? load(from + v * lanes) : Vec<A>{};
  }
  const ptrdiff_t k_stride = row_stride == 1 ? left.k_stride : 1;
  for (int64_t s = 0; s < left.segments; ++s) {
    const A* a = left.data + s * left.segment_stride;
    for (int64_t k = 0; k < left.depth; ++k, a += k_stride, panel += kPanel<A>) {
      Vec<A> b[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        b[v] = load(panel + v * lanes);
        if (v * kVectorBytes % kCacheLine == 0)
          __builtin_prefetch(panel + v * lanes + kPrefetchRows * kPanel<A>);
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Vec<A> x = a[r * row_stride] - Vec<A>{};
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) total[r][v] += x * b[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    A* to = full ? c + r * c_stride : partial;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) store(to + v * lanes, total[r][v]);
    if (!full)
      for (int j = 0; j < n_valid; ++j) c[r * c_stride + j] = partial[j];
  }
}

template <class A, ptrdiff_t row_stride, int rows = kTileRows>
inline void multiply_few(int wanted, const LeftFactor<A, row_stride>& left, const A* panel, A* c,
                         ptrdiff_t c_stride, int n_valid, bool accumulate) {
  if (wanted == rows) {
    multiply_block<A, rows>(left, panel, c, c_stride, n_valid, accumulate);
  } else if constexpr (rows > 1) {
    multiply_few<A, row_stride, rows - 1>(wanted, left, panel, c, c_stride, n_valid, accumulate);
  }
}

// The same for any number of rows, in blocks of nearly equal height, and any depth.
template <class A, ptrdiff_t row_stride>
inline void multiply(int64_t rows, LeftFactor<A, row_stride> left, const A* panel, A* c,
                     ptrdiff_t c_stride, int n_valid, bool accumulate) {
  const ptrdiff_t k_stride = row_stride == 1 ? left.k_stride : 1;
  if (left.segment_stride == left.depth * k_stride) {  // they follow one another in memory: one run
    left.depth *= left.segments;
    left.segments = 1;
  }
  // A part is of one long segment, or of several short ones.
  const int64_t parts = ceil_div(left.depth, kPanelDepth), part = ceil_div(left.depth, parts);
  const int64_t together = most<int64_t>(1, kPanelDepth / left.depth);
  for (int64_t s = 0; s < left.segments; s += together)
    for (int64_t k = 0; k < left.depth; k += part) {
      LeftFactor<A, row_stride> now = left;
      now.data = left.data + s * left.segment_stride + k * k_stride;
      now.segments = least(together, left.segments - s);
      now.depth = least(part, left.depth - k);
      const A* from = panel + (s * left.depth + k) * kPanel<A>;
      A* to = c;
      int64_t rest = rows;
      for (int64_t blocks = ceil_div(rows, kTileRows); blocks > 0; --blocks) {
        const int64_t height = ceil_div(rest, blocks);
        multiply_few<A, row_stride>(int(height), now, from, to, c_stride, n_valid,
                                    accumulate || s > 0 || k > 0);
        now.data += height * row_stride;
        to += height * c_stride;
        rest -= height;
      }
    }
}

}  // namespace deformnet::DEFORMNET_ISA

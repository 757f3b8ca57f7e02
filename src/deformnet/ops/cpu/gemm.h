// The matrix product inside the kernels: a block of rows times a panel of columns.
#pragma once

#include "common.h"

namespace deformnet::DEFORMNET_ISA {

// Operands have type E: either A, the type of the sums, or pairs of bfloat16 along the summed dimension.

// Columns of a panel: B is packed panel by panel, kPanel<E> columns wide, row after row.
template <class E>
constexpr int kPanel = kTileVectors * kLanes<E>;

// Writes row k of column `lane` of a panel.
template <class A>
inline void put(A* panel, int64_t k, int64_t lane, A value) {
  panel[k * kPanel<A> + lane] = value;
}
inline void put(Pair* panel, int64_t k, int64_t lane, float value) {
  Pair& pair = panel[k / 2 * kPanel<Pair> + lane];
  write(k % 2 ? &pair.second : &pair.first, value);
}

// The same for columns whose rows are written in order: the second of a pair is zero until it is written.
template <class A>
inline void append(A* panel, int64_t k, int64_t lane, A value) {
  put(panel, k, lane, value);
}
inline void append(Pair* panel, int64_t k, int64_t lane, float value) {
  put(panel, k, lane, value);
  if (k % 2 == 0) put(panel, k + 1, lane, 0.0f);
}
// The same for a vector of columns, from `lane` on.
template <class A>
inline void append_vector(A* panel, int64_t k, int64_t lane, Vec<A> values) {
  store(panel + k * kPanel<A> + lane, values);
}
#if defined(__AVX512BF16__)
inline void append_vector(Pair* panel, int64_t k, int64_t lane, Vec<float> values) {
  Pair* pairs = panel + k / 2 * kPanel<Pair> + lane;
  Vec<Pair> rounded = __builtin_convertvector(HalfWords(_mm512_cvtneps_pbh(values)), Vec<Pair>);
  if (k % 2) rounded = load(pairs) | rounded << 16;
  store(pairs, rounded);
}
#endif

// Numbers of the summed dimension that are taken at a time: a panel of so many rows stays in the nearest
// cache while all rows of the left factor pass by.
constexpr int64_t kPanelDepth = 256;
// How many rows of a panel ahead memory is asked for them.
constexpr int64_t kPrefetchRows = 64;

// The left factor A[row, s, k]: `segments` runs of `depth` numbers along the summed dimension. The step
// from row to row is known to the compiler, which has too few registers for as many pointers.
template <class E, ptrdiff_t row_stride>
struct LeftFactor {
  const E* data;
  ptrdiff_t k_stride;
  ptrdiff_t segment_stride;
  int64_t segments, depth;
};

// C[rows, n_valid] (+)= A * panel, rows <= kTileRows. The sum over k of one element has the same order
// whatever the number of rows, so results do not depend on how rows are split into blocks or threads.
// Not inlined: within a longer function the compiler runs out of registers.
template <int rows, class A, class E, ptrdiff_t row_stride>
__attribute__((noinline)) void multiply_block(const LeftFactor<E, row_stride>& left, const E* panel, A* c,
                                              ptrdiff_t c_stride, int n_valid, bool accumulate) {
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
    const E* a = left.data + s * left.segment_stride;
    for (int64_t k = 0; k < left.depth; ++k, a += k_stride, panel += kPanel<E>) {
      Vec<E> b[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        b[v] = load(panel + v * lanes);
        if (v * kVectorBytes % kCacheLine == 0)
          __builtin_prefetch(panel + v * lanes + kPrefetchRows * kPanel<E>);
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Vec<E> x = broadcast(a + r * row_stride);
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) total[r][v] = multiply_add(x, b[v], total[r][v]);
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

template <int rows = kTileRows, class A, class E, ptrdiff_t row_stride>
inline void multiply_few(int wanted, const LeftFactor<E, row_stride>& left, const E* panel, A* c,
                         ptrdiff_t c_stride, int n_valid, bool accumulate) {
  if (wanted == rows) {
    multiply_block<rows>(left, panel, c, c_stride, n_valid, accumulate);
  } else if constexpr (rows > 1) {
    multiply_few<rows - 1>(wanted, left, panel, c, c_stride, n_valid, accumulate);
  }
}

// The same for any number of rows, in blocks of nearly equal height, and any depth.
template <class A, class E, ptrdiff_t row_stride>
inline void multiply(int64_t rows, LeftFactor<E, row_stride> left, const E* panel, A* c,
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
      LeftFactor<E, row_stride> now = left;
      now.data = left.data + s * left.segment_stride + k * k_stride;
      now.segments = least(together, left.segments - s);
      now.depth = least(part, left.depth - k);
      const E* from = panel + (s * left.depth + k) * kPanel<E>;
      A* to = c;
      int64_t rest = rows;
      for (int64_t blocks = ceil_div(rows, kTileRows); blocks > 0; --blocks) {
        const int64_t height = ceil_div(rest, blocks);
        multiply_few(int(height), now, from, to, c_stride, n_valid, accumulate || s > 0 || k > 0);
        now.data += height * row_stride;
        to += height * c_stride;
        rest -= height;
      }
    }
}

// Products process kRowStep<E> rows of the left factor at a time; the length of the summed dimension is a multiple of
// kSumStep<E>.
template <class E>
constexpr int64_t kRowStep = kTileRows;
template <class E>
constexpr int64_t kSumStep = kTogether<E>;

// ------------------------------------------------------------------- products of bfloat16 on tiles

#if defined(__AMX_BF16__)
constexpr int64_t kTileStep = 16;  // rows of a tile, and pairs in each row
template <>
inline constexpr int64_t kRowStep<Pair> = 2 * kTileStep;
template <>
inline constexpr int64_t kSumStep<Pair> = 2 * kTileStep;

// Configures eight tiles of 16 rows of 64 bytes: four for sums, two for the left factor, two for a panel. A thread may
// use tiles only while its TileUser exists.
struct TileUser {
  TileUser() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    _tile_loadconfig(&config);
  }
  ~TileUser() { _tile_release(); }
};

// `multiply` on tiles; the depth of a segment must be a multiple of kTileStep. Rows are computed in blocks of 16, so up
// to 15 rows past the end are read from the left factor and written to C.
template <ptrdiff_t row_stride>
__attribute__((noinline)) void multiply(int64_t rows, const LeftFactor<Pair, row_stride>& left, const Pair* panel,
                                        float* c, ptrdiff_t c_stride, int n_valid, bool accumulate) {
  constexpr ptrdiff_t lanes = 16, width = 2 * lanes, float_bytes = sizeof(float);
  static_assert(kPanel<float> == width);
  constexpr int64_t most_steps = kPanelDepth / kTileStep;
  float whole[2 * lanes * width];
  const bool full = n_valid == width;
  const int64_t of_segment = left.depth / kTileStep, steps = left.segments * of_segment;
  for (int64_t begin = 0; begin < steps; begin += most_steps) {
    const int64_t count = least(most_steps, steps - begin);
    const bool add = accumulate || begin > 0;
    const Pair* from[most_steps];
    for (int64_t i = 0; i < count; ++i)
      from[i] = left.data + (begin + i) / of_segment * left.segment_stride + (begin + i) % of_segment * kTileStep;
    for (int64_t r = 0; r < rows; r += 2 * lanes) {
      const bool two = rows - r > lanes;
      float* sums = full ? c + r * c_stride : whole;
      const ptrdiff_t stride = full ? c_stride : width;
      const int64_t height = two ? 2 * lanes : lanes;
      if (!full && add)
        for (int64_t i = 0; i < height; ++i)
          std::memcpy(whole + i * width, c + (r + i) * c_stride, size_t(n_valid) * sizeof(float));
      asm volatile("" ::: "memory");  // the intrinsics do not say what they read
      if (add) {
        _tile_loadd(0, sums, stride * float_bytes);
        _tile_loadd(1, sums + lanes, stride * float_bytes);
        if (two) {
          _tile_loadd(2, sums + lanes * stride, stride * float_bytes);
          _tile_loadd(3, sums + lanes * stride + lanes, stride * float_bytes);
        }
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      const Pair* b = panel + begin * kTileStep * width;
      for (int64_t i = 0; i < count; ++i, b += kTileStep * width) {
        const Pair* a = from[i] + r * row_stride;
        _tile_loadd(4, a, row_stride * float_bytes);
        _tile_loadd(6, b, width * float_bytes);
        _tile_loadd(7, b + lanes, width * float_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
          _tile_loadd(5, a + lanes * row_stride, row_stride * float_bytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, sums, stride * float_bytes);
      _tile_stored(1, sums + lanes, stride * float_bytes);
      if (two) {
        _tile_stored(2, sums + lanes * stride, stride * float_bytes);
        _tile_stored(3, sums + lanes * stride + lanes, stride * float_bytes);
      }
      asm volatile("" ::: "memory");
      if (!full)
        for (int64_t i = 0; i < height; ++i)
          std::memcpy(c + (r + i) * c_stride, whole + i * width, size_t(n_valid) * sizeof(float));
    }
  }
}
#else
struct TileUser {};
#endif

}  // namespace deformnet::DEFORMNET_ISA

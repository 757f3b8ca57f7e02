// Emulates AMX tiles in C++, for sanitizers, which cannot check the memory accesses of tile instructions, and for
// processors with AVX512-BF16 but no AMX. Follows the definition of TDPBF16PS in Intel's manual, except that subnormal
// numbers are not flushed to zero.
#pragma once

#define __AMX_BF16__ 1

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace emulated {
struct Tiles {
  bool configured = false;
  uint32_t word[8][16][16];
};
inline thread_local Tiles tiles;

inline auto& tile(int number) {
  if (!tiles.configured) __builtin_trap();  // as the processor does
  return tiles.word[number];
}

template <class Address>
char* row(Address* base, ptrdiff_t stride, int i) {
  return const_cast<char*>(reinterpret_cast<const char*>(base)) + i * stride;
}

inline float number(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float first(uint32_t pair) { return number(pair << 16); }
inline float second(uint32_t pair) { return number(pair & 0xffff0000u); }

inline void multiply(int sums, int left, int right) {
  auto &c = tile(sums), &a = tile(left), &b = tile(right);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float of_first = 0, of_second = 0;
      for (int k = 0; k < 16; ++k) {
        of_first = std::fma(first(a[m][k]), first(b[k][n]), of_first);
        of_second = std::fma(second(a[m][k]), second(b[k][n]), of_second);
      }
      const float sum = number(c[m][n]) + (of_first + of_second);
      std::memcpy(&c[m][n], &sum, sizeof sum);
    }
}
template <class Address>
void load(int number, const Address* base, ptrdiff_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(tile(number)[i], row(base, stride, i), 64);
}

template <class Address>
void store(int number, Address* base, ptrdiff_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(row(base, stride, i), tile(number)[i], 64);
}

inline void zero(int number) { std::memset(tile(number), 0, sizeof(Tiles::word[0])); }
}  // namespace emulated

#define _tile_loadconfig(config) (void(config), void(emulated::tiles.configured = true))
#define _tile_release() void(emulated::tiles.configured = false)
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply

// Vectors as wide as the instruction set has them, number formats, and transposition.
//
// Included by every translation unit once per instruction set, inside a namespace of its own: nothing
// here may be a template of the standard library, or the linker could merge code for one instruction
// set into another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace deformnet::DEFORMNET_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 14, kTileVectors = 2;  // 28 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 of 16
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6, kTileVectors = 4;  // 24 of 32
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 4, kTileVectors = 2;  // 8 of 16
#endif

// ---------------------------------------------------------------------------------- numbers

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Two adjacent factors of a sum of products, together as wide as a float.
struct Pair {
  BFloat16 first, second;
};
template <class E>
constexpr int64_t kTogether = 1;
template <>
inline constexpr int64_t kTogether<Pair> = 2;

// The type in which numbers of a storage type are computed.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

// ---------------------------------------------------------------------------------- vectors

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  using integer = int32_t;
  typedef int32_t index __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  using integer = int64_t;
  typedef int64_t index __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<Pair> {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
// Integers of the same size.
template <class A>
using IndexVec = typename VectorOf<A>::index;
template <class A>
using Index = typename VectorOf<A>::integer;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <class A>
inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
inline Vec<A> broadcast(const A* p) {
  return *p - Vec<A>{};
}
inline Vec<Pair> broadcast(const Pair* p) {
  VectorOf<float>::integer bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits - Vec<Pair>{};
}

template <class A>
inline void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}

// Lane j of the result is lane pick[j] of a and b, concatenated.
template <class V, class I>
inline V shuffle(V a, V b, I pick) {
#ifdef __clang__
  // Clang's builtin only takes constants, but it compiles these loops, once unrolled, to one instruction as well.
  constexpr int n = sizeof(V) / sizeof a[0];
  V shuffled;
  for (int j = 0; j < n; ++j) shuffled[j] = pick[j] < n ? a[pick[j]] : b[pick[j] - n];
  return shuffled;
#else
  return __builtin_shuffle(a, b, pick);
#endif
}

// Halves the runs that are still to be summed in two vectors, and lays them side by side in one: runs of
// `stride` lanes, from a in the even places and from b in the odd ones.
template <class A, int stride>
inline Vec<A> fold(Vec<A> a, Vec<A> b) {
  constexpr int n = kLanes<A>;
  IndexVec<A> first, second;
  for (int j = 0; j < n; ++j) {
    first[j] = (j & stride) ? n + j - stride : j;
    second[j] = (j & stride) ? n + j : j + stride;
  }
  return shuffle(a, b, first) + shuffle(a, b, second);
}

// to[4 * i + j] = lane i of the j-th vector.
template <class A>
inline void store_side_by_side(Vec<A> a, Vec<A> b, Vec<A> c, Vec<A> d, A* to) {
  constexpr int n = kLanes<A>;
#pragma GCC unroll 4
  for (int part = 0; part < 4; ++part) {
    // The lanes of a and b, and of c and d, in their places in the result; then a choice between both.
    IndexVec<A> pick, merge;
    for (int k = 0; k < n; ++k) {
      const int lane = (part * n + k) / 4, which = (part * n + k) % 4;
      pick[k] = which % 2 ? n + lane : lane;
      merge[k] = which < 2 ? k : n + k;
    }
    store(to + part * n, shuffle(shuffle(a, b, pick), shuffle(c, d, pick), merge));
  }
}

// a * b + c, in one instruction where there is one, even where the compiler may not make one of two.
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

#if defined(__AVX512BF16__)
// The same with pairs of bfloat16: both products of each lane are added to c.
inline Vec<float> multiply_add(Vec<Pair> a, Vec<Pair> b, Vec<float> c) {
  return _mm512_dpbf16_ps(c, __m512bh(a), __m512bh(b));
}
#endif

// The same number by number, to the same bits.
inline float multiply_add(float a, float b, float c) {
#if defined(__AVX2__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline double multiply_add(double a, double b, double c) {
#if defined(__AVX2__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// The sum of a vector's lanes.
template <class A, int stride = kLanes<A> / 2>
inline A sum(Vec<A> v) {
  if constexpr (stride == 0) {
    return v[0];
  } else {
    IndexVec<A> other;
    for (int j = 0; j < kLanes<A>; ++j) other[j] = j ^ stride;
    return sum<A, stride / 2>(v + shuffle(v, v, other));
  }
}

// Lane i is the sum of the lanes of v[i], for as many vectors as a vector has lanes; these are lost.
template <class A, int stride = kLanes<A> / 2>
inline Vec<A> sum_each(Vec<A>* v) {
#pragma GCC unroll 8
  for (int i = 0; i < stride; ++i) v[i] = fold<A, stride>(v[i], v[i + stride]);
  if constexpr (stride == 1)
    return v[0];
  else
    return sum_each<A, stride / 2>(v);
}

// ---------------------------------------------------------------------------- number formats

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double read(double v) { return v; }
inline float read(float v) { return v; }
inline float read(BFloat16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
inline float read(Float16 v) {
#if defined(__AVX2__)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(v.bits)));
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &v, sizeof half);
  return half;
#else
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // Moving the fields into place leaves the exponent 112 too small; the product corrects it, and
  // turns subnormal numbers into normal ones on the way.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
#endif
}

inline void write(double* p, double v) { *p = v; }
inline void write(float* p, float v) { *p = v; }
inline void write(BFloat16* p, float v) {
  const uint32_t bits = float_to_bits(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  p->bits = v != v ? 0x7fc0u : uint16_t(rounded);
}
inline void write(Float16* p, float v) {
#if defined(__AVX2__)
  p->bits = uint16_t(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(v), _MM_FROUND_TO_NEAREST_INT)));
#elif defined(__aarch64__)
  const __fp16 half = v;
  std::memcpy(p, &half, sizeof half);
#else
  const uint32_t bits = float_to_bits(v), sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (v != v) {
    magnitude = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    magnitude = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the addition rounds at the last bit that stays
    magnitude = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    magnitude = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  p->bits = uint16_t(sign | magnitude);
#endif
}

// The bits of a vector of floats, and of as many half-precision numbers.
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));

// Whether T is stored as it is computed with.
template <class A, class T>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <class A, class T>
inline Vec<A> load_as(const T* p) {
  if constexpr (kSame<A, T>) {
    return load(p);
  } else if constexpr (kSame<T, BFloat16> && kSame<A, float>) {
    HalfWords halves;
    std::memcpy(&halves, p, sizeof halves);
    return Vec<float>(__builtin_convertvector(halves, Words) << 16);
#if defined(__AVX2__)
  } else if constexpr (kSame<T, Float16> && kSame<A, float>) {
    HalfWords halves;
    std::memcpy(&halves, p, sizeof halves);
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(__mmask16(-1), __m256i(halves));
#else
    return _mm256_cvtph_ps(__m128i(halves));
#endif
#endif
  } else {
    A values[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i) values[i] = A(read(p[i]));
    return load(values);
  }
}

template <class T, class A>
inline void store_as(T* p, Vec<A> v) {
  if constexpr (kSame<A, T>) {
    store(p, v);
  } else if constexpr (kSame<T, BFloat16> && kSame<A, float>) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh(v);
    std::memcpy(p, &rounded, sizeof rounded);
#else
    // Rounds as `write` does.
    const Words bits = Words(v), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const HalfWords halves = __builtin_convertvector(v == v ? rounded : Words{} + 0x7fc0u, HalfWords);
    std::memcpy(p, &halves, sizeof halves);
#endif
#if defined(__AVX2__)
  } else if constexpr (kSame<T, Float16> && kSame<A, float>) {
#if defined(__AVX512F__)
    const __m256i halves = _mm512_maskz_cvtps_ph(__mmask16(-1), v, _MM_FROUND_TO_NEAREST_INT);
#else
    const __m128i halves = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#endif
    std::memcpy(p, &halves, sizeof halves);
#endif
  } else {
    A values[kLanes<A>];
    store(values, v);
    for (int i = 0; i < kLanes<A>; ++i) write(p + i, values[i]);
  }
}

// ----------------------------------------------------------------------------- transposition

// One stage of the butterfly: swaps the off-diagonal blocks of size `stride`.
template <class A, int stride>
inline void swap_blocks(Vec<A>* rows) {
  constexpr int n = kLanes<A>;
  typename VectorOf<A>::index low, high;
  for (int j = 0; j < n; ++j) {
    low[j] = (j & stride) ? n + j - stride : j;
    high[j] = (j & stride) ? n + j : j + stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (i & stride) continue;
    const Vec<A> a = rows[i], b = rows[i + stride];
    rows[i] = shuffle(a, b, low);
    rows[i + stride] = shuffle(a, b, high);
  }
  if constexpr (stride > 1) swap_blocks<A, stride / 2>(rows);
}

// place(c)[r] = source(r)[c], converting between number formats; A computes. Where rows or columns do not
// fill whole blocks, the last block overlaps the one before.
template <class A, class To, class Source, class Place>
inline void transpose_between(int64_t rows, int64_t columns, Source source, Place place) {
  constexpr int n = kLanes<A>;
  for (int64_t begin = 0; begin < columns; begin += n) {
    const int64_t c = begin + n <= columns ? begin : columns > n ? columns - n : 0;
    const int64_t width = columns < n ? columns : n;
    To* to[n];
    for (int i = 0; i < width; ++i) to[i] = place(c + i);
    if (width < n || rows < n) {
      for (int64_t r = 0; r < rows; ++r)
        for (int i = 0; i < width; ++i) write(to[i] + r, A(read(source(r)[c + i])));
      continue;
    }
    for (int64_t start = 0; start < rows; start += n) {
      const int64_t r = start + n <= rows ? start : rows - n;
      Vec<A> block[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) block[i] = load_as<A>(source(r + i) + c);
      swap_blocks<A, n / 2>(block);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) store_as<To, A>(to[i] + r, block[i]);
    }
  }
}

// to[c * to_stride + r] = from[r * from_stride + c].
template <class A, class From, class To>
inline void transpose(const From* from, ptrdiff_t from_stride, int64_t rows, int64_t columns, To* to,
                      ptrdiff_t to_stride) {
  transpose_between<A, To>(
      rows, columns, [&](int64_t r) { return from + r * from_stride; },
      [&](int64_t c) { return to + c * to_stride; });
}

template <class A, class From, class To>
inline void convert_row(const From* from, int64_t n, To* to) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) store_as<To, A>(to + i, load_as<A>(from + i));
  for (; i < n; ++i) write(to + i, A(read(from[i])));
}

}  // namespace deformnet::DEFORMNET_ISA

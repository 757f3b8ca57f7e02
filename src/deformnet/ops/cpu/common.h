// What the kernels share: their workspace, numbers in any format, maps in channels-last form.
//
// Included by every translation unit once per instruction set, as simd.h is.
#pragma once

#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "simd.h"

namespace deformnet::DEFORMNET_ISA {

// ------------------------------------------------------------------------------- small parts

template <class I>
inline I least(I a, I b) {
  return a < b ? a : b;
}
template <class I>
inline I most(I a, I b) {
  return a > b ? a : b;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t kCacheLine = 64, kHugePage = 2 << 20;
constexpr int64_t kImagesBytes = 16 << 20;    // channels-last copies of images, at least one image
// Workspace that stays allocated between calls: enough for the copy of one large map, whose pages take as
// long to get from the system as a layer to compute.
constexpr int64_t kKeptBytes = 128 << 20;

// Memory for one call, handed out piece by piece. Each calling thread keeps its block for the next
// call: fresh pages cost more than the arithmetic of a small layer.
class Workspace {
 public:
  ~Workspace() { std::free(block_); }

  bool reserve(int64_t bytes) {
    used_ = 0;
    if (bytes <= capacity_) return true;
    std::free(block_);
    capacity_ = round_up(bytes, kHugePage);
    block_ = static_cast<char*>(std::aligned_alloc(kHugePage, size_t(capacity_)));
    if (!block_) capacity_ = 0;
#ifdef __linux__
    if (block_) madvise(block_, size_t(capacity_), MADV_HUGEPAGE);
#endif
    return block_ != nullptr;
  }
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(block_ + used_);
    used_ += bytes_of<T>(count);
    return piece;
  }
  void trim() {
    if (capacity_ <= kKeptBytes) return;
    std::free(block_);
    block_ = nullptr;
    capacity_ = 0;
  }
  template <class T>
  static int64_t bytes_of(int64_t count) {
    return round_up(count * int64_t(sizeof(T)), kCacheLine);
  }

 private:
  char* block_ = nullptr;
  int64_t capacity_ = 0, used_ = 0;
};

inline thread_local Workspace workspace;

// ---------------------------------------------------------------------------------- numbers

inline const char* element(const void* data, int32_t dtype, int64_t index) {
  const int64_t size = dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
  return static_cast<const char*>(data) + index * size;
}

__attribute__((always_inline)) inline double read_number(const void* data, int32_t dtype, int64_t index) {
  switch (dtype) {
    case kFloat64: return read(static_cast<const double*>(data)[index]);
    case kFloat32: return read(static_cast<const float*>(data)[index]);
    case kBFloat16: return read(static_cast<const BFloat16*>(data)[index]);
    default: return read(static_cast<const Float16*>(data)[index]);
  }
}

template <class A>
inline void read_run(const void* data, int32_t dtype, int64_t index, int64_t n, A* to) {
  const char* from = element(data, dtype, index);
  switch (dtype) {
    case kFloat64: return convert_row<A>(reinterpret_cast<const double*>(from), n, to);
    case kFloat32: return convert_row<A>(reinterpret_cast<const float*>(from), n, to);
    case kBFloat16: return convert_row<A>(reinterpret_cast<const BFloat16*>(from), n, to);
    case kFloat16: return convert_row<A>(reinterpret_cast<const Float16*>(from), n, to);
  }
}

template <class A>
inline void write_run(const A* from, int64_t n, void* data, int32_t dtype, int64_t index) {
  char* to = const_cast<char*>(element(data, dtype, index));
  switch (dtype) {
    case kFloat64: return convert_row<A>(from, n, reinterpret_cast<double*>(to));
    case kFloat32: return convert_row<A>(from, n, reinterpret_cast<float*>(to));
    case kBFloat16: return convert_row<A>(from, n, reinterpret_cast<BFloat16*>(to));
    case kFloat16: return convert_row<A>(from, n, reinterpret_cast<Float16*>(to));
  }
}

// --------------------------------------------------------------------------------- the map

// Images [begin, end) of a batch as channels-last maps in the type of computation: the tensor itself
// where it has that form, otherwise a copy. `is_last`: the tensor is channels-last. Called by all
// threads of a team.
template <class A, class T>
const A* channels_last(const T* input, bool is_last, int64_t channels, int64_t pixels, int64_t begin,
                       int64_t end, A* copy) {
  const T* from = input + begin * channels * pixels;
  if constexpr (kSame<A, T>)
    if (is_last) return from;
  constexpr int64_t strip = 256;
  const int64_t strips = ceil_div(pixels, strip);
#pragma omp for
  for (int64_t item = 0; item < (end - begin) * strips; ++item) {
    const int64_t image = item / strips, start = item % strips * strip;
    const int64_t n = least(strip, pixels - start);
    A* to = copy + (image * pixels + start) * channels;
    if (is_last)
      convert_row<A>(from + (image * pixels + start) * channels, n * channels, to);
    else
      transpose<A>(from + image * channels * pixels + start, pixels, channels, n, to, channels);
  }
  return copy;
}

// The gradient of the map, from channels-last sums into the tensor.
template <class A, class T>
void scatter_map(const A* sums, bool is_last, int64_t channels, int64_t pixels, int64_t begin,
                 int64_t end, T* grad_input) {
  constexpr int64_t strip = 256;
  const int64_t strips = ceil_div(pixels, strip);
  T* to = grad_input + begin * channels * pixels;
#pragma omp for
  for (int64_t item = 0; item < (end - begin) * strips; ++item) {
    const int64_t image = item / strips, start = item % strips * strip;
    const int64_t n = least(strip, pixels - start);
    const A* from = sums + (image * pixels + start) * channels;
    if (is_last)
      convert_row<A>(from, n * channels, to + (image * pixels + start) * channels);
    else
      transpose<A>(from, channels, n, channels, to + image * channels * pixels + start, pixels);
  }
}

}  // namespace deformnet::DEFORMNET_ISA

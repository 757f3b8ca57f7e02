// What the kernels share: memory, the team of threads, numbers in any format. Compiled once per instruction set,
// as simd.h is.
#pragma once

#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "simd.h"

// Declared as in omp.h. The library is not linked to an OpenMP runtime; it finds PyTorch's in the process.
extern "C" int omp_get_thread_num();
extern "C" int omp_in_parallel();

namespace deformnet {
// As `DTYPES` of loading.py.
enum DType : int32_t { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };
}  // namespace deformnet

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
// Workspace that stays allocated between calls: enough for the copy of one large map, whose pages take as
// long to get from the system as a layer to compute.
constexpr int64_t kKeptBytes = 128 << 20;
// More than any machine has. A larger piece of memory, or one whose size overflows 64 bits, is counted as this many
// bytes. The size of one tensor cannot overflow, since it is in memory, and neither can the sizes that a plan derives
// from it: the frame of a map multiplies its size by at most 12, whole panels that of a weight by 2^10, and conversion
// from half precision to float by 2.
constexpr int64_t kMostBytes = int64_t(1) << 56;

// Hands out a block of memory piece by piece, in whole cache lines. Without a block it only counts: a struct that takes
// its buffers in its constructor so says its size, too. See `run_team`.
class Memory {
 public:
  explicit Memory(char* block = nullptr) : block_(block) {}

  template <class T>
  T* take(int64_t count) {
    return reinterpret_cast<T*>(take(count, sizeof(T)));
  }
  // `count` pieces of `size` bytes.
  char* take(int64_t count, int64_t size) {
    char* piece = block_ ? block_ + used_ : nullptr;
    const bool fits = count >= 0 && (size == 0 || count <= kMostBytes / size);
    const int64_t bytes = fits ? count * size : kMostBytes;
    used_ = least(used_ + round_up(bytes, kCacheLine), kMostBytes);
#ifdef __SANITIZE_ADDRESS__
    // The rest of the last cache line, and one more, must not be accessed.
    if (block_) __asan_poison_memory_region(piece + bytes, size_t(block_ + used_ + kCacheLine - piece - bytes));
    used_ += kCacheLine;
#endif
    return piece;
  }
  template <class T>
  T* take_zeros(int64_t count) {
    T* piece = take<T>(count);
    if (piece) std::memset(piece, 0, size_t(count) * sizeof(T));
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

// The memory of a call. Each calling thread keeps its block for the next call: fresh pages cost more than the
// arithmetic of a small layer.
class Workspace {
 public:
  ~Workspace() { release(); }

  // At least so many bytes, or null.
  char* reserve(int64_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    if (block_) __asan_unpoison_memory_region(block_, size_t(capacity_));
#endif
    if (bytes <= capacity_) return block_;
    release();
    capacity_ = round_up(bytes, kHugePage);
    block_ = static_cast<char*>(operator new(size_t(capacity_), kAlignment, std::nothrow));
    if (!block_) capacity_ = 0;
#ifdef __linux__
    if (block_) madvise(block_, size_t(capacity_), MADV_HUGEPAGE);
#endif
    return block_;
  }
  void trim() {
    if (capacity_ > kKeptBytes) release();
  }

 private:
  static constexpr std::align_val_t kAlignment{kHugePage};

  void release() {
    operator delete(block_, kAlignment);
    block_ = nullptr;
    capacity_ = 0;
  }

  char* block_ = nullptr;
  int64_t capacity_ = 0;
};

inline thread_local Workspace workspace;

// Runs a team of threads. `Shared` is made from (plan, memory) and holds the buffers of the team; a `Worker` is made
// from (plan, shared, memory) in every thread and holds those of the thread. Calls shared.prepare(plan), then
// worker.run() in every thread. Returns 1 when there is not enough memory, otherwise 0.
template <class Shared, class Worker, class Plan>
int run_team(const Plan& plan) {
  Memory counted, counted_own;
  Shared shared(plan, counted);
  Worker(plan, shared, counted_own);
  const int64_t own_bytes = counted_own.used();
  counted.take(plan.threads, own_bytes);
  char* block = workspace.reserve(counted.used());
  if (!block) return 1;
  Memory memory(block);
  shared = Shared(plan, memory);
  char* rest = memory.take(plan.threads, own_bytes);
  shared.prepare(plan);
  const auto work = [&](int thread) {
    Memory own(rest + thread * own_bytes);
    const Worker made(plan, shared, own);
    Worker(made).run();  // a copy, whose address nobody has: its fields can stay in registers
  };
  // GCC's runtime makes a system call at every barrier, even for a team of one thread, but not outside a team.
  if (plan.threads == 1 && !omp_in_parallel()) {
    work(0);
  } else {
#pragma omp parallel num_threads(plan.threads)
    work(omp_get_thread_num());
  }
  workspace.trim();
  return 0;
}

// ---------------------------------------------------------------------------------- numbers

// run(number), a number of the type that `dtype` names.
template <class Run>
__attribute__((always_inline)) inline auto with_type(int32_t dtype, Run run) {
  switch (dtype) {
    case kFloat64: return run(double{});
    case kFloat32: return run(float{});
    case kBFloat16: return run(BFloat16{});
    default: return run(Float16{});
  }
}

inline const void* element(const void* data, int32_t dtype, int64_t index) {
  return with_type(dtype, [=](auto type) -> const void* { return static_cast<const decltype(type)*>(data) + index; });
}

__attribute__((always_inline)) inline double read_number(const void* data, int32_t dtype, int64_t index) {
  return with_type(dtype, [=](auto type) { return double(read(static_cast<const decltype(type)*>(data)[index])); });
}

template <class A>
inline void read_run(const void* data, int32_t dtype, int64_t index, int64_t n, A* to) {
  with_type(dtype, [=](auto type) { convert_row<A>(static_cast<const decltype(type)*>(data) + index, n, to); });
}

template <class A>
inline void write_run(const A* from, int64_t n, void* data, int32_t dtype, int64_t index) {
  with_type(dtype, [=](auto type) { convert_row<A>(from, n, static_cast<decltype(type)*>(data) + index); });
}

}  // namespace deformnet::DEFORMNET_ISA

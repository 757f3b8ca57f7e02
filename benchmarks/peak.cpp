// The rate of fused multiply-adds on float32 that a thread reaches for each core, all at once: what no
// product of matrices can exceed. Prints FLOP a second for the number of threads that it is given.
#include <omp.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
#if defined(__aarch64__)
#define IN_REGISTER "+w"
#else
#define IN_REGISTER "+v"
#endif
typedef float Vec __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / sizeof(float), kSums = kBytes == 64 ? 24 : 12;

int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]);
  constexpr long steps = 4000000;
  double best = 0;
  for (int round = 0; round < 9; ++round) {
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    {
      Vec sums[kSums] = {}, factor = Vec{} + 1.0001f, term = Vec{} + 0.5f;
      for (long i = 0; i < steps; ++i) {
#pragma GCC unroll 24
        for (int j = 0; j < kSums; ++j) sums[j] += factor * term;
#pragma GCC unroll 24
        for (int j = 0; j < kSums; ++j) asm volatile("" : IN_REGISTER(sums[j]), IN_REGISTER(factor));
      }
    }
    best = std::max(best, 2.0 * threads * steps * kSums * kLanes / (omp_get_wtime() - start));
  }
  std::printf("%.0f\n", best);
}

// The kernel library without Python and PyTorch, for processors that only an emulator has: `interface LIBRARY` calls
// every function in every instruction set of the processor, and prints their names. test_interface.py compiles it.
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../src/deformnet/ops/deform_conv/problem.h"
#include "../../src/deformnet/ops/roi_pool/problem.h"

using namespace deformnet;
typedef std::vector<float> Floats;

void* library;

template <class Function>
Function* find(const char* name) {
  void* function = dlsym(library, name);
  if (!function) std::printf("%s\n", dlerror()), std::exit(1);
  return reinterpret_cast<Function*>(function);
}

void expect(bool right, const char* what) {
  if (!right) std::printf("wrong: %s\n", what), std::exit(1);
}

void expect_close(double found, double expected, const char* what) {
  if (!(std::fabs(found - expected) <= 1e-4 * (1 + std::fabs(expected)))) {
    std::printf("wrong: %s is %.9g, expected %.9g\n", what, found, expected);
    std::exit(1);
  }
}

Floats noise(size_t count, float scale) {
  static unsigned state = 1;
  Floats numbers(count);
  for (float& number : numbers) {
    state = state * 1664525u + 1013904223u;
    number = scale * (float(state >> 8) / float(1 << 23) - 1);
  }
  return numbers;
}

double dot(const Floats& a, const Floats& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += double(a[i]) * b[i];
  return sum;
}

double bilinear(const float* map, int height, int width, double y, double x) {
  const int top = int(std::floor(y)), left = int(std::floor(x));
  double sum = 0;
  for (int i = top; i < top + 2; ++i)
    for (int j = left; j < left + 2; ++j)
      if (i >= 0 && i < height && j >= 0 && j < width)
        sum += map[i * width + j] * (1 - std::fabs(y - i)) * (1 - std::fabs(x - j));
  return sum;
}

void convolve(int threads) {
  constexpr int n = 2, c = 9, h = 7, w = 10, out = 19, k = 3;
  const Problem p{n, c, h, w, out, h, w, k, k, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, kZeros, 0, 0, threads};
  const Floats input = noise(n * c * h * w, 1), weight = noise(out * c * k * k, 0.1f), bias = noise(out, 1);
  const Floats offset = noise(n * 2 * k * k * h * w, 2), mask = noise(n * k * k * h * w, 1);
  const Floats grad = noise(n * out * h * w, 1);
  Floats output(grad.size());
  const ForwardTensors forward{input.data(), offset.data(), mask.data(), weight.data(), bias.data(), output.data()};
  expect(find<int(const Problem*, const ForwardTensors*)>("deformnet_deform_conv2d")(&p, &forward) == 0, "memory");
  double biased = 0;
  for (int b = 0; b < n; ++b)
    for (int o = 0; o < out; ++o)
      for (int at = 0; at < h * w; ++at) {
        double sum = bias[o];
        for (int ch = 0; ch < c; ++ch)
          for (int tap = 0; tap < k * k; ++tap) {
            const float* shift = &offset[((b * k * k + tap) * 2) * h * w + at];
            sum += bilinear(&input[(b * c + ch) * h * w], h, w, at / w - 1 + tap / k + shift[0],
                            at % w - 1 + tap % k + shift[h * w]) *
                   weight[(o * c + ch) * k * k + tap] * mask[(b * k * k + tap) * h * w + at];
          }
        expect_close(output[(b * out + o) * h * w + at], sum, "deform_conv2d");
        biased += double(bias[o]) * grad[(b * out + o) * h * w + at];
      }

  // Without its bias, the output is linear in input, in weight and in mask.
  Floats to_input(input.size()), to_offset(offset.size()), to_mask(mask.size()), to_weight(weight.size());
  const BackwardTensors backward{grad.data(),     input.data(),     offset.data(),  mask.data(),     weight.data(),
                                 to_input.data(), to_offset.data(), to_mask.data(), to_weight.data()};
  expect(find<int(const Problem*, const BackwardTensors*)>("deformnet_deform_conv2d_backward")(&p, &backward) == 0,
         "memory");
  const double expected = dot(grad, output) - biased;
  expect_close(dot(to_input, input), expected, "the gradient of input");
  expect_close(dot(to_weight, weight), expected, "the gradient of weight");
  expect_close(dot(to_mask, mask), expected, "the gradient of mask");
}

void pool(int threads, bool sensitive) {
  constexpr int h = 12, w = 14, side = 2, channels = 5;
  const int planes = channels * (sensitive ? side * side : 1);
  Floats input(size_t(planes * h * w));
  for (int plane = 0; plane < planes; ++plane)
    for (int at = 0; at < h * w; ++at) input[plane * h * w + at] = float(plane + 10 * (at / w) + at % w);
  const Floats boxes{0, 2, 3, 10, 9}, offset(2 * side * side, 0), grad = noise(channels * side * side, 1);
  const RoiProblem p{1, h, w, 1, channels, side, side, 1, 4, 1.0, 0.1, 1, 1, 1, kAligned, sensitive, 0, threads};
  Floats output(grad.size()), to_input(input.size()), to_offset(offset.size());
  const RoiForwardTensors forward{input.data(), boxes.data(), offset.data(), output.data()};
  expect(find<int(const RoiProblem*, const RoiForwardTensors*)>("deformnet_roi_pool")(&p, &forward) == 0, "memory");
  // The map is linear: a bin's mean is the value at its center.
  for (int ch = 0; ch < channels; ++ch)
    for (int bin = 0; bin < side * side; ++bin) {
      const double y = 3 - 0.5 + 6 * (bin / side + 0.5) / side, x = 2 - 0.5 + 8 * (bin % side + 0.5) / side;
      const int plane = sensitive ? ch * side * side + bin : ch;
      expect_close(output[ch * side * side + bin], plane + 10 * y + x, "roi_pool");
    }
  const RoiBackwardTensors backward{grad.data(),   input.data(),    boxes.data(),
                                    offset.data(), to_input.data(), to_offset.data()};
  expect(find<int(const RoiProblem*, const RoiBackwardTensors*)>("deformnet_roi_pool_backward")(&p, &backward) == 0,
         "memory");
  expect_close(dot(to_input, input), dot(grad, output), "the gradient of a pooled map");
}

int main(int, char** arguments) {
  library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return std::printf("%s\n", dlerror()), 1;
  for (const char* name : {"amx", "avx512_bf16", "avx512", "avx2", "baseline"}) {
    if (find<int(const char*)>("deformnet_select_instruction_set")(name)) continue;
    for (int threads : {1, 3}) convolve(threads), pool(threads, false), pool(threads, true);
    std::printf("%s ", name);
  }
  std::printf("\n");
}

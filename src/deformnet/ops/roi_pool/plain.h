// Plain pooling. All channels of an offset group have the same samples: the map is channels-last, and a pixel is a
// run of channels. In the backward pass threads split the boxes for the gradient of the offsets, and channels for that
// of the map.
#pragma once

#include "window.h"

namespace deformnet::DEFORMNET_ISA {
namespace {

constexpr int64_t kBinsBytes = 256 << 10;  // bins of a box with all channels: a part of the private cache

// --------------------------------------------------------------------------------- the map

// The pixels of an image in strips: visit(start, n). Called by all threads of a team.
template <class Visit>
void for_each_strip(int64_t pixels, Visit visit) {
  constexpr int64_t strip = 256;
#pragma omp for
  for (int64_t start = 0; start < pixels; start += strip) visit(start, least(strip, pixels - start));
}

// Image n as a channels-last map in the type of computation: the tensor itself if it has that form, otherwise a copy.
template <class T, class A, class Plan>
const A* read_map(const Plan& plan, const T* input, int64_t n, A* copy) {
  const int64_t channels = plan.channels, pixels = plan.pixels;
  const T* image = input + n * channels * pixels;
  if constexpr (kSame<A, T>)
    if (plan.input_channels_last) return image;
  for_each_strip(pixels, [&](int64_t start, int64_t count) {
    if (plan.input_channels_last)
      convert_row<A>(image + start * channels, count * channels, copy + start * channels);
    else
      transpose<A>(image + start, pixels, channels, count, copy + start * channels, channels);
  });
  return copy;
}

// The gradient of image n, from channels-last sums.
template <class T, class A, class Plan>
void write_map(const Plan& plan, const A* sums, int64_t n, T* grad_input) {
  const int64_t channels = plan.channels, pixels = plan.pixels;
  T* image = grad_input + n * channels * pixels;
  for_each_strip(pixels, [&](int64_t start, int64_t count) {
    if (plan.input_channels_last)
      convert_row<A>(sums + start * channels, count * channels, image + start * channels);
    else
      transpose<A>(sums + start * channels, channels, count, channels, image + start, pixels);
  });
}

// ---------------------------------------------------------------------------- bins of a box

// Means of a bin for vectors [0, V) of channels.
template <class A, int V>
inline void pool_vectors(const Window<A, false>& w, const A* map, int64_t channels, int64_t row, A* to) {
  const auto &rows = w.rows, &columns = w.columns;
  Vec<A> total[V] = {};
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t j = 0; j < columns.count; ++j) {
      const A* pixel = map + rows.pixels[i] * row + columns.pixels[j] * channels;
      const Vec<A> weight = Vec<A>{} + rows.weights[i] * columns.weights[j];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        total[v] = multiply_add(load(pixel + v * kLanes<A>), weight, total[v]);
    }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store(to + v * kLanes<A>, total[v] * w.scale);
}

template <class A>
void pool_channels(const Window<A, false>& w, const A* map, int64_t channels, int64_t row, int64_t n, A* to) {
  const auto &rows = w.rows, &columns = w.columns;
  constexpr int many = 8;
  int64_t c = 0;
  for (; c + many * kLanes<A> <= n; c += many * kLanes<A>)
    pool_vectors<A, many>(w, map + c, channels, row, to + c);
  for (; c + kLanes<A> <= n; c += kLanes<A>) pool_vectors<A, 1>(w, map + c, channels, row, to + c);
  // To the same bits, wherever an offset group begins.
  for (; c < n; ++c) {
    A total = 0;
    for (int64_t i = 0; i < rows.count; ++i)
      for (int64_t j = 0; j < columns.count; ++j)
        total = multiply_add(map[rows.pixels[i] * row + columns.pixels[j] * channels + c],
                             rows.weights[i] * columns.weights[j], total);
    to[c] = total * w.scale;
  }
}

// Derivatives of a bin's mean by its position, times `grad`, summed over vectors [0, V) of channels.
template <class A, int V>
inline void slope_vectors(const Window<A, true>& w, const A* map, int64_t channels, int64_t row, const A* grad,
                          Vec<A>* by_x, Vec<A>* by_y) {
  const auto &rows = w.rows, &columns = w.columns;
  Vec<A> x[V] = {}, y[V] = {};
  for (int64_t i = 0; i < rows.count; ++i) {
    Vec<A> values[V] = {}, slopes[V] = {};
    for (int64_t j = 0; j < columns.count; ++j) {
      const A* pixel = map + rows.pixels[i] * row + columns.pixels[j] * channels;
      const Vec<A> weight = Vec<A>{} + columns.weights[j], slope = Vec<A>{} + columns.slopes[j];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<A> value = load(pixel + v * kLanes<A>);
        values[v] = multiply_add(value, weight, values[v]);
        slopes[v] = multiply_add(value, slope, slopes[v]);
      }
    }
    const Vec<A> weight = Vec<A>{} + rows.weights[i], slope = Vec<A>{} + rows.slopes[i];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      x[v] = multiply_add(slopes[v], weight, x[v]);
      y[v] = multiply_add(values[v], slope, y[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const Vec<A> g = load(grad + v * kLanes<A>);
    *by_x = multiply_add(x[v], g, *by_x);
    *by_y = multiply_add(y[v], g, *by_y);
  }
}

template <class A>
void slope_channels(const Window<A, true>& w, const A* map, int64_t channels, int64_t row, int64_t n,
                    const A* grad, double* grad_x, double* grad_y) {
  const auto &rows = w.rows, &columns = w.columns;
  constexpr int some = kVectorBytes == 64 ? 4 : 2;
  Vec<A> by_x{}, by_y{};
  int64_t c = 0;
  for (; c + some * kLanes<A> <= n; c += some * kLanes<A>)
    slope_vectors<A, some>(w, map + c, channels, row, grad + c, &by_x, &by_y);
  for (; c + kLanes<A> <= n; c += kLanes<A>)
    slope_vectors<A, 1>(w, map + c, channels, row, grad + c, &by_x, &by_y);
  A x = sum<A>(by_x), y = sum<A>(by_y);
  for (; c < n; ++c)
    for (int64_t i = 0; i < rows.count; ++i)
      for (int64_t j = 0; j < columns.count; ++j) {
        const A value = map[rows.pixels[i] * row + columns.pixels[j] * channels + c] * grad[c];
        x += value * rows.weights[i] * columns.slopes[j];
        y += value * rows.slopes[i] * columns.weights[j];
      }
  *grad_x = double(x) * w.scale;
  *grad_y = double(y) * w.scale;
}

// Adds the gradient of a bin into channels [begin, end) of the map's; `grad` begins at `begin`.
template <class A>
void add_channels(const Window<A, true>& w, const A* grad, int64_t channels, int64_t row, int64_t begin,
                  int64_t end, A* sums) {
  const auto &rows = w.rows, &columns = w.columns;
  const int64_t n = end - begin;
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t j = 0; j < columns.count; ++j) {
      A* pixel = sums + rows.pixels[i] * row + columns.pixels[j] * channels + begin;
      const A weight = rows.weights[i] * columns.weights[j] * w.scale;
      const Vec<A> weights = Vec<A>{} + weight;
      int64_t c = 0;
      for (; c + kLanes<A> <= n; c += kLanes<A>)
        store(pixel + c, multiply_add(load(grad + c), weights, load(pixel + c)));
      for (; c < n; ++c) pixel[c] = multiply_add(grad[c], weight, pixel[c]);
    }
}

// ---------------------------------------------------------------------------- the whole pass

// Sizes. `Tensors` are those of the forward or of the backward pass.
template <class A, class Tensors>
struct PlainPlan : RoiProblem {
  PlainPlan(const RoiProblem& p, const Tensors& tensors, bool needs_map)
      : RoiProblem(p),
        tensors(tensors),
        bins(out_h * out_w),
        pixels(in_h * in_w),
        channels(out_channels),
        group_channels(channels / groups),
        row(in_w * channels),
        map_size(needs_map ? pixels * channels : 0),
        block(least(bins, most<int64_t>(16, round_up(kBinsBytes / (channels * int64_t(sizeof(A))), 16)))),
        slice(round_up(ceil_div(channels, threads), kCacheLine / int64_t(sizeof(A)))) {}

  const Tensors& tensors;
  int64_t bins, pixels, channels, group_channels;
  int64_t row;       // numbers of a row of the map
  int64_t map_size;  // of an image in the workspace
  int64_t block;     // bins of a box that are computed at a time, so that they are written channel by channel
  int64_t slice;     // channels of the gradient of the map for a thread, in whole cache lines
};

template <class A>
struct PlainShared {
  template <class Plan>
  PlainShared(const Plan& plan, Memory& memory) : boxes(plan, memory), map(memory.take<A>(plan.map_size)) {}

  template <class Plan>
  void prepare(const Plan& plan) {
    boxes.prepare(plan);
  }

  Boxes boxes;
  A* map;  // one image at a time; in the backward pass, then in the same place the gradient of it
};

template <class T>
class PlainForward {
  using A = typename ComputeOf<T>::type;
  using Plan = PlainPlan<A, RoiForwardTensors>;
  using Shared = PlainShared<A>;

 public:
  PlainForward(const Plan& plan, const Shared& shared, Memory& memory)
      : plan(plan), tensors(plan.tensors), shared(shared), boxes(shared.boxes), window(plan, memory),
        means(memory.take<A>(plan.block * plan.channels)) {}

  void run() {
    for (int64_t n = 0; n < plan.batch; ++n)
      if (boxes.start[n] < boxes.start[n + 1]) pool_image(n);
  }

  static int run_team(const RoiProblem& p, const RoiForwardTensors& tensors) {
    const bool needs_map = !p.input_channels_last || !kSame<A, T>;
    return DEFORMNET_ISA::run_team<Shared, PlainForward>(Plan(p, tensors, needs_map));
  }

 private:
  // Threads split boxes and blocks of bins.
  void pool_image(int64_t n) {
    const A* map = read_map(plan, static_cast<const T*>(tensors.input), n, shared.map);
    const int64_t first = boxes.start[n], last = boxes.start[n + 1], blocks = ceil_div(plan.bins, plan.block);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < (last - first) * blocks; ++item) {
      const int64_t begin = item % blocks * plan.block;
      pool_bins(boxes.order[first + item / blocks], begin, least(begin + plan.block, plan.bins), map);
    }
  }

  void pool_bins(int64_t r, int64_t begin, int64_t end, const A* map) {
    const int64_t channels = plan.channels, group_channels = plan.group_channels;
    for (int64_t bin = begin; bin < end; ++bin)
      for (int64_t g = 0; g < plan.groups; ++g) {
        A* to = means + (bin - begin) * channels + g * group_channels;
        if (window.place(plan, boxes.box[r], tensors.offset, r, g, bin)) {
          window.list();
          pool_channels<A>(window, map + g * group_channels, channels, plan.row, group_channels, to);
        } else {
          for (int64_t c = 0; c < group_channels; ++c) to[c] = A(kNaN);
        }
      }
    T* output = static_cast<T*>(tensors.output) + r * channels * plan.bins + begin;
    transpose<A>(means, channels, end - begin, channels, output, plan.bins);
  }

  const Plan& plan;
  const RoiForwardTensors& tensors;
  const Shared& shared;
  const Boxes& boxes;
  Window<A, false> window;
  A* means;  // of a block of bins: [bin][channel]
};

template <class T>
class PlainBackward {
  using A = typename ComputeOf<T>::type;
  using Plan = PlainPlan<A, RoiBackwardTensors>;
  using Shared = PlainShared<A>;

 public:
  PlainBackward(const Plan& plan, const Shared& shared, Memory& memory)
      : plan(plan), tensors(plan.tensors), shared(shared), boxes(shared.boxes), window(plan, memory),
        grads(memory.take<A>(plan.block * plan.channels)) {}

  void run() {
    for (int64_t n = 0; n < plan.batch; ++n) {
      if (tensors.grad_offset && boxes.start[n] < boxes.start[n + 1]) differentiate_offsets(n);
      if (tensors.grad_input) differentiate_map(n);
    }
  }

  static int run_team(const RoiProblem& p, const RoiBackwardTensors& tensors) {
    return DEFORMNET_ISA::run_team<Shared, PlainBackward>(Plan(p, tensors, true));
  }

 private:
  // Threads split boxes.
  void differentiate_offsets(int64_t n) {
    const A* map = read_map(plan, static_cast<const T*>(tensors.input), n, shared.map);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = boxes.start[n]; item < boxes.start[n + 1]; ++item)
      for (int64_t begin = 0; begin < plan.bins; begin += plan.block)
        differentiate_bins(boxes.order[item], begin, least(begin + plan.block, plan.bins), map);
  }

  void differentiate_bins(int64_t r, int64_t begin, int64_t end, const A* map) {
    const int64_t channels = plan.channels, group_channels = plan.group_channels;
    read_grads(r, begin, end, 0, channels);
    for (int64_t bin = begin; bin < end; ++bin)
      for (int64_t g = 0; g < plan.groups; ++g) {
        double x = kNaN, y = kNaN;
        if (window.place(plan, boxes.box[r], tensors.offset, r, g, bin)) {
          window.list();
          slope_channels<A>(window, map + g * group_channels, channels, plan.row, group_channels,
                            grads + (bin - begin) * channels + g * group_channels, &x, &y);
        }
        write_offset_grad(plan, boxes.box[r], x, y, r, g, bin, tensors.grad_offset);
      }
  }

  // Threads split channels.
  void differentiate_map(int64_t n) {
    const int64_t channels = plan.channels;
#pragma omp for schedule(static)
    for (int64_t from = 0; from < channels; from += plan.slice) {
      const int64_t to = least(from + plan.slice, channels);
      for (int64_t i = 0; i < plan.pixels; ++i)
        std::memset(shared.map + i * channels + from, 0, size_t(to - from) * sizeof(A));
      for (int64_t item = boxes.start[n]; item < boxes.start[n + 1]; ++item)
        for (int64_t begin = 0; begin < plan.bins; begin += plan.block)
          add_bins(boxes.order[item], begin, least(begin + plan.block, plan.bins), from, to);
    }
    write_map(plan, shared.map, n, static_cast<T*>(tensors.grad_input));
  }

  // Channels [from, to) of some bins.
  void add_bins(int64_t r, int64_t begin, int64_t end, int64_t from, int64_t to) {
    const int64_t width = to - from, group_channels = plan.group_channels;
    read_grads(r, begin, end, from, to);
    for (int64_t bin = begin; bin < end; ++bin)
      for (int64_t g = from / group_channels; g * group_channels < to; ++g) {
        if (!window.place(plan, boxes.box[r], tensors.offset, r, g, bin)) continue;
        window.list();
        const int64_t low = most(from, g * group_channels);
        add_channels<A>(window, grads + (bin - begin) * width + low - from, plan.channels, plan.row, low,
                        least(to, (g + 1) * group_channels), shared.map);
      }
  }

  // The gradient of channels [from, to) of some bins.
  void read_grads(int64_t r, int64_t begin, int64_t end, int64_t from, int64_t to) {
    const T* grad_output = static_cast<const T*>(tensors.grad_output) + (r * plan.channels + from) * plan.bins + begin;
    transpose<A>(grad_output, plan.bins, to - from, end - begin, grads, to - from);
  }

  const Plan& plan;
  const RoiBackwardTensors& tensors;
  const Shared& shared;
  const Boxes& boxes;
  Window<A, true> window;
  A* grads;  // of a block of bins: [bin][channel]
};

}  // namespace
}  // namespace deformnet::DEFORMNET_ISA

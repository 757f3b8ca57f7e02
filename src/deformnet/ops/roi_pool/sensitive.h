// Position-sensitive pooling. A bin has channels of its own, and a few of them or one alone share samples: a vector
// holds neighboring pixels of a row. Threads split bins and offset groups, and so planes of the map, which stay in the
// cache while the boxes pass by.
#pragma once

#include "window.h"

namespace deformnet::DEFORMNET_ISA {
namespace {

constexpr int64_t kPlanesBytes = 1 << 20;  // planes of the map, at least one: a part of the private cache

// ------------------------------------------------------------------------------ planes of a bin

// Zero in the columns that are not read; `columns` begins with the first lane's.
template <class A>
inline Vec<A> where_read(const Index<A>* columns, Vec<A> values) {
  IndexVec<A> read;
  std::memcpy(&read, columns, sizeof read);
  return read ? values : Vec<A>{};
}

template <class A>
A pool_plane(const Window<A, false>& w, const A* plane, int64_t width) {
  const auto &rows = w.rows, &columns = w.columns;
  Vec<A> total{};
  for (int64_t x = columns.first; x < columns.last; x += kLanes<A>) {
    Vec<A> column{};
    for (int64_t y = rows.first; y < rows.last; ++y)
      if (rows.read[y])
        column = multiply_add(load(plane + y * width + x), Vec<A>{} + rows.weight[y], column);
    total = multiply_add(where_read<A>(columns.read + x, column), load(columns.weight + x), total);
  }
  return sum<A>(total) * w.scale;
}

// A plane's part in the gradient of a bin: adds derivatives of the mean by its position, times `grad`,
// to `by_x` and `by_y`, and the gradient of the map to `sums`. Null pointers: not needed.
template <class A>
inline void pool_plane_backward(const Window<A, true>& w, const A* plane, int64_t width, A grad,
                                Vec<A>* by_x, Vec<A>* by_y, A* sums) {
  const auto &rows = w.rows, &columns = w.columns;
  for (int64_t x = columns.first; x < columns.last; x += kLanes<A>) {
    const Vec<A> weight = load(columns.weight + x);
    const Vec<A> grads = where_read<A>(columns.read + x, weight * grad);
    Vec<A> value{}, slope{};
    for (int64_t y = rows.first; y < rows.last; ++y) {
      if (!rows.read[y]) continue;
      const int64_t at = y * width + x;
      if (plane) {
        const Vec<A> pixels = load(plane + at);
        value = multiply_add(pixels, Vec<A>{} + rows.weight[y], value);
        slope = multiply_add(pixels, Vec<A>{} + rows.slope[y], slope);
      }
      if (sums) store(sums + at, multiply_add(grads, Vec<A>{} + rows.weight[y], load(sums + at)));
    }
    if (plane) {
      const Vec<A> along = where_read<A>(columns.read + x, value) * load(columns.slope + x);
      const Vec<A> across = where_read<A>(columns.read + x, slope) * weight;
      *by_x = multiply_add(along, Vec<A>{} + grad, *by_x);
      *by_y = multiply_add(across, Vec<A>{} + grad, *by_y);
    }
  }
}

// ---------------------------------------------------------------------------- the whole pass

// Sizes. `planes` of a channel: one, and in the backward pass one for the gradient.
template <class A, class Tensors>
struct SensitivePlan : RoiProblem {
  SensitivePlan(const RoiProblem& p, const Tensors& tensors, int64_t planes)
      : RoiProblem(p),
        tensors(tensors),
        bins(out_h * out_w),
        pixels(in_h * in_w),
        group_channels(out_channels / groups),
        size(round_up(pixels + kLanes<A>, kCacheLine / int64_t(sizeof(A)))),
        piece(least(group_channels, most<int64_t>(1, kPlanesBytes / (planes * size * int64_t(sizeof(A)))))) {}

  const Tensors& tensors;
  int64_t bins, pixels, group_channels;
  int64_t size;   // numbers of a plane in the workspace: a vector may reach beyond the last pixel
  int64_t piece;  // channels that are processed at a time
};

// Planes of channels [begin, end) of a bin, of image n.
template <class T, class A, class Plan>
void read_planes(const Plan& plan, const T* input, int64_t n, int64_t begin, int64_t end, int64_t bin, A* planes) {
  for (int64_t c = begin; c < end; ++c)
    convert_row<A>(input + ((n * plan.out_channels + c) * plan.bins + bin) * plan.pixels, plan.pixels,
                   planes + (c - begin) * plan.size);
}

template <class T>
class SensitiveForward {
  using A = typename ComputeOf<T>::type;
  using Plan = SensitivePlan<A, RoiForwardTensors>;

 public:
  SensitiveForward(const Plan& plan, const Boxes& boxes, Memory& memory)
      : plan(plan), tensors(plan.tensors), boxes(boxes), window(plan, memory),
        planes(memory.take_zeros<A>(plan.piece * plan.size)) {}

  void run() {
    const int64_t pieces = ceil_div(plan.group_channels, plan.piece);
    // Bins of a row, which share cache lines of the output, go to the same thread.
#pragma omp for schedule(dynamic, plan.out_w)
    for (int64_t item = 0; item < plan.groups * pieces * plan.bins; ++item) {
      const int64_t group = item / plan.bins / pieces;
      const int64_t begin = group * plan.group_channels + item / plan.bins % pieces * plan.piece;
      const int64_t end = least(begin + plan.piece, (group + 1) * plan.group_channels);
      for (int64_t n = 0; n < plan.batch; ++n)
        if (boxes.start[n] < boxes.start[n + 1]) pool_image(n, item % plan.bins, group, begin, end);
    }
  }

  static int run_team(const RoiProblem& p, const RoiForwardTensors& tensors) {
    return DEFORMNET_ISA::run_team<Boxes, SensitiveForward>(Plan(p, tensors, 1));
  }

 private:
  // Channels [begin, end) of a bin, in the boxes of image n.
  void pool_image(int64_t n, int64_t bin, int64_t group, int64_t begin, int64_t end) {
    const int64_t first = boxes.start[n], last = boxes.start[n + 1];
    read_planes(plan, static_cast<const T*>(tensors.input), n, begin, end, bin, planes);
    for (int64_t i = first; i < last; ++i) {
      const int64_t r = boxes.order[i];
      if (i + kAhead < last) window.fetch(plan, tensors.offset, boxes.order[i + kAhead], group, bin);
      const bool defined = window.place(plan, boxes.box[r], tensors.offset, r, group, bin);
      T* to = static_cast<T*>(tensors.output) + r * plan.out_channels * plan.bins + bin;
      for (int64_t c = begin; c < end; ++c)
        write(to + c * plan.bins,
              defined ? pool_plane<A>(window, planes + (c - begin) * plan.size, plan.in_w) : A(kNaN));
    }
  }

  const Plan& plan;
  const RoiForwardTensors& tensors;
  const Boxes& boxes;
  Window<A, false> window;
  A* planes;  // of a piece
};

template <class T>
class SensitiveBackward {
  using A = typename ComputeOf<T>::type;
  using Plan = SensitivePlan<A, RoiBackwardTensors>;

 public:
  SensitiveBackward(const Plan& plan, const Boxes& boxes, Memory& memory)
      : plan(plan), tensors(plan.tensors), boxes(boxes), window(plan, memory),
        planes(memory.take_zeros<A>(plan.piece * plan.size)), sums(memory.take<A>(plan.piece * plan.size)),
        offset_sums(memory.take<A>(2 * plan.boxes)) {}

  void run() {
#pragma omp for schedule(dynamic, plan.out_w)
    for (int64_t item = 0; item < plan.groups * plan.bins; ++item)
      differentiate_bin(item % plan.bins, item / plan.bins);
  }

  static int run_team(const RoiProblem& p, const RoiBackwardTensors& tensors) {
    return DEFORMNET_ISA::run_team<Boxes, SensitiveBackward>(Plan(p, tensors, 2));
  }

 private:
  // A bin in all boxes, for an offset group.
  void differentiate_bin(int64_t bin, int64_t group) {
    const int64_t end = (group + 1) * plan.group_channels;
    for (int64_t i = 0; i < 2 * plan.boxes; ++i) offset_sums[i] = A(0);
    for (int64_t begin = group * plan.group_channels; begin < end; begin += plan.piece)
      for (int64_t n = 0; n < plan.batch; ++n)
        differentiate_image(n, bin, group, begin, least(begin + plan.piece, end));
    if (!tensors.grad_offset) return;
    for (int64_t r = 0; r < plan.boxes; ++r)
      write_offset_grad(plan, boxes.box[r], offset_sums[2 * r], offset_sums[2 * r + 1], r, group, bin,
                        tensors.grad_offset);
  }

  // Channels [begin, end) of the bin, in the boxes of image n.
  void differentiate_image(int64_t n, int64_t bin, int64_t group, int64_t begin, int64_t end) {
    const int64_t first = boxes.start[n], last = boxes.start[n + 1];
    if (tensors.grad_offset && first < last)
      read_planes(plan, static_cast<const T*>(tensors.input), n, begin, end, bin, planes);
    if (tensors.grad_input) std::memset(sums, 0, size_t(plan.piece * plan.size) * sizeof(A));
    for (int64_t i = first; i < last; ++i) {
      if (i + kAhead < last) {
        const int64_t ahead = boxes.order[i + kAhead];
        window.fetch(plan, tensors.offset, ahead, group, bin);
        __builtin_prefetch(grad_output(ahead, begin, bin));
      }
      differentiate_box(boxes.order[i], bin, group, begin, end);
    }
    if (!tensors.grad_input) return;
    T* grad_input = static_cast<T*>(tensors.grad_input);
    for (int64_t c = begin; c < end; ++c)
      convert_row<A>(sums + (c - begin) * plan.size, plan.pixels,
                     grad_input + ((n * plan.out_channels + c) * plan.bins + bin) * plan.pixels);
  }

  void differentiate_box(int64_t r, int64_t bin, int64_t group, int64_t begin, int64_t end) {
    if (!window.place(plan, boxes.box[r], tensors.offset, r, group, bin)) {
      offset_sums[2 * r] = offset_sums[2 * r + 1] = A(kNaN);
      return;
    }
    const T* from = grad_output(r, begin, bin);
    Vec<A> by_x{}, by_y{};
    for (int64_t c = begin; c < end; ++c, from += plan.bins) {
      const A grad = A(read(*from)) * window.scale;
      const int64_t at = (c - begin) * plan.size;
      pool_plane_backward<A>(window, tensors.grad_offset ? planes + at : nullptr, plan.in_w, grad, &by_x, &by_y,
                             tensors.grad_input ? sums + at : nullptr);
    }
    if (!tensors.grad_offset) return;
    offset_sums[2 * r] += sum<A>(by_x);
    offset_sums[2 * r + 1] += sum<A>(by_y);
  }

  const T* grad_output(int64_t r, int64_t channel, int64_t bin) const {
    return static_cast<const T*>(tensors.grad_output) + (r * plan.out_channels + channel) * plan.bins + bin;
  }

  const Plan& plan;
  const RoiBackwardTensors& tensors;
  const Boxes& boxes;
  Window<A, true> window;
  A *planes, *sums;  // of a piece, and their gradient
  A* offset_sums;    // the gradient of a bin's offset in every box, by x and by y
};

}  // namespace
}  // namespace deformnet::DEFORMNET_ISA

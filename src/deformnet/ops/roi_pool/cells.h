// Position-sensitive pooling with separate offsets for each channel, such as R-FCN's class-aware offsets, by the rule
// "bins", whose samples are the cells of a bin. Each lane of a vector holds a channel with its own position on the map.
// Threads split bins and channels, and thus planes of the map, which stay in the cache while all boxes are processed.
#pragma once

#include <type_traits>

#include "sensitive.h"

namespace deformnet::DEFORMNET_ISA {
namespace {

// Positions are computed in double, so only for part of the lanes at a time.
typedef Vec<double> Part;
constexpr int kPart = kLanes<double>;

inline Part round_down(Part x) {
  const Part shift = Part{} + 0x1.8p52, near = (x + shift) - shift;
  const Part low = near > x ? near - 1 : near;
  return (x > -0x1p51) & (x < 0x1p51) ? low : x;  // beyond this range, and for NaN: x itself
}

template <class A>
inline Index<A> largest(IndexVec<A> v) {
  for (int stride = kLanes<A> / 2; stride > 0; stride /= 2) {
    IndexVec<A> other;
    for (int j = 0; j < kLanes<A>; ++j) other[j] = j ^ stride;
    const IndexVec<A> moved = shuffle(v, v, other);
    v = v > moved ? v : moved;
  }
  return v[0];
}

// The `count` cells of a bin along one axis of the map, before offsets shift them.
struct Cells {
  Cells(const Side& side, int64_t bin, int64_t bins) {
    const double from = __builtin_floor(double(bin) * side.size / double(bins));
    count = __builtin_ceil(double(bin + 1) * side.size / double(bins)) - from;
    start = side.low + from;
  }
  double start, count;
};

// The pixels that the shifted cells read, in each lane.
template <class A>
struct Span {
  // `offset` is multiplied by `gamma` and the size of the box.
  Span(const RoiProblem& p, const Cells& cells, const Side& side, const A* offset, int64_t size) {
    for (int part = 0; part < kLanes<A>; part += kPart) {
      typedef A Narrow __attribute__((vector_size(kPart * sizeof(A))));
      Narrow some;
      std::memcpy(&some, offset + part, sizeof some);
      const Part shift = p.gamma * __builtin_convertvector(some, Part) * side.size;
      const Part start = cells.start + shift, low = round_down(start), high = low + cells.count;
      const Part none = Part{} - 1, end = Part{} + double(size);
      const IndexVec<double> reads = (high >= 0) & (low < end);
      put(reads ? (low > 0 ? low : Part{}) : Part{}, part, &first);
      put(reads ? (high < end ? high : end - 1) : none, part, &last);
      put((low >= 0) & (low < end) ? low : none, part, &one);
      put((high >= 0) & (high < end) ? high : none, part, &other);
      put(start != start ? Part{} + 1 : Part{}, part, &undefined);
      put(start - low, part, &fraction);
    }
    length = largest<A>(last - first) + 1;
  }

  // The outer two cells weigh less than one.
  Vec<A> weight(IndexVec<A> pixel) const {
    const Vec<A> inner = Vec<A>{} + 1;
    return pixel == one ? inner - fraction : pixel == other ? fraction : inner;
  }
  Vec<A> slope(IndexVec<A> pixel) const {
    return pixel == one ? Vec<A>{} - 1 : pixel == other ? Vec<A>{} + 1 : Vec<A>{};
  }

  IndexVec<A> first, last;  // pixels; last < first: none
  IndexVec<A> one, other;   // the outer two cells; -1 outside the map
  IndexVec<A> undefined;    // 1 where the position is NaN
  Vec<A> fraction;
  Index<A> length;          // maximum number of pixels of a lane

 private:
  template <class V>
  static void put(Part numbers, int part, V* to) {
    typedef std::remove_reference_t<decltype((*to)[0])> Number;
    typedef Number Narrow __attribute__((vector_size(kPart * sizeof(A))));
    const Narrow narrow = __builtin_convertvector(numbers, Narrow);
    std::memcpy(reinterpret_cast<char*>(to) + part * sizeof(A), &narrow, sizeof narrow);
  }
};

// What a vector of channels reads from the map for one bin of a box.
template <class A>
struct Place {
  Place(const RoiProblem& p, const Box& box, int64_t bin, const A* offset_x, const A* offset_y)
      : Place(p, box, Cells(box.y, bin / p.out_w, p.out_h), Cells(box.x, bin % p.out_w, p.out_w), offset_x, offset_y) {}

  IndexVec<A> undefined() const { return (rows.undefined | columns.undefined) != 0; }

  Span<A> rows, columns;
  A scale;  // of the mean

 private:
  Place(const RoiProblem& p, const Box& box, const Cells& y, const Cells& x, const A* offset_x, const A* offset_y)
      : rows(p, y, box.y, offset_y, p.in_h),
        columns(p, x, box.x, offset_x, p.in_w),
        scale(A(1 / most(y.count * x.count, 1.0))) {}
};

// A block of planes of the map has a vector of channels for each pixel. Returns the indices of channel j of pixel[j].
template <class A>
inline IndexVec<A> in_block(IndexVec<A> pixel) {
  IndexVec<A> lanes;
  for (int j = 0; j < kLanes<A>; ++j) lanes[j] = j;
  return pixel * kLanes<A> + lanes;
}

template <class A>
inline Vec<A> numbers_at(const A* block, IndexVec<A> at) {
  Index<A> places[kLanes<A>];
  std::memcpy(places, &at, sizeof at);
  A values[kLanes<A>];
#pragma GCC unroll 16
  for (int j = 0; j < kLanes<A>; ++j) values[j] = block[places[j]];
  return load(values);
}

template <class A>
inline void add_at(A* block, IndexVec<A> at, Vec<A> values) {
  Index<A> places[kLanes<A>];
  std::memcpy(places, &at, sizeof at);
  A numbers[kLanes<A>];
  store(numbers, values);
#pragma GCC unroll 16
  for (int j = 0; j < kLanes<A>; ++j) block[places[j]] += numbers[j];
}

// Means over a bin, with one channel per lane. Sums in the order of `pool_plane`, so that zero offsets give the same
// bits as no offsets: first each column, then columns a vector apart, then halves of that vector. `sums` has room for
// all columns.
template <class A>
Vec<A> pool_cells(const Place<A>& place, const A* block, Index<A> width, A* sums) {
  const auto &rows = place.rows, &columns = place.columns;
  constexpr int n = kLanes<A>;
  for (Index<A> j = 0; j < columns.length; ++j) store(sums + j * n, Vec<A>{});
  for (Index<A> i = 0; i < rows.length; ++i) {
    const IndexVec<A> y = rows.first + i, row = y * width, inside = y <= rows.last;
    const Vec<A> weight = rows.weight(y);
    for (Index<A> j = 0; j < columns.length; ++j) {
      const IndexVec<A> x = columns.first + j, reads = inside & (x <= columns.last);
      const Vec<A> values = numbers_at<A>(block, in_block<A>((row + x) & reads));
      store(sums + j * n, multiply_add(reads ? values : Vec<A>{}, weight, load(sums + j * n)));
    }
  }
  Vec<A> totals[n] = {};
  for (Index<A> j = 0; j < columns.length; ++j)
    totals[j % n] = multiply_add(load(sums + j * n), columns.weight(columns.first + j), totals[j % n]);
  for (int half = n / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) totals[j] += totals[j + half];
  return place.undefined() ? Vec<A>{} + A(kNaN) : totals[0] * place.scale;
}

// Adds the gradient of the map to `sums`, and stores the derivatives of the means with respect to their positions,
// times `grad`. `sums` or `block` is null if the gradient that it is for is not needed.
template <class A>
void pool_cells_backward(const Place<A>& place, const A* block, Index<A> width, Vec<A> grad, A* sums, Vec<A>* by_x,
                         Vec<A>* by_y) {
  const auto &rows = place.rows, &columns = place.columns;
  Vec<A> total_x{}, total_y{};
  for (Index<A> i = 0; i < rows.length; ++i) {
    const IndexVec<A> y = rows.first + i, row = y * width, inside = y <= rows.last;
    const Vec<A> row_weight = rows.weight(y), grads = grad * row_weight;
    Vec<A> value{}, slope{};
    for (Index<A> j = 0; j < columns.length; ++j) {
      const IndexVec<A> x = columns.first + j, reads = inside & (x <= columns.last);
      const IndexVec<A> at = in_block<A>((row + x) & reads);
      const Vec<A> weight = columns.weight(x);
      if (block) {
        const Vec<A> read = numbers_at<A>(block, at), values = reads ? read : Vec<A>{};
        value = multiply_add(values, weight, value);
        slope = multiply_add(values, columns.slope(x), slope);
      }
      if (sums) add_at<A>(sums, at, reads ? grads * weight : Vec<A>{});
    }
    total_x = multiply_add(slope, row_weight, total_x);
    total_y = multiply_add(value, inside ? rows.slope(y) : Vec<A>{}, total_y);
  }
  const Vec<A> undefined = Vec<A>{} + A(kNaN);
  // Where nothing is read, not even the gradient may be NaN.
  const IndexVec<A> reads = (rows.first <= rows.last) & (columns.first <= columns.last);
  *by_x = place.undefined() ? undefined : reads ? total_x * grad : Vec<A>{};
  *by_y = place.undefined() ? undefined : reads ? total_y * grad : Vec<A>{};
}

// ---------------------------------------------------------------------------- the whole pass

// Whether these passes apply: each channel has its own offsets, there are enough for half a vector, and indices into a
// block fit into lanes.
template <class A>
bool for_each_class(const RoiProblem& p) {
  return p.sampling == kBins && p.groups == p.out_channels && p.groups > 1 && 2 * p.groups >= kLanes<A> &&
         p.in_h * p.in_w <= INT32_MAX / kLanes<A>;
}

// Sizes. `planes` per channel: one, plus one for the gradient in the backward pass.
template <class A, class Tensors>
struct CellsPlan : RoiProblem {
  CellsPlan(const RoiProblem& p, const Tensors& tensors, int64_t planes)
      : RoiProblem(p),
        tensors(tensors),
        bins(out_h * out_w),
        pixels(in_h * in_w),
        lanes(round_up(out_channels, kLanes<A>)),
        block_size(pixels * kLanes<A>),
        piece(kLanes<A> * most<int64_t>(1, kPlanesBytes / (planes * block_size * int64_t(sizeof(A))))),
        pieces(ceil_div(lanes, piece)) {}

  const Tensors& tensors;
  int64_t bins, pixels;
  int64_t lanes;          // for all channels, in whole vectors
  int64_t block_size;     // elements of the planes of a vector of channels
  int64_t piece, pieces;  // channels that are processed at a time, and how many such pieces there are
};

// Values for each box, bin and channel, stored bin by bin; in tensors, the bin is the last dimension.
template <class A>
struct ByBin {
  template <class Plan>
  ByBin(const Plan& p, Memory& memory)
      : data(memory.take<A>(p.bins * p.boxes * p.lanes)), bin_size(p.boxes * p.lanes), lanes(p.lanes) {}

  A* at(int64_t bin, int64_t r, int64_t channel) const { return data + bin * bin_size + r * lanes + channel; }

  // Reads the values of a box from a tensor of any dtype, whose channels are `stride` elements apart.
  template <class Plan>
  void read(const Plan& p, int64_t r, const void* tensor, int32_t dtype, int64_t begin, int64_t stride) const {
    with_type(dtype, [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(tensor) + begin;
      transpose<A>(from, stride, p.out_channels, p.bins, at(0, r, 0), bin_size);
    });
    for (int64_t bin = 0; bin < p.bins; ++bin)
      for (int64_t c = p.out_channels; c < lanes; ++c) *at(bin, r, c) = A(0);
  }

  // The inverse.
  template <class Plan>
  void write(const Plan& p, int64_t r, void* tensor, int32_t dtype, int64_t begin, int64_t stride) const {
    with_type(dtype, [&](auto type) {
      auto* to = static_cast<decltype(type)*>(tensor) + begin;
      transpose<A>(at(0, r, 0), bin_size, p.bins, p.out_channels, to, stride);
    });
  }

  A* data;
  int64_t bin_size, lanes;
};

// State that the threads share.
template <class A>
struct CellsShared : Boxes {
  template <class Plan>
  CellsShared(const Plan& p, Memory& memory) : Boxes(p, memory), x(p, memory), y(p, memory), outputs(p, memory) {}

  ByBin<A> x, y;     // offsets, later overwritten by their gradients
  ByBin<A> outputs;  // or, in the backward pass, their gradients
};

// Code shared by both passes.
template <class T, class Tensors>
class CellsPass {
 protected:
  using A = typename ComputeOf<T>::type;
  using Plan = CellsPlan<A, Tensors>;
  using Shared = CellsShared<A>;

  CellsPass(const Plan& plan, const Shared& shared, Memory& memory)
      : plan(plan), shared(shared), planes(memory.take_zeros<A>(plan.piece * plan.pixels)) {}

  void read_offsets(int64_t r) const {
    const int64_t begin = 2 * r * plan.groups * plan.bins;
    shared.x.read(plan, r, plan.tensors.offset, plan.offset_dtype, begin, 2 * plan.bins);
    shared.y.read(plan, r, plan.tensors.offset, plan.offset_dtype, begin + plan.bins, 2 * plan.bins);
  }

  // Calls visit(bin, first channel, number of channels, image); one thread handles all images of a bin and piece.
  template <class Visit>
  void for_each_piece(Visit visit) const {
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < plan.bins * plan.pieces; ++item) {
      const int64_t begin = item / plan.bins * plan.piece;
      for (int64_t n = 0; n < plan.batch; ++n)
        visit(item % plan.bins, begin, least(plan.piece, plan.out_channels - begin), n);
    }
  }

  // Calls visit(box, channel, block) for each vector of channels of a piece and each box of an image.
  template <class Visit>
  void for_each_block(int64_t begin, int64_t channels, int64_t n, Visit visit) const {
    for (int64_t i = shared.start[n]; i < shared.start[n + 1]; ++i)
      for (int64_t c = 0; c < channels; c += kLanes<A>) visit(shared.order[i], begin + c, c / kLanes<A>);
  }

  void read_planes(int64_t bin, int64_t begin, int64_t channels, int64_t n) const {
    const T* input = static_cast<const T*>(plan.tensors.input);
    for (int64_t c = 0; c < channels; c += kLanes<A>)
      transpose<A>(input + plane(bin, begin + c, n), plan.bins * plan.pixels, least<int64_t>(kLanes<A>, channels - c),
                   plan.pixels, planes + c * plan.pixels, kLanes<A>);
  }
  int64_t plane(int64_t bin, int64_t channel, int64_t n) const {
    return ((n * plan.out_channels + channel) * plan.bins + bin) * plan.pixels;
  }

  Place<A> place(int64_t bin, int64_t r, int64_t channel) const {
    return Place<A>(plan, shared.box[r], bin, shared.x.at(bin, r, channel), shared.y.at(bin, r, channel));
  }

  const Plan& plan;
  const Shared& shared;
  A* planes;  // of a piece
};

template <class T>
class CellsForward : CellsPass<T, RoiForwardTensors> {
  using Pass = CellsPass<T, RoiForwardTensors>;
  using Pass::plan, Pass::shared, Pass::planes;
  using A = typename Pass::A;
  using Plan = typename Pass::Plan;
  using Shared = typename Pass::Shared;

 public:
  CellsForward(const Plan& plan, const Shared& shared, Memory& memory)
      : Pass(plan, shared, memory), sums(memory.take<A>(plan.in_w * kLanes<A>)) {}

  static int run_team(const RoiProblem& p, const RoiForwardTensors& tensors) {
    return DEFORMNET_ISA::run_team<Shared, CellsForward>(Plan(p, tensors, 1));
  }

  void run() const {
#pragma omp for
    for (int64_t r = 0; r < plan.boxes; ++r) this->read_offsets(r);
    this->for_each_piece([&](int64_t bin, int64_t begin, int64_t channels, int64_t n) {
      if (shared.start[n] == shared.start[n + 1]) return;
      this->read_planes(bin, begin, channels, n);
      this->for_each_block(begin, channels, n, [&](int64_t r, int64_t c, int64_t block) {
        store(shared.outputs.at(bin, r, c),
              pool_cells<A>(this->place(bin, r, c), planes + block * plan.block_size, Index<A>(plan.in_w), sums));
      });
    });
#pragma omp for
    for (int64_t r = 0; r < plan.boxes; ++r)
      shared.outputs.write(plan, r, plan.tensors.output, plan.dtype, r * plan.out_channels * plan.bins, plan.bins);
  }

 private:
  A* sums;  // of columns
};

template <class T>
class CellsBackward : CellsPass<T, RoiBackwardTensors> {
  using Pass = CellsPass<T, RoiBackwardTensors>;
  using Pass::plan, Pass::shared, Pass::planes;
  using A = typename Pass::A;
  using Plan = typename Pass::Plan;
  using Shared = typename Pass::Shared;

 public:
  CellsBackward(const Plan& plan, const Shared& shared, Memory& memory)
      : Pass(plan, shared, memory), sums(memory.take<A>(plan.piece * plan.pixels)) {}

  static int run_team(const RoiProblem& p, const RoiBackwardTensors& tensors) {
    return DEFORMNET_ISA::run_team<Shared, CellsBackward>(Plan(p, tensors, 2));
  }

  void run() const {
    const int64_t size = plan.out_channels * plan.bins;
#pragma omp for
    for (int64_t r = 0; r < plan.boxes; ++r) {
      this->read_offsets(r);
      shared.outputs.read(plan, r, plan.tensors.grad_output, plan.dtype, r * size, plan.bins);
    }
    this->for_each_piece([&](int64_t bin, int64_t begin, int64_t channels, int64_t n) {
      if (plan.tensors.grad_offset) this->read_planes(bin, begin, channels, n);
      if (plan.tensors.grad_input) std::memset(sums, 0, size_t(plan.piece * plan.pixels) * sizeof(A));
      this->for_each_block(begin, channels, n, [&](int64_t r, int64_t c, int64_t block) {
        differentiate(bin, r, c, block * plan.block_size);
      });
      if (plan.tensors.grad_input) write_planes(bin, begin, channels, n);
    });
    if (!plan.tensors.grad_offset) return;
#pragma omp for
    for (int64_t r = 0; r < plan.boxes; ++r) {
      shared.x.write(plan, r, plan.tensors.grad_offset, plan.offset_dtype, 2 * r * size, 2 * plan.bins);
      shared.y.write(plan, r, plan.tensors.grad_offset, plan.offset_dtype, 2 * r * size + plan.bins, 2 * plan.bins);
    }
  }

 private:
  void differentiate(int64_t bin, int64_t r, int64_t c, int64_t block) const {
    const Place<A> place = this->place(bin, r, c);
    Vec<A> by_x, by_y;
    pool_cells_backward<A>(place, plan.tensors.grad_offset ? planes + block : nullptr, Index<A>(plan.in_w),
                           load(shared.outputs.at(bin, r, c)) * place.scale,
                           plan.tensors.grad_input ? sums + block : nullptr, &by_x, &by_y);
    const Box& box = shared.box[r];
    store_scaled(by_x, box.x.size, shared.x.at(bin, r, c));
    store_scaled(by_y, box.y.size, shared.y.at(bin, r, c));
  }

  // In double, since sizes may exceed the range of A.
  void store_scaled(Vec<A> grads, double size, A* to) const {
    A numbers[kLanes<A>];
    store(numbers, grads);
    for (int j = 0; j < kLanes<A>; ++j) to[j] = A(double(numbers[j]) * size * plan.gamma);
  }

  void write_planes(int64_t bin, int64_t begin, int64_t channels, int64_t n) const {
    T* grad_input = static_cast<T*>(plan.tensors.grad_input);
    for (int64_t c = 0; c < channels; c += kLanes<A>)
      transpose<A>(sums + c * plan.pixels, kLanes<A>, plan.pixels, least<int64_t>(kLanes<A>, channels - c),
                   grad_input + this->plane(bin, begin + c, n), plan.bins * plan.pixels);
  }

  A* sums;  // the gradient of the planes
};

}  // namespace
}  // namespace deformnet::DEFORMNET_ISA

// Where the samples of a bin lie: boxes, and the rows and columns of the map that a bin reads.
#pragma once

#include "common.h"
#include "problem.h"

namespace deformnet::DEFORMNET_ISA {
namespace {

constexpr int64_t kAhead = 6;  // boxes whose numbers are fetched in advance
constexpr double kNaN = __builtin_nan("");

// How a box lies on one axis of the map, in pixels of the map.
struct Side {
  double low, size;  // NaN where the box is undefined
  double length;     // of a bin
  double step, count;  // of samples in a bin; for kBins, bins differ
};

struct Box {
  int64_t image;  // 0 for undefined boxes
  Side y, x;
};

Side side(const RoiProblem& p, double low, double high, bool exists, int64_t bins) {
  Side s{};
  const double scale = p.spatial_scale;
  if (p.sampling == kBins) {
    s.low = __builtin_round(low * scale);
    s.size = most(__builtin_round(high * scale) - s.low + 1, 1.0);
  } else if (p.sampling == kMsra) {
    s.low = __builtin_round(low) * scale - 0.5;
    s.size = most((__builtin_round(high) + 1) * scale - 0.5 - s.low, 0.1);
  } else {
    s.low = low * scale - 0.5;
    s.size = high * scale - 0.5 - s.low;
  }
  // NaN fails every comparison. The corners are tested, too: the minimum size hides one at minus infinity.
  const double largest = __DBL_MAX__;
  const auto finite = [largest](double number) { return __builtin_fabs(number) <= largest; };
  if (!exists || !finite(s.low) || !finite(s.size) || !finite(low) || !finite(high))
    s.low = s.size = kNaN;
  s.length = s.size / double(bins);
  s.count = double(p.samples_per_bin);
  // A box turned inside out has no samples where their number adapts.
  if (p.samples_per_bin == 0) s.count = s.length > 0 ? __builtin_ceil(s.length) : 0;
  s.step = p.sampling == kBins ? 1 : s.length / most(s.count, 1.0);
  return s;
}

Box read_box(const RoiProblem& p, const void* boxes, int64_t r) {
  double v[5];
  for (int i = 0; i < 5; ++i) v[i] = read_number(boxes, p.boxes_dtype, 5 * r + i);
  const bool exists = v[0] >= 0 && v[0] < double(p.batch);
  return {exists ? int64_t(v[0]) : 0, side(p, v[2], v[4], exists, p.out_h),
          side(p, v[1], v[3], exists, p.out_w)};
}

// Samples are placed a few at a time.
typedef double Doubles __attribute__((vector_size(32)));
typedef int64_t Longs __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(16)));

// What a bin reads along one axis of the map. `Slopes`: with derivatives.
template <class A, bool Slopes>
class Axis {
 public:
  Axis(Memory& memory, int64_t size)
      : weight(memory.take_zeros<A>(size + kLanes<A>)),
        slope(memory.take_zeros<A>(size + kLanes<A>)),
        read(memory.take_zeros<Index<A>>(size + kLanes<A>)),
        pixels(memory.take<int64_t>(size)),
        weights(memory.take<A>(size)),
        slopes(memory.take<A>(size)),
        size_(size) {}

  // Places the samples of a bin. False if their position is NaN.
  bool place(const RoiProblem& p, const Side& side, int64_t bin, int64_t bins, double shift) {
    for (int64_t q = first; q < last; q += kLanes<A>) {
      store(weight + q, Vec<A>{});
      if constexpr (Slopes) store(slope + q, Vec<A>{});
      const IndexVec<A> none{};
      std::memcpy(read + q, &none, sizeof none);
    }
    first = size_;
    last = 0;
    if (p.sampling == kBins) {
      const double from = __builtin_floor(double(bin) * side.size / double(bins));
      number = __builtin_ceil(double(bin + 1) * side.size / double(bins)) - from;
      return place_cells(side.low + from + shift);
    }
    double start = side.low + double(bin) * side.length;
    if (p.sampling == kAligned) start += side.step / 2;
    return place_samples(p, side, start + shift);
  }

  // Lists the pixels that are read.
  void list() {
    count = 0;
    for (int64_t q = first; q < last; ++q) {
      pixels[count] = q;
      weights[count] = weight[q];
      if constexpr (Slopes) slopes[count] = slope[q];
      count -= read[q];
    }
  }

  // By pixel of the map, zero outside [first, last): the weight, its derivative by the position, and -1 where the
  // pixel is read, even with a weight of zero. There is room for one more vector at the end.
  A *weight, *slope;
  Index<A>* read;
  int64_t first = 0, last = 0;
  double number = 0;  // of samples in the mean
  // The same for the pixels that are read, one after another.
  int64_t count = 0;
  int64_t* pixels;
  A *weights, *slopes;

 private:
  // Cells with a sample each, side by side, and zero outside the map: the inner ones have weight 1.
  bool place_cells(double start) {
    if (start != start) return false;
    const double low = __builtin_floor(start), end = double(size_);
    const A fraction = A(start - low);
    if (low + number < 0) return true;
    first = low < 0 ? 0 : low < end ? int64_t(low) : size_;
    last = low + number < end ? int64_t(low + number) + 1 : size_;
    // The outer two cells, if they lie on the map. Whole vectors are stored: single numbers would have to reach
    // memory before a vector of them can be read.
    const Index<A> one = low >= 0 && low < end ? Index<A>(low) : Index<A>(-1);
    const Index<A> other = low + number < end ? Index<A>(low + number) : Index<A>(-1);
    IndexVec<A> lanes;
    for (int j = 0; j < kLanes<A>; ++j) lanes[j] = Index<A>(j);
    for (int64_t q = first; q < last; q += kLanes<A>) {
      const IndexVec<A> pixel = lanes + Index<A>(q), within = pixel < Index<A>(last);
      Vec<A> weights = within ? Vec<A>{} + 1 : Vec<A>{};
      weights = pixel == one ? Vec<A>{} + (1 - fraction) : weights;
      weights = pixel == other ? Vec<A>{} + fraction : weights;
      store(weight + q, weights);
      if constexpr (Slopes)
        store(slope + q, pixel == one ? Vec<A>{} - 1 : pixel == other ? Vec<A>{} + 1 : Vec<A>{});
      std::memcpy(read + q, &within, sizeof within);
    }
    return true;
  }

  bool place_samples(const RoiProblem& p, const Side& side, double start) {
    if (start != start) return false;
    const bool msra = p.sampling == kMsra;
    const double lowest = msra ? -0.5 : -1, highest = double(size_) - (msra ? 0.5 : 0);
    const double end = double(size_ - 1);
    double begin = 0;
    int64_t samples = p.samples_per_bin;
    if (samples == 0) {
      // Only samples that can lie on the map, and one more at each end because of rounding: a box of any size
      // costs no more than one of the map's size. Steps are more than a half if there are several.
      begin = __builtin_floor((-1 - start) / side.step) - 1;
      begin = begin > 0 ? least(begin, side.count) : 0;
      double behind = __builtin_floor((double(size_) - start) / side.step) + 2;
      behind = behind < side.count ? behind : side.count;
      const double some = least(behind - begin, double(2 * size_ + 7));
      samples = some > 0 ? int64_t(some) : 0;
    }
    Ints inside{};
    for (int64_t i = 0; i < samples; i += 4) {
      const Doubles lanes = {0, 1, 2, 3};
      Doubles at = start + (lanes + (begin + double(i))) * side.step;
      const Longs within = (at >= lowest) & (at <= highest) & (lanes < double(samples - i));
      // Beyond the last pixel's center the value is the last pixel's.
      const Longs moves = (at >= 0) & (at <= end);
      at = at > 0 ? at : Doubles{};
      at = at < end ? at : Doubles{} + end;
      const Ints cells = __builtin_convertvector(at, Ints);
      const Ints counts = __builtin_convertvector(within, Ints);
      inside -= counts;
      place_four(cells, at - __builtin_convertvector(cells, Doubles), counts, moves,
                 least<int64_t>(4, samples - i), i > 0);
    }
    number = side.count;
    if (msra) {
      inside += shuffle(inside, inside, Ints{2, 3, 0, 1});
      number = double(inside[0] + inside[1]);
    }
    return true;
  }

  // Places up to four samples, each a fraction of the way from a cell to the next, where they count.
  // `more`: beside others.
  __attribute__((always_inline)) void place_four(Ints cells, Doubles fractions, Ints counts, Longs moves,
                                                 int64_t samples, bool more) {
    typedef A Four __attribute__((vector_size(4 * sizeof(A))));
    // Arrays: to read the lanes of a vector one by one is slow.
    int32_t low[4], high[4];
    A low_weight[4], high_weight[4], move[4];
    const Four fraction = __builtin_convertvector(fractions, Four), rest = 1 - fraction;
    const Four moving = -__builtin_convertvector(moves, Four);
    // Samples that do not count lie on no pixel.
    const Ints here = counts ? cells : Ints{} - 1;
    const Ints next = counts ? cells - (cells < int32_t(size_ - 1)) : Ints{} - 1;
    std::memcpy(low, &here, sizeof low);
    std::memcpy(high, &next, sizeof high);
    std::memcpy(low_weight, &rest, sizeof rest);
    std::memcpy(high_weight, &fraction, sizeof fraction);
    std::memcpy(move, &moving, sizeof moving);

    int32_t ends[4];
    std::memcpy(ends, &cells, sizeof ends);
    const int64_t one = ends[0], other = ends[samples - 1];
    const int64_t from = least(one, other), to = least(most(one, other) + 2, size_);
    IndexVec<A> lanes;
    for (int j = 0; j < kLanes<A>; ++j) lanes[j] = Index<A>(j);
    for (int64_t q = from; q < to; q += kLanes<A>) {
      const IndexVec<A> pixel = lanes + Index<A>(q);
      // Two chains of sums take half the time of one.
      Vec<A> lows{}, highs{}, slopes{};
      IndexVec<A> reads{};
#pragma GCC unroll 1
      for (int64_t j = 0; j < samples; ++j) {
        const IndexVec<A> is_low = pixel == Index<A>(low[j]), is_high = pixel == Index<A>(high[j]);
        lows += is_low ? Vec<A>{} + low_weight[j] : Vec<A>{};
        highs += is_high ? Vec<A>{} + high_weight[j] : Vec<A>{};
        if constexpr (Slopes) {
          const Vec<A> moves = Vec<A>{} + move[j];
          slopes += (is_high ? moves : Vec<A>{}) - (is_low ? moves : Vec<A>{});
        }
        reads |= is_low | is_high;
      }
      if (more) {
        lows += load(weight + q);
        if constexpr (Slopes) slopes += load(slope + q);
        IndexVec<A> before;
        std::memcpy(&before, read + q, sizeof before);
        reads |= before;
      }
      store(weight + q, lows + highs);
      if constexpr (Slopes) store(slope + q, slopes);
      std::memcpy(read + q, &reads, sizeof reads);
    }
    first = least(first, from);
    last = most(last, to);
  }

  int64_t size_;
};

// Where the shift by x of a bin lies in `offset`; that by y is as many bins farther on.
inline int64_t offset_index(const RoiProblem& p, int64_t r, int64_t group, int64_t bin) {
  return (r * p.groups + group) * 2 * p.out_h * p.out_w + bin;
}

// What a bin reads of the map: rows times columns.
template <class A, bool Slopes>
struct Window {
  Window(const RoiProblem& p, Memory& memory) : rows(memory, p.in_h), columns(memory, p.in_w) {}

  // Places a bin of a box, for an offset group. False if its position is NaN.
  bool place(const RoiProblem& p, const Box& box, const void* offset, int64_t r, int64_t group,
             int64_t bin) {
    double shift_x = 0, shift_y = 0;
    if (offset) {
      const int64_t at = offset_index(p, r, group, bin), bins = p.out_h * p.out_w;
      shift_x = p.gamma * read_number(offset, p.offset_dtype, at) * box.x.size;
      shift_y = p.gamma * read_number(offset, p.offset_dtype, at + bins) * box.y.size;
    }
    if (!rows.place(p, box.y, bin / p.out_w, p.out_h, shift_y) ||
        !columns.place(p, box.x, bin % p.out_w, p.out_w, shift_x))
      return false;
    scale = A(1 / most(rows.number * columns.number, 1.0));
    return true;
  }

  void list() {
    rows.list();
    columns.list();
  }

  // Fetches the offset of a bin that will be placed soon.
  static void fetch(const RoiProblem& p, const void* offset, int64_t r, int64_t group, int64_t bin) {
    if (!offset) return;
    const int64_t at = offset_index(p, r, group, bin), bins = p.out_h * p.out_w;
    __builtin_prefetch(element(offset, p.offset_dtype, at));
    __builtin_prefetch(element(offset, p.offset_dtype, at + bins));
  }

  Axis<A, Slopes> rows, columns;
  A scale;  // of the mean
};

// The gradient of a bin's offset, from those by the positions of its samples.
void write_offset_grad(const RoiProblem& p, const Box& box, double grad_x, double grad_y, int64_t r,
                       int64_t group, int64_t bin, void* grad_offset) {
  const int64_t at = offset_index(p, r, group, bin), bins = p.out_h * p.out_w;
  const double x = grad_x * box.x.size * p.gamma, y = grad_y * box.y.size * p.gamma;
  write_run(&x, 1, grad_offset, p.offset_dtype, at);
  write_run(&y, 1, grad_offset, p.offset_dtype, at + bins);
}

// The boxes, and their indices by image, ascending: those of image n begin at order[start[n]].
struct Boxes {
  Boxes(const RoiProblem& p, Memory& memory)
      : box(memory.take<Box>(p.boxes)),
        order(memory.take<int64_t>(p.boxes)),
        start(memory.take<int64_t>(p.batch + 1)) {}

  template <class Plan>
  void prepare(const Plan& p) {
    for (int64_t n = 0; n <= p.batch; ++n) start[n] = 0;
    for (int64_t r = 0; r < p.boxes; ++r) {
      box[r] = read_box(p, p.tensors.boxes, r);
      ++start[box[r].image + 1];
    }
    for (int64_t n = 0; n < p.batch; ++n) start[n + 1] += start[n];
    for (int64_t r = 0; r < p.boxes; ++r) order[start[box[r].image]++] = r;
    // Each start has moved to the next one.
    for (int64_t n = p.batch; n > 0; --n) start[n] = start[n - 1];
    start[0] = 0;
  }

  Box* box;
  int64_t *order, *start;
};

}  // namespace
}  // namespace deformnet::DEFORMNET_ISA

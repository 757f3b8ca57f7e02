// Deformable RoI pooling, plain and position-sensitive, forward and backward.
//
// The samples of a bin lie on a grid, and bilinear weights are products. So a bin is a sum over the
// pixels of a few rows and columns of the map, with a weight for each row and one for each column, and
// every pixel is read once, however many samples lie beside it.
//
// Plain. All channels of an offset group have the same samples: the map is channels-last, and a pixel
// is a run of channels. In the backward pass threads split the boxes for the gradient of the offsets,
// and channels for that of the map.
//
// Position-sensitive. A bin has channels of its own, and a few of them or one alone share samples: a
// vector holds neighbouring pixels of a row. Threads split bins and offset groups, and so planes of
// the map, which stay in the cache while the boxes are gone through.
//
// In both, each sum of a gradient is made by one thread, in the order of the boxes: nothing is added
// atomically, and the bits do not depend on the number of threads.
//
// This file is compiled without contraction of products and sums: positions are those of the
// reference to the last bit, so that what lies inside the map and in which cell is the same.
#include <omp.h>

#include "common.h"
#include "kernels.h"

namespace deformnet::DEFORMNET_ISA {
namespace {

constexpr int64_t kBinsBytes = 256 << 10;   // bins of a box with all channels: a part of the private cache
constexpr int64_t kPlanesBytes = 1 << 20;   // planes of the map, at least one; likewise
constexpr int64_t kAhead = 6;               // boxes whose numbers are fetched in advance
constexpr double kNaN = __builtin_nan("");

// ------------------------------------------------------------------------- where samples lie

// How a box lies on one axis of the map, in pixels of the map.
struct Side {
  double low, size;  // NaN where the box is undefined
  double length;     // of a bin
  double step, count;  // of samples in a bin; for kBins, bins differ
};

struct Box {
  int64_t image;  // undefined boxes belong to the first one
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
  // A number that is none fails every comparison. The side, too, must be looked at: the least size hides
  // a last corner at minus infinity.
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

// What a bin reads along one axis of the map. Derivatives are there where `Slopes` is true.
template <class A, bool Slopes>
class Axis {
 public:
  static int64_t bytes(int64_t size) {
    using W = Workspace;
    const int64_t row = size + kLanes<A>;
    return W::bytes_of<Index<A>>(row) + W::bytes_of<int64_t>(size) + W::bytes_of<A>(2 * row + 2 * size);
  }

  Axis(char* memory, int64_t size) : size_(size) {
    using W = Workspace;
    const int64_t row = size + kLanes<A>;
    std::memset(memory, 0, size_t(bytes(size)));
    read = reinterpret_cast<Index<A>*>(memory);
    memory += W::bytes_of<Index<A>>(row);
    pixels = reinterpret_cast<int64_t*>(memory);
    memory += W::bytes_of<int64_t>(size);
    weight = reinterpret_cast<A*>(memory);
    slope = weight + row;
    weights = slope + row;
    slopes = weights + size;
  }

  // Places the samples of a bin. False where they lie at no number.
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

  // By pixel of the map, zero outside [first, last): the weight, its derivative by the position, and
  // -1 where the pixel is read, be it with a weight of zero. Room for a vector more at the end.
  A *weight, *slope;
  Index<A>* read;
  int64_t first = 0, last = 0;
  double number = 0;  // of samples that the mean is of
  // The same of the pixels that are read, one after another.
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
    // The outer two cells, where they lie on the map. Whole vectors are stored: single numbers would
    // have to reach memory before a vector of them can be read.
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
      // Only those that can lie on the map, and one more at each end for the sake of rounding: a
      // box of any size costs no more than one of the map's size. Steps are more than a half where
      // there are several.
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
      // Beyond the last pixel's centre the value is the last pixel's.
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
      inside += __builtin_shuffle(inside, Ints{2, 3, 0, 1});
      number = double(inside[0] + inside[1]);
    }
    return true;
  }

  // Places up to four samples, each a fraction of the way from a cell to the next, where they count.
  // `more`: beside others.
  __attribute__((always_inline)) void place_four(Ints cells, Doubles fractions, Ints counts, Longs moves, int64_t samples, bool more) {
    typedef A Four __attribute__((vector_size(4 * sizeof(A))));
    // Arrays: a vector of which all lanes are asked for one by one is taken apart at some cost.
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

// What a bin reads of the map: rows times columns.
template <class A, bool Slopes>
struct Window {
  static int64_t bytes(const RoiProblem& p) { return Axis<A, Slopes>::bytes(p.in_h) + Axis<A, Slopes>::bytes(p.in_w); }
  Window(char* memory, const RoiProblem& p)
      : rows(memory, p.in_h), columns(memory + Axis<A, Slopes>::bytes(p.in_h), p.in_w) {}

  // Bin (i, j) of a box, for an offset group. False where its position is not a number.
  bool place(const RoiProblem& p, const Box& box, const void* offset, int64_t r, int64_t group,
             int64_t bin) {
    double shift_x = 0, shift_y = 0;
    if (offset) {
      const int64_t bins = p.out_h * p.out_w, at = (r * p.groups + group) * 2 * bins + bin;
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

  // Has the offset of a bin fetched, which will be placed soon.
  static void fetch(const RoiProblem& p, const void* offset, int64_t r, int64_t group, int64_t bin) {
    if (!offset) return;
    const int64_t bins = p.out_h * p.out_w, at = (r * p.groups + group) * 2 * bins + bin;
    __builtin_prefetch(element(offset, p.offset_dtype, at));
    __builtin_prefetch(element(offset, p.offset_dtype, at + bins));
  }

  Axis<A, Slopes> rows, columns;
  A scale;  // of the mean
};

// The gradient of a bin's offset, from those by the positions of its samples.
void write_offset_grad(const RoiProblem& p, const Box& box, double grad_x, double grad_y, int64_t r,
                       int64_t group, int64_t bin, void* grad_offset) {
  const int64_t bins = p.out_h * p.out_w, at = (r * p.groups + group) * 2 * bins + bin;
  const double x = grad_x * box.x.size * p.gamma, y = grad_y * box.y.size * p.gamma;
  write_run(&x, 1, grad_offset, p.offset_dtype, at);
  write_run(&y, 1, grad_offset, p.offset_dtype, at + bins);
}

// The boxes, and the numbers of those of each image: of image n, order[start[n]] and on, ascending.
struct Boxes {
  static int64_t bytes(const RoiProblem& p) {
    return Workspace::bytes_of<Box>(p.boxes) + Workspace::bytes_of<int64_t>(p.boxes + p.batch + 1);
  }
  Boxes(const RoiProblem& p, const void* boxes, char* memory) {
    box = reinterpret_cast<Box*>(memory);
    order = reinterpret_cast<int64_t*>(memory + Workspace::bytes_of<Box>(p.boxes));
    start = order + p.boxes;
    for (int64_t n = 0; n <= p.batch; ++n) start[n] = 0;
    for (int64_t r = 0; r < p.boxes; ++r) {
      box[r] = read_box(p, boxes, r);
      ++start[box[r].image + 1];
    }
    for (int64_t n = 0; n < p.batch; ++n) start[n + 1] += start[n];
    for (int64_t r = 0; r < p.boxes; ++r) order[start[box[r].image]++] = r;
    // Each start has moved to where the next one was.
    for (int64_t n = p.batch; n > 0; --n) start[n] = start[n - 1];
    start[0] = 0;
  }

  Box* box;
  int64_t *order, *start;
};

// ------------------------------------------------------------------------------------ plain

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

template <class T>
int plain_forward(const RoiProblem& p, const RoiForwardTensors& tensors) {
  using A = typename ComputeOf<T>::type;
  using W = Workspace;
  const T* input = static_cast<const T*>(tensors.input);
  T* output = static_cast<T*>(tensors.output);
  const int64_t channels = p.out_channels, bins = p.out_h * p.out_w, pixels = p.in_h * p.in_w;
  const int64_t group_channels = channels / p.groups, row = p.in_w * channels;
  const bool copied = !p.input_channels_last || !kSame<A, T>;
  // Bins of a box that are made at a time, so that they are written channel by channel.
  const int64_t block = least(bins, most<int64_t>(16, round_up(kBinsBytes / (channels * int64_t(sizeof(A))), 16)));
  const int64_t blocks = ceil_div(bins, block);

  const int64_t private_bytes = Window<A, false>::bytes(p) + W::bytes_of<A>(block * channels);
  if (!workspace.reserve(Boxes::bytes(p) + (copied ? W::bytes_of<A>(pixels * channels) : 0) +
                         p.threads * private_bytes))
    return 1;
  const Boxes boxes(p, tensors.boxes, workspace.take<char>(Boxes::bytes(p)));
  A* copy = copied ? workspace.take<A>(pixels * channels) : nullptr;
  char* private_memory = workspace.take<char>(p.threads * private_bytes);

#pragma omp parallel num_threads(p.threads)
  {
    char* mine = private_memory + omp_get_thread_num() * private_bytes;
    Window<A, false> window(mine, p);
    A* sums = reinterpret_cast<A*>(mine + Window<A, false>::bytes(p));
    for (int64_t n = 0; n < p.batch; ++n) {
      const int64_t count = boxes.start[n + 1] - boxes.start[n];
      if (count == 0) continue;
      const A* map = channels_last<A, T>(input, p.input_channels_last, channels, pixels, n, n + 1, copy);
#pragma omp for schedule(dynamic, 1)
      for (int64_t item = 0; item < count * blocks; ++item) {
        const int64_t r = boxes.order[boxes.start[n] + item / blocks], begin = item % blocks * block;
        const int64_t end = least(begin + block, bins);
        for (int64_t bin = begin; bin < end; ++bin)
          for (int64_t g = 0; g < p.groups; ++g) {
            A* to = sums + (bin - begin) * channels + g * group_channels;
            if (window.place(p, boxes.box[r], tensors.offset, r, g, bin)) {
              window.list();
              pool_channels<A>(window, map + g * group_channels, channels, row, group_channels, to);
            } else {
              for (int64_t c = 0; c < group_channels; ++c) to[c] = A(kNaN);
            }
          }
        transpose<A>(sums, channels, end - begin, channels, output + r * channels * bins + begin, bins);
      }
    }
  }
  workspace.trim();
  return 0;
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

template <class T>
int plain_backward(const RoiProblem& p, const RoiBackwardTensors& tensors) {
  using A = typename ComputeOf<T>::type;
  using W = Workspace;
  const T* input = static_cast<const T*>(tensors.input);
  const T* grad_output = static_cast<const T*>(tensors.grad_output);
  T* grad_input = static_cast<T*>(tensors.grad_input);
  const int64_t channels = p.out_channels, bins = p.out_h * p.out_w, pixels = p.in_h * p.in_w;
  const int64_t group_channels = channels / p.groups, row = p.in_w * channels;
  const int64_t block = least(bins, most<int64_t>(16, round_up(kBinsBytes / (channels * int64_t(sizeof(A))), 16)));
  // Channels of the map are split among threads in whole cache lines.
  const int64_t line = kCacheLine / int64_t(sizeof(A));
  const int64_t slice = round_up(ceil_div(channels, p.threads), line);

  // One image at a time: first its map, then in the same place the gradient of it.
  const int64_t private_bytes = Window<A, true>::bytes(p) + W::bytes_of<A>(block * channels);
  if (!workspace.reserve(Boxes::bytes(p) + W::bytes_of<A>(pixels * channels) + p.threads * private_bytes))
    return 1;
  const Boxes boxes(p, tensors.boxes, workspace.take<char>(Boxes::bytes(p)));
  A* sums = workspace.take<A>(pixels * channels);
  char* private_memory = workspace.take<char>(p.threads * private_bytes);

#pragma omp parallel num_threads(p.threads)
  {
    char* mine = private_memory + omp_get_thread_num() * private_bytes;
    Window<A, true> window(mine, p);
    A* grads = reinterpret_cast<A*>(mine + Window<A, true>::bytes(p));
    for (int64_t n = 0; n < p.batch; ++n) {
      const int64_t first = boxes.start[n], last = boxes.start[n + 1];
      if (tensors.grad_offset && first < last) {
        const A* map = channels_last<A, T>(input, p.input_channels_last, channels, pixels, n, n + 1, sums);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = first; item < last; ++item) {
          const int64_t r = boxes.order[item];
          for (int64_t begin = 0; begin < bins; begin += block) {
            const int64_t end = least(begin + block, bins);
            transpose<A>(grad_output + r * channels * bins + begin, bins, channels, end - begin, grads, channels);
            for (int64_t bin = begin; bin < end; ++bin)
              for (int64_t g = 0; g < p.groups; ++g) {
                double x = kNaN, y = kNaN;
                if (window.place(p, boxes.box[r], tensors.offset, r, g, bin)) {
                  window.list();
                  slope_channels<A>(window, map + g * group_channels, channels, row, group_channels,
                                    grads + (bin - begin) * channels + g * group_channels, &x, &y);
                }
                write_offset_grad(p, boxes.box[r], x, y, r, g, bin, tensors.grad_offset);
              }
          }
        }
      }
      if (!grad_input) continue;
#pragma omp for schedule(static)
      for (int64_t from = 0; from < channels; from += slice) {
        const int64_t to = least(from + slice, channels), width = to - from;
        for (int64_t i = 0; i < pixels; ++i)
          std::memset(sums + i * channels + from, 0, size_t(width) * sizeof(A));
        for (int64_t item = first; item < last; ++item) {
          const int64_t r = boxes.order[item];
          for (int64_t begin = 0; begin < bins; begin += block) {
            const int64_t end = least(begin + block, bins);
            transpose<A>(grad_output + (r * channels + from) * bins + begin, bins, width, end - begin, grads, width);
            for (int64_t bin = begin; bin < end; ++bin)
              for (int64_t g = from / group_channels; g * group_channels < to; ++g) {
                if (!window.place(p, boxes.box[r], tensors.offset, r, g, bin)) continue;
                window.list();
                const int64_t low = most(from, g * group_channels);
                add_channels<A>(window, grads + (bin - begin) * width + low - from, channels, row, low,
                                least(to, (g + 1) * group_channels), sums);
              }
          }
        }
      }
      scatter_map<A, T>(sums, p.input_channels_last, channels, pixels, n, n + 1, grad_input);
    }
  }
  workspace.trim();
  return 0;
}

// ----------------------------------------------------------------------- position-sensitive

// Numbers of a plane in the workspace: a vector may reach beyond the last pixel.
template <class A>
int64_t plane_size(const RoiProblem& p) {
  return round_up(p.in_h * p.in_w + kLanes<A>, kCacheLine / int64_t(sizeof(A)));
}

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
// to `by_x` and `by_y`, and the gradient of the map to `sums`. Null pointers: not wanted.
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

template <class T>
int sensitive_forward(const RoiProblem& p, const RoiForwardTensors& tensors) {
  using A = typename ComputeOf<T>::type;
  using W = Workspace;
  const T* input = static_cast<const T*>(tensors.input);
  T* output = static_cast<T*>(tensors.output);
  const int64_t channels = p.out_channels, bins = p.out_h * p.out_w, pixels = p.in_h * p.in_w;
  const int64_t group_channels = channels / p.groups, size = plane_size<A>(p);
  const int64_t piece = least(group_channels, most<int64_t>(1, kPlanesBytes / (size * int64_t(sizeof(A)))));
  const int64_t pieces = ceil_div(group_channels, piece);

  const int64_t private_bytes = Window<A, false>::bytes(p) + W::bytes_of<A>(piece * size);
  if (!workspace.reserve(Boxes::bytes(p) + p.threads * private_bytes)) return 1;
  const Boxes boxes(p, tensors.boxes, workspace.take<char>(Boxes::bytes(p)));
  char* private_memory = workspace.take<char>(p.threads * private_bytes);

#pragma omp parallel num_threads(p.threads)
  {
    char* mine = private_memory + omp_get_thread_num() * private_bytes;
    Window<A, false> window(mine, p);
    A* planes = reinterpret_cast<A*>(mine + Window<A, false>::bytes(p));
    std::memset(planes, 0, size_t(piece * size) * sizeof(A));
    // Bins of a row, which share cache lines of the output, go to the same thread.
#pragma omp for schedule(dynamic, p.out_w)
    for (int64_t item = 0; item < p.groups * pieces * bins; ++item) {
      const int64_t bin = item % bins, group = item / bins / pieces;
      const int64_t begin = group * group_channels + item / bins % pieces * piece;
      const int64_t end = least(begin + piece, (group + 1) * group_channels);
      for (int64_t n = 0; n < p.batch; ++n) {
        const int64_t first = boxes.start[n], last = boxes.start[n + 1];
        if (first == last) continue;
        for (int64_t c = begin; c < end; ++c)
          convert_row<A>(input + ((n * channels + c) * bins + bin) * pixels, pixels, planes + (c - begin) * size);
        for (int64_t i = first; i < last; ++i) {
          const int64_t r = boxes.order[i];
          if (i + kAhead < last) window.fetch(p, tensors.offset, boxes.order[i + kAhead], group, bin);
          const bool defined = window.place(p, boxes.box[r], tensors.offset, r, group, bin);
          T* to = output + r * channels * bins + bin;
          for (int64_t c = begin; c < end; ++c)
            write(to + c * bins, defined ? pool_plane<A>(window, planes + (c - begin) * size, p.in_w) : A(kNaN));
        }
      }
    }
  }
  workspace.trim();
  return 0;
}

template <class T>
int sensitive_backward(const RoiProblem& p, const RoiBackwardTensors& tensors) {
  using A = typename ComputeOf<T>::type;
  using W = Workspace;
  const T* input = static_cast<const T*>(tensors.input);
  const T* grad_output = static_cast<const T*>(tensors.grad_output);
  T* grad_input = static_cast<T*>(tensors.grad_input);
  const int64_t channels = p.out_channels, bins = p.out_h * p.out_w, pixels = p.in_h * p.in_w;
  const int64_t group_channels = channels / p.groups, size = plane_size<A>(p);
  const int64_t piece = least(group_channels, most<int64_t>(1, kPlanesBytes / (2 * size * int64_t(sizeof(A)))));

  const int64_t private_bytes =
      Window<A, true>::bytes(p) + W::bytes_of<A>(2 * p.boxes) + 2 * W::bytes_of<A>(piece * size);
  if (!workspace.reserve(Boxes::bytes(p) + p.threads * private_bytes)) return 1;
  const Boxes boxes(p, tensors.boxes, workspace.take<char>(Boxes::bytes(p)));
  char* private_memory = workspace.take<char>(p.threads * private_bytes);

#pragma omp parallel num_threads(p.threads)
  {
    char* mine = private_memory + omp_get_thread_num() * private_bytes;
    Window<A, true> window(mine, p);
    A* offset_sums = reinterpret_cast<A*>(mine + Window<A, true>::bytes(p));
    A* planes = offset_sums + W::bytes_of<A>(2 * p.boxes) / int64_t(sizeof(A));
    A* sums = planes + W::bytes_of<A>(piece * size) / int64_t(sizeof(A));
    std::memset(planes, 0, size_t(piece * size) * sizeof(A));
#pragma omp for schedule(dynamic, p.out_w)
    for (int64_t item = 0; item < p.groups * bins; ++item) {
      const int64_t bin = item % bins, group = item / bins;
      for (int64_t i = 0; i < 2 * p.boxes; ++i) offset_sums[i] = A(0);
      for (int64_t begin = group * group_channels; begin < (group + 1) * group_channels; begin += piece) {
        const int64_t end = least(begin + piece, (group + 1) * group_channels);
        for (int64_t n = 0; n < p.batch; ++n) {
          const int64_t first = boxes.start[n], last = boxes.start[n + 1];
          if (tensors.grad_offset && first < last)
            for (int64_t c = begin; c < end; ++c)
              convert_row<A>(input + ((n * channels + c) * bins + bin) * pixels, pixels,
                             planes + (c - begin) * size);
          if (grad_input) std::memset(sums, 0, size_t(piece * size) * sizeof(A));
          for (int64_t i = first; i < last; ++i) {
            const int64_t r = boxes.order[i];
            if (i + kAhead < last) {
              const int64_t ahead = boxes.order[i + kAhead];
              window.fetch(p, tensors.offset, ahead, group, bin);
              __builtin_prefetch(grad_output + (ahead * channels + begin) * bins + bin);
            }
            if (!window.place(p, boxes.box[r], tensors.offset, r, group, bin)) {
              offset_sums[2 * r] = offset_sums[2 * r + 1] = A(kNaN);
              continue;
            }
            const T* from = grad_output + r * channels * bins + bin;
            Vec<A> by_x{}, by_y{};
            for (int64_t c = begin; c < end; ++c) {
              const A grad = A(read(from[c * bins])) * window.scale;
              const int64_t at = (c - begin) * size;
              pool_plane_backward<A>(window, tensors.grad_offset ? planes + at : nullptr, p.in_w, grad, &by_x,
                                     &by_y, grad_input ? sums + at : nullptr);
            }
            if (tensors.grad_offset) {
              offset_sums[2 * r] += sum<A>(by_x);
              offset_sums[2 * r + 1] += sum<A>(by_y);
            }
          }
          if (grad_input)
            for (int64_t c = begin; c < end; ++c)
              convert_row<A>(sums + (c - begin) * size, pixels,
                             grad_input + ((n * channels + c) * bins + bin) * pixels);
        }
      }
      if (tensors.grad_offset)
        for (int64_t r = 0; r < p.boxes; ++r)
          write_offset_grad(p, boxes.box[r], offset_sums[2 * r], offset_sums[2 * r + 1], r, group, bin,
                            tensors.grad_offset);
    }
  }
  workspace.trim();
  return 0;
}

template <class T>
int forward_of(const RoiProblem& p, const RoiForwardTensors& tensors) {
  return p.position_sensitive ? sensitive_forward<T>(p, tensors) : plain_forward<T>(p, tensors);
}

template <class T>
int backward_of(const RoiProblem& p, const RoiBackwardTensors& tensors) {
  return p.position_sensitive ? sensitive_backward<T>(p, tensors) : plain_backward<T>(p, tensors);
}

}  // namespace

int roi_forward(const RoiProblem& p, const RoiForwardTensors& tensors) {
  switch (p.dtype) {
    case kFloat64: return forward_of<double>(p, tensors);
    case kFloat32: return forward_of<float>(p, tensors);
    case kBFloat16: return forward_of<BFloat16>(p, tensors);
    default: return forward_of<Float16>(p, tensors);
  }
}

int roi_backward(const RoiProblem& p, const RoiBackwardTensors& tensors) {
  switch (p.dtype) {
    case kFloat64: return backward_of<double>(p, tensors);
    case kFloat32: return backward_of<float>(p, tensors);
    case kBFloat16: return backward_of<BFloat16>(p, tensors);
    default: return backward_of<Float16>(p, tensors);
  }
}

}  // namespace deformnet::DEFORMNET_ISA

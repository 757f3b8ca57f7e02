// Deformable convolution, forward and backward.
//
// Forward. The positions (n, oy, ox) are cut into tiles; a thread takes a tile, samples a few taps of
// it into `columns` [position, tap, channel], which stay in its cache, and multiplies them at once
// with the packed weights. The map is channels-last here, so the four corners of a sample are four
// runs of channels and their bilinear weights are shared by a whole offset group.
//
// Backward. The positions are worked through from their beginning and from their middle at once, a chunk of
// each at a time, small enough for the caches. First, threads split the chunks' positions: gradient of the
// columns = grad_output * weight; the dot products of it with the four corners give the gradients of offset
// and mask, and the columns are sampled again. Then each half's contribution to grad_input is added up, in
// order, by one thread for each run of channels: the thread that made it where there are two, as memory that
// another processor core has written is slow to read. Last, threads split channels and taps of grad_weight.
// So nothing is added atomically, and the bits do not depend on the number of threads.
#include <omp.h>

#include "common.h"
#include "gemm.h"
#include "kernels.h"

namespace deformnet::DEFORMNET_ISA {
namespace {

constexpr int64_t kColumnsBytes = 256 << 10;  // columns of a tile: a part of the private cache
constexpr int64_t kBlockDepth = 640;          // numbers of a column that are summed in one go
// From one row of columns to the next. A cache line more keeps rows of a power of two out of each other's
// cache sets.
template <class A>
constexpr int64_t kColumnsRow = kBlockDepth + kCacheLine / int64_t(sizeof(A));
constexpr int64_t kChunkBytes = 1 << 20;      // columns of a chunk in the backward pass
constexpr int64_t kChunkPositions = 384;      // at least: the weight's gradient is read and written once a chunk

struct Geometry {
  explicit Geometry(const Problem& p)
      : taps(p.kernel_h * p.kernel_w),
        pixels(p.in_h * p.in_w),
        positions(p.out_h * p.out_w),
        group_in(p.in_channels / p.groups),
        group_out(p.out_channels / p.groups),
        offset_group_in(p.in_channels / p.offset_groups),
        padded_row(p.in_w + 1),
        padded_pixels((p.in_h + 4) * padded_row + 2),
        nowhere((p.in_h + 2) * padded_row + 1),
        depthwise(p.groups > 1 && group_in == 1 && group_out == 1) {}

  int64_t taps, pixels, positions;
  int64_t group_in, group_out, offset_group_in;
  int64_t padded_row, padded_pixels, nowhere;  // of a padded map, see there
  bool depthwise;  // one filter a channel: no matrix product in it
};

// ------------------------------------------------------------------------- where samples lie

// A run of neighbouring positions of one image inside a tile.
struct Run {
  int64_t start, length;  // in the tile
  int64_t image;          // in the batch
  int64_t position;       // in the image
};

// Positions [begin, begin + count), counted through the images from `first_image` on.
class Tile {
 public:
  Tile(const Geometry& geometry, int64_t first_image, int64_t begin, int64_t count)
      : first_image(first_image), begin(begin), count(count), positions_(geometry.positions) {}

  template <class Visit>
  void for_each_run(Visit visit) const {
    for (int64_t done = 0; done < count;) {
      const int64_t at = begin + done, position = at % positions_;
      const int64_t length = least(count - done, positions_ - position);
      visit(Run{done, length, first_image + at / positions_, position});
      done += length;
    }
  }

  int64_t first_image, begin, count;

 private:
  int64_t positions_;
};

// The samples of one tap and offset group in a tile, as arrays over the tile's positions.
// Corners are numbered (top, left), (top, right), (bottom, left), (bottom, right).
template <class A>
struct Samples {
  Index<A>* pixel;  // of the first corner, counted through the chunk's framed maps
  A* weights;       // of the four corners, bilinear, side by side; NaN where the offset is
  A *fy, *fx;       // the fractions that the weights are made of; negative where there is no slope
  A* mask;

  static int64_t bytes(int64_t capacity) {
    return Workspace::bytes_of<Index<A>>(capacity) + Workspace::bytes_of<A>(7 * capacity);
  }
  Samples(char* memory, int64_t capacity) {
    pixel = reinterpret_cast<Index<A>*>(memory);
    weights = reinterpret_cast<A*>(memory + Workspace::bytes_of<Index<A>>(capacity));
    fy = weights + 4 * capacity;
    fx = weights + 5 * capacity;
    mask = weights + 6 * capacity;
  }
};

// Coordinates as the first of their two cells, and the fraction of the way to the second.
template <class A>
inline void split(Vec<A> at, int64_t size, bool msra, IndexVec<A>* cell, Vec<A>* fraction) {
  const Vec<A> lowest = Vec<A>{} - 2, highest = Vec<A>{} + A(size + 1);
  // Beyond these bounds both cells are outside anyhow. NaN, too, becomes a defined number here.
  Vec<A> clamped = at > lowest ? at : lowest;
  clamped = clamped < highest ? clamped : highest;
  IndexVec<A> low = __builtin_convertvector(clamped, IndexVec<A>);
  low += __builtin_convertvector(low, Vec<A>) > clamped;  // true is -1
  *fraction = clamped - __builtin_convertvector(low, Vec<A>);
  *cell = low;
  // The kernel of 2017 repeats the last cell.
  if (msra) *fraction = low == Index<A>(size - 1) ? Vec<A>{} : *fraction;
}

// Where the samples of a tap and an offset group lie. `scratch` has room for 3 * capacity numbers.
template <class A>
void locate(const Problem& p, const Geometry& geometry, const Tile& tile, const void* offset,
            const void* mask, int64_t offset_group, int64_t tap, A* scratch, int64_t capacity,
            const Samples<A>& samples) {
  using V = Vec<A>;
  using I = IndexVec<A>;
  A *ys = scratch, *xs = scratch + capacity;
  Index<A>* images = reinterpret_cast<Index<A>*>(scratch + 2 * capacity);
  const int64_t channel = offset_group * geometry.taps + tap;
  const int64_t all = p.offset_groups * geometry.taps;
  const int64_t dy = tap / p.kernel_w * p.dilation_h - p.pad_h;
  const int64_t dx = tap % p.kernel_w * p.dilation_w - p.pad_w;
  tile.for_each_run([&](const Run& run) {
    const int64_t plane = run.image * 2 * all + 2 * channel;
    A *y = ys + run.start, *x = xs + run.start, *m = samples.mask + run.start;
    Index<A>* image = images + run.start;
    read_run(offset, p.offset_dtype, plane * geometry.positions + run.position, run.length, y);
    read_run(offset, p.offset_dtype, (plane + 1) * geometry.positions + run.position, run.length, x);
    const Index<A> first_pixel = Index<A>((run.image - tile.first_image) * geometry.padded_pixels);
    int64_t oy = run.position / p.out_w, ox = run.position % p.out_w;
    for (int64_t i = 0; i < run.length; ++oy, ox = 0) {
      const int64_t n = least(run.length - i, p.out_w - ox);
      const A base_y = A(oy * p.stride_h + dy);
      const int32_t base_x = int32_t(ox * p.stride_w + dx), step = int32_t(p.stride_w);
      for (int64_t j = 0; j < n; ++j) {
        y[i + j] += base_y;
        x[i + j] += A(base_x + int32_t(j) * step);
        image[i + j] = first_pixel;
      }
      i += n;
    }
    if (mask)
      read_run(mask, p.mask_dtype, (run.image * all + channel) * geometry.positions + run.position,
               run.length, m);
    else
      for (int64_t i = 0; i < run.length; ++i) m[i] = A(1);
  });

  const Index<A> height = Index<A>(p.in_h), width = Index<A>(p.in_w);
  const bool msra = p.border == kMsra2017;
  const Index<A> first = msra ? 0 : -1;  // the kernel of 2017 samples nothing before the first cell
  // Arrays have room for whole vectors; what lies behind the tile's end is computed and never used.
  for (int64_t i = 0; i < tile.count; i += kLanes<A>) {
    const V y = load(ys + i), x = load(xs + i);
    I image;
    std::memcpy(&image, images + i, sizeof image);
    I top, left;
    V fy, fx;
    split<A>(y, p.in_h, msra, &top, &fy);
    split<A>(x, p.in_w, msra, &left, &fx);
    const I defined = (y == y) & (x == x);
    const V nan = V{} + A(__builtin_nan(""));
    fy = defined ? fy : nan;
    fx = defined ? fx : nan;
    const I within = (top >= first) & (top < height) & (left >= first) & (left < width);
    const I cell = (top + 1) * Index<A>(geometry.padded_row) + left + 1;
    const I pixel = image + (within ? cell : I{} + Index<A>(geometry.nowhere));
    std::memcpy(samples.pixel + i, &pixel, sizeof pixel);
    store_side_by_side<A>((1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx, samples.weights + 4 * i);
    // Where nothing is read, or the kernel of 2017 stays at the last cell, there is no slope: the sign says
    // so to `sample_backward`, also that of a zero.
    const V zero = {};
    if (msra) {
      fy = (top == height - 1) & defined ? -zero : fy;
      fx = (left == width - 1) & defined ? -zero : fx;
    }
    store(samples.fy + i, (within | ~defined) ? fy : zero - 1);
    store(samples.fx + i, (within | ~defined) ? fx : zero - 1);
  }
}

// ------------------------------------------------------------------------------- sampling

// A channels-last map with a frame, so that the four corners of a sample are there wherever it lies: a row
// above and one below, a column between the end of one row and the start of the next, and two rows of
// zeros for whatever lies farther out, which `Geometry::nowhere` is in. Pixel (y, x) is at
// (y + 1) * padded_row + x + 1. The frame is zero; for the kernel of 2017 it repeats the last row and
// column, whose slope is zero then.
template <class A>
struct Map {
  const A* at(int64_t pixel, int64_t channel) const { return data + pixel * channels + channel; }

  const A* data;
  int64_t channels, row;  // numbers of a pixel, and of a row
};

// Makes framed maps of images [begin, end). Called by all threads of a team.
template <class A, class T>
void copy_maps(const Problem& p, const Geometry& geometry, const T* input, int64_t begin, int64_t end, A* maps) {
  const int64_t channels = p.in_channels, pixels = geometry.pixels, row = geometry.padded_row;
  constexpr int64_t strip = 256;
  const int64_t strips = ceil_div(pixels, strip);
#pragma omp for
  for (int64_t item = 0; item < (end - begin) * strips; ++item) {
    const int64_t image = item / strips, start = item % strips * strip;
    const int64_t n = least(strip, pixels - start);
    A* map = maps + image * geometry.padded_pixels * channels;
    A* places[strip];
    for (int64_t i = 0, y = start / p.in_w, x = start % p.in_w; i < n; ++i) {
      places[i] = map + ((y + 1) * row + x + 1) * channels;
      if (++x == p.in_w) x = 0, ++y;
    }
    const T* from = input + (begin + image) * channels * pixels;
    if (p.input_channels_last)
      for (int64_t i = 0; i < n; ++i) convert_row<A>(from + (start + i) * channels, channels, places[i]);
    else
      transpose_between<A, A>(
          channels, n, [&](int64_t c) { return from + c * pixels + start; },
          [&](int64_t i) { return places[i]; });
  }
#pragma omp for
  for (int64_t image = 0; image < end - begin; ++image) {
    A* map = maps + image * geometry.padded_pixels * channels;
    const size_t pixel = size_t(channels) * sizeof(A);
    std::memset(map, 0, size_t(row) * pixel);
    for (int64_t y = 0; y < p.in_h; ++y) {
      A* after = map + ((y + 2) * row) * channels;
      if (p.border == kMsra2017)
        std::memcpy(after, after - channels, pixel);
      else
        std::memset(after, 0, pixel);
    }
    std::memset(map + row * channels, 0, pixel);
    A* below = map + (p.in_h + 1) * row * channels;
    std::memset(below + channels, 0, size_t(geometry.padded_pixels - (p.in_h + 1) * row - 1) * pixel);
    if (p.border == kMsra2017) std::memcpy(below + channels, below - p.in_w * channels, size_t(row) * pixel);
  }
}

// The gradient of images [begin, end), from sums in framed maps. Called by all threads of a team.
template <class A, class T>
void write_maps(const Problem& p, const Geometry& geometry, const A* maps, int64_t begin, int64_t end,
                T* grad_input) {
  const int64_t channels = p.in_channels, pixels = geometry.pixels;
  constexpr int64_t strip = 256;
  const int64_t strips = ceil_div(pixels, strip);
#pragma omp for
  for (int64_t item = 0; item < (end - begin) * strips; ++item) {
    const int64_t image = item / strips, start = item % strips * strip;
    const int64_t n = least(strip, pixels - start);
    const A* map = maps + image * geometry.padded_pixels * channels;
    const A* places[strip];
    for (int64_t i = 0, y = start / p.in_w, x = start % p.in_w; i < n; ++i) {
      places[i] = map + ((y + 1) * geometry.padded_row + x + 1) * channels;
      if (++x == p.in_w) x = 0, ++y;
    }
    T* to = grad_input + (begin + image) * channels * pixels;
    if (p.input_channels_last)
      for (int64_t i = 0; i < n; ++i) convert_row<A>(places[i], channels, to + (start + i) * channels);
    else
      transpose_between<A, T>(
          n, channels, [&](int64_t i) { return places[i]; },
          [&](int64_t c) { return to + c * pixels + start; });
  }
}

// A run of taps and channels: of several taps with all channels, or of one tap.
struct Block {
  int64_t tap_begin, tap_end, channel_begin, channel_end;

  int64_t channels() const { return channel_end - channel_begin; }
};

// The bilinear values of a run of `width` channels, times the mask if there is one.
template <bool modulated, class A, class Column>
__attribute__((always_inline)) inline void read_sample(const Map<A>& map, const Samples<A>& at, int64_t i,
                                                       int64_t channel, int64_t width, Column* to) {
  const A* v0 = map.at(at.pixel[i], channel);
  const A *v1 = v0 + map.channels, *v2 = v0 + map.row, *v3 = v2 + map.channels;
  const A* w = at.weights + 4 * i;
  const Vec<A> w0 = w[0] - Vec<A>{}, w1 = w[1] - Vec<A>{}, w2 = w[2] - Vec<A>{}, w3 = w[3] - Vec<A>{};
  const Vec<A> mask = at.mask[i] - Vec<A>{};
  int64_t c = 0;
  for (; c + kLanes<A> <= width; c += kLanes<A>) {
    const Vec<A> value = load(v0 + c) * w0 + load(v1 + c) * w1 + load(v2 + c) * w2 + load(v3 + c) * w3;
    store_as<Column, A>(to + c, modulated ? value * mask : value);
  }
  for (; c < width; ++c) {
    const A value = v0[c] * w[0] + v1[c] * w[1] + v2[c] * w[2] + v3[c] * w[3];
    write(to + c, modulated ? value * at.mask[i] : value);
  }
}

// columns[position, tap, channel] of a block, for a tile.
template <bool modulated, class A, class Column>
void sample_block(const Geometry& geometry, const Map<A>& map, const Samples<A>* samples, const Block& block,
                  int64_t count, Column* columns, int64_t row) {
  const int64_t group_width = geometry.offset_group_in;
  for (int64_t tap = block.tap_begin; tap < block.tap_end; ++tap)
    for (int64_t g = block.channel_begin / group_width; g * group_width < block.channel_end; ++g) {
      const Samples<A>& at = samples[g * geometry.taps + tap];
      const int64_t channel = most(block.channel_begin, g * group_width);
      const int64_t width = least(block.channel_end, (g + 1) * group_width) - channel;
      Column* first = columns + (tap - block.tap_begin) * block.channels() + channel - block.channel_begin;
      for (int64_t i = 0; i < count; ++i)
        read_sample<modulated>(map, at, i, channel, width, first + i * row);
    }
}

template <class A, class Column>
void sample(bool modulated, const Geometry& geometry, const Map<A>& map, const Samples<A>* samples,
            const Block& block, int64_t count, Column* columns, int64_t row) {
  if (modulated)
    sample_block<true>(geometry, map, samples, block, count, columns, row);
  else
    sample_block<false>(geometry, map, samples, block, count, columns, row);
}

// Where the columns of the backward pass lie, and their gradient: [tap][panel of channels][position][lane],
// so that a thread that takes some channels of all positions reads runs of memory, and the product with the
// gradient of the output finds panels. A panel has channels of one group, or several whole groups; a
// depthwise layer is one group here.
template <class A>
struct Panels {
  static constexpr int64_t width = kPanel<A>;

  Panels(const Geometry& geometry, int64_t channels, int64_t positions)
      : group(geometry.depthwise ? channels : geometry.group_in),
        of_group(ceil_div(group, width)),
        together(most<int64_t>(1, width / group)),
        used(group < width ? together * group : width),
        // A cache line more keeps the taps of a position out of each other's cache sets.
        panel(positions * width + kCacheLine / int64_t(sizeof(A))),
        tap(ceil_div(channels / group, together) * of_group * panel),
        padded(channels % used != 0 || used != width || (group > width && group % width != 0)) {}

  int64_t index(int64_t channel) const { return channel / group / together * of_group + channel % group / width; }
  int64_t lane(int64_t channel) const { return channel / group % together * group + channel % group % width; }
  int64_t place(int64_t channel) const { return index(channel) * panel + lane(channel); }

  int64_t group, of_group;  // channels and panels of a group
  int64_t together, used;   // groups and lanes in use of a panel
  int64_t panel, tap;       // numbers from one panel, and from one tap, to the next
  bool padded;              // some lanes have no channel
};

// Channels of one panel and one offset group.
struct ChannelRun {
  int64_t channel, width;
  int64_t place;  // among the panels of a tap
};

// All channels in runs of at most `longest`; those of offset group g begin at first[g].
template <class A>
int64_t find_runs(const Problem& p, const Geometry& geometry, const Panels<A>& panels, int64_t longest,
                  ChannelRun* runs, int64_t* first) {
  int64_t count = 0;
  for (int64_t g = 0; g < p.offset_groups; ++g) {
    first[g] = count;
    const int64_t end = (g + 1) * geometry.offset_group_in;
    for (int64_t channel = g * geometry.offset_group_in; channel < end; channel += runs[count++].width) {
      int64_t width = least(longest, panels.used - panels.lane(channel));
      if (panels.together == 1) width = least(width, panels.group - channel % panels.group);
      runs[count] = {channel, least(width, end - channel), panels.place(channel)};
    }
  }
  first[p.offset_groups] = count;
  return count;
}

// Adds up the products of a vector of the gradient with the four corners; returns their bilinear value.
template <class A>
__attribute__((always_inline)) inline Vec<A> add_dots(const A* corner, ptrdiff_t right, ptrdiff_t down, Vec<A> grad,
                                                      const Vec<A>* weights, Vec<A>* dots) {
  const Vec<A> v0 = load(corner), v1 = load(corner + right);
  const Vec<A> v2 = load(corner + down), v3 = load(corner + down + right);
  dots[0] += grad * v0;
  dots[1] += grad * v1;
  dots[2] += grad * v2;
  dots[3] += grad * v3;
  return v0 * weights[0] + v1 * weights[1] + v2 * weights[2] + v3 * weights[3];
}

// The same samples in the backward pass, of one tap and offset group, whose runs of channels are `runs` to
// `end`. `grads` holds the gradient of the columns. Writes the columns if `write`, and the gradients by
// offset and mask into `grad_y`, `grad_x`, `grad_mask`.
template <bool write, class A>
void sample_backward(const Map<A>& map, const Samples<A>& at, const ChannelRun* runs, const ChannelRun* end,
                     int64_t count, const A* grads, A* columns, A* grad_y, A* grad_x, A* grad_mask) {
  constexpr int lanes = kLanes<A>;
  const ptrdiff_t right = map.channels, down = map.row;
  // As many positions at a time as sums fit into a vector.
  for (int64_t first = 0; first < count; first += lanes) {
    Vec<A> dots[4][lanes];
    A rest[4][lanes] = {};
    const int64_t some = least<int64_t>(lanes, count - first);
    for (int64_t k = 0; k < some; ++k) {
      const int64_t i = first + k;
      const A* w = at.weights + 4 * i;
      const Vec<A> weights[4] = {w[0] - Vec<A>{}, w[1] - Vec<A>{}, w[2] - Vec<A>{}, w[3] - Vec<A>{}};
      const Vec<A> mask = at.mask[i] - Vec<A>{};
      Vec<A> dot[4] = {};
      for (const ChannelRun* run = runs; run != end; ++run) {
        const A* corner = map.at(at.pixel[i], run->channel);
        const A* grad = grads + run->place + i * kPanel<A>;
        A* to = write ? columns + run->place + i * kPanel<A> : nullptr;
        if (run->width == kPanel<A>) {
#pragma GCC unroll 4
          for (int v = 0; v < kTileVectors; ++v) {
            const Vec<A> value = add_dots(corner + v * lanes, right, down, load(grad + v * lanes), weights, dot);
            if (write) store(to + v * lanes, value * mask);
          }
          continue;
        }
        int64_t c = 0;
        for (; c + lanes <= run->width; c += lanes) {
          const Vec<A> value = add_dots(corner + c, right, down, load(grad + c), weights, dot);
          if (write) store(to + c, value * mask);
        }
        for (; c < run->width; ++c) {
          const A* v = corner + c;
          rest[0][k] += grad[c] * v[0];
          rest[1][k] += grad[c] * v[right];
          rest[2][k] += grad[c] * v[down];
          rest[3][k] += grad[c] * v[down + right];
          if (write) to[c] = (v[0] * w[0] + v[right] * w[1] + v[down] * w[2] + v[down + right] * w[3]) * at.mask[i];
        }
      }
      for (int j = 0; j < 4; ++j) dots[j][k] = dot[j];
    }
    for (int64_t k = some; k < lanes; ++k)
      for (int j = 0; j < 4; ++j) dots[j][k] = Vec<A>{};
    Vec<A> dot[4];
    for (int j = 0; j < 4; ++j) dot[j] = sum_each<A>(dots[j]) + load(rest[j]);
    const Vec<A> fy = load(at.fy + first), fx = load(at.fx + first), mask = load(at.mask + first);
    // Not a product with zero: the gradient of the output may be infinite.
    IndexVec<A> sign_y, sign_x;
    std::memcpy(&sign_y, &fy, sizeof fy);
    std::memcpy(&sign_x, &fx, sizeof fx);
    const Vec<A> by_y = sign_y >= 0 ? mask * ((1 - fx) * (dot[2] - dot[0]) + fx * (dot[3] - dot[1])) : Vec<A>{};
    const Vec<A> by_x = sign_x >= 0 ? mask * ((1 - fy) * (dot[1] - dot[0]) + fy * (dot[3] - dot[2])) : Vec<A>{};
    const Vec<A> by_mask = (1 - fy) * ((1 - fx) * dot[0] + fx * dot[1]) + fy * ((1 - fx) * dot[2] + fx * dot[3]);
    std::memcpy(grad_y + first, &by_y, size_t(some) * sizeof(A));
    std::memcpy(grad_x + first, &by_x, size_t(some) * sizeof(A));
    std::memcpy(grad_mask + first, &by_mask, size_t(some) * sizeof(A));
  }
}

// --------------------------------------------------------------------------- packed weights

// How many numbers of a column are in the place of one: see `multiply_tiles`.
template <bool pairs>
constexpr int64_t kTogether = pairs ? 2 : 1;

// For the forward product: [group][panel of output channels][tap][channel][lane], with pairs
// [group][panel][tap][channel / 2][lane][channel % 2].
template <class A, bool pairs, class T>
void pack_forward(const Problem& p, const Geometry& geometry, const T* weight, A* packed) {
  constexpr int panel = kPanel<A>;
  const int64_t panels = ceil_div(geometry.group_out, panel), depth = geometry.group_in * geometry.taps;
  // A few rows of the source at a time, so that the lines written to stay in the cache.
  constexpr int64_t stretch = 64;
  const int64_t stretches = ceil_div(depth, stretch);
#pragma omp for
  for (int64_t item = 0; item < p.groups * panels * stretches; ++item) {
    const int64_t group = item / (panels * stretches), which = item / stretches % panels;
    const int64_t begin = item % stretches * stretch, n = least(stretch, depth - begin);
    const int64_t outs = least<int64_t>(panel, geometry.group_out - which * panel);
    A block[stretch * panel] = {};  // [k][lane]
    const T* from = weight + (group * geometry.group_out + which * panel) * depth + begin;
    transpose<A>(from, depth, outs, n, block, panel);
    A* to = packed + (group * panels + which) * depth / kTogether<pairs> * panel;
    int64_t channel = begin / geometry.taps, tap = begin % geometry.taps;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t row = tap * geometry.group_in + channel;
      if constexpr (pairs) {
        T* halves = reinterpret_cast<T*>(to + row / 2 * panel) + row % 2;
        for (int lane = 0; lane < panel; ++lane) write(halves + 2 * lane, block[k * panel + lane]);
      } else {
        std::memcpy(to + row * panel, block + k * panel, sizeof(A) * panel);
      }
      if (++tap == geometry.taps) tap = 0, ++channel;
    }
  }
}

// For the gradient of the columns: [group][tap][panel of input channels][output channel][lane]. Output
// channels are padded to whole panels, as the gradient is that they are multiplied with.
template <class A, class T>
void pack_backward(const Problem& p, const Geometry& geometry, const T* weight, A* packed) {
  constexpr int panel = kPanel<A>;
  const int64_t panels = ceil_div(geometry.group_in, panel);
  const int64_t outs = round_up(geometry.group_out, panel), taps = geometry.taps;
#pragma omp for collapse(2)
  for (int64_t group = 0; group < p.groups; ++group)
    for (int64_t out = 0; out < outs; ++out) {
      const T* from = weight + (group * geometry.group_out + out) * geometry.group_in * taps;
      for (int64_t channel = 0; channel < panels * panel; ++channel)
        for (int64_t tap = 0; tap < taps; ++tap) {
          const bool real = out < geometry.group_out && channel < geometry.group_in;
          const int64_t at = ((group * taps + tap) * panels + channel / panel) * outs + out;
          packed[at * panel + channel % panel] = real ? A(read(from[channel * taps + tap])) : A(0);
        }
    }
}

// One filter a channel: [tap][channel].
template <class A, class T>
void pack_depthwise(const Problem& p, const Geometry& geometry, const T* weight, A* packed) {
#pragma omp for
  for (int64_t channel = 0; channel < p.in_channels; ++channel)
    for (int64_t tap = 0; tap < geometry.taps; ++tap)
      packed[tap * p.in_channels + channel] = A(read(weight[channel * geometry.taps + tap]));
}

// ---------------------------------------------------------------------------------- forward

template <class A, class T>
void write_tile(const Problem& p, const Geometry& geometry, const Tile& tile, const A* sums, int64_t row,
                T* output) {
  const int64_t channels = p.out_channels, positions = geometry.positions;
  tile.for_each_run([&](const Run& run) {
    const A* from = sums + run.start * row;
    if (p.output_channels_last) {
      T* to = output + (run.image * positions + run.position) * channels;
      for (int64_t i = 0; i < run.length; ++i)
        convert_row<A>(from + i * row, channels, to + i * channels);
    } else {
      T* to = output + run.image * channels * positions + run.position;
      transpose<A>(from, row, run.length, channels, to, positions);
    }
  });
}

template <class A, bool pairs>
struct ColumnOf {
  using type = A;
};
template <>
struct ColumnOf<float, true> {
  using type = BFloat16;
};

// The columns of a block times the weights, added to `sums`, or else in their place.
template <bool pairs, class A>
void add_product(const Geometry& geometry, const Block& block, int64_t count, const A* columns,
                 const A* packed, A* sums, int64_t sums_row, bool accumulate) {
  constexpr int panel = kPanel<A>;
  const int64_t panels = ceil_div(geometry.group_out, panel), group_in = geometry.group_in;
  for (int64_t group = block.channel_begin / group_in; group * group_in < block.channel_end; ++group) {
    const int64_t begin = most(block.channel_begin, group * group_in);
    const int64_t end = least(block.channel_end, (group + 1) * group_in);
    constexpr int64_t together = kTogether<pairs>;
    const LeftFactor<A, kColumnsRow<A>> left{columns + (begin - block.channel_begin) / together, 1,
                                             block.channels() / together, block.tap_end - block.tap_begin,
                                             (end - begin) / together};
    for (int64_t which = 0; which < panels; ++which) {
      const int64_t at = ((group * panels + which) * geometry.taps + block.tap_begin) * group_in + begin -
                         group * group_in;
      const A* from = packed + at / together * panel;
      A* to = sums + group * geometry.group_out + which * panel;
      const int n = int(least<int64_t>(panel, geometry.group_out - which * panel));
      const bool add = accumulate || begin > group * group_in;
#if defined(__AMX_BF16__)
      if constexpr (pairs) {
        multiply_tiles(count, left, from, to, sums_row, n, add);
        continue;
      }
#endif
      multiply(count, left, from, to, sums_row, n, add);
    }
  }
}

// The same where every channel has a filter of its own.
template <class A>
void add_depthwise(const Block& block, int64_t channels, int64_t count, const A* columns, const A* packed,
                   A* sums, int64_t sums_row) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t tap = block.tap_begin; tap < block.tap_end; ++tap) {
      const A* from = columns + i * kColumnsRow<A> + (tap - block.tap_begin) * block.channels();
      const A* filter = packed + tap * channels + block.channel_begin;
      A* to = sums + i * sums_row + block.channel_begin;
      for (int64_t c = 0; c < block.channels(); ++c) to[c] += from[c] * filter[c];
    }
}

// With `pairs`, columns and weights are bfloat16 and multiplied as such; sums are float.
template <class T, bool pairs = false>
int forward_of(const Problem& p, const ForwardTensors& tensors) {
  using A = typename ComputeOf<T>::type;
  using Column = typename ColumnOf<A, pairs>::type;
  constexpr int64_t together = kTogether<pairs>, block_depth = kBlockDepth * together;
  constexpr int panel = kPanel<A>;
  const Geometry geometry(p);
  const T* input = static_cast<const T*>(tensors.input);
  const T* weight = static_cast<const T*>(tensors.weight);
  const T* bias = static_cast<const T*>(tensors.bias);
  T* output = static_cast<T*>(tensors.output);

  const int64_t channels = p.in_channels, taps = geometry.taps;
  const int64_t block_taps = most<int64_t>(1, least(taps, block_depth / channels));
  const int64_t block_channels = least(channels, block_depth);
  const int64_t depth = block_taps * block_channels / together;
  const int64_t image_size = geometry.padded_pixels * channels;
  const int64_t images = least(p.batch, most<int64_t>(1, kImagesBytes / (image_size * int64_t(sizeof(A)))));

  // Tiles of equal size, as many for every thread.
  // In whole vectors, so that rows of the output are written in whole cache lines.
  const int64_t wanted = most<int64_t>(kTileRows, kColumnsBytes / (depth * int64_t(sizeof(A))));
  const int64_t all = images * geometry.positions;
  const int64_t tiles = round_up(ceil_div(all, wanted), p.threads);
  const int64_t tile_rows = round_up(ceil_div(all, tiles), kLanes<A>);

  constexpr int64_t line = kCacheLine / int64_t(sizeof(A)), columns_row = kColumnsRow<A>;
  const int64_t sums_row = p.out_channels + line;
  const int64_t packed_panels = ceil_div(geometry.group_out, panel);
  const int64_t packed_size = geometry.depthwise
                                  ? taps * channels
                                  : p.groups * packed_panels * taps * geometry.group_in / together * panel;
  const int64_t capacity = round_up(tile_rows, kLanes<A>);
  const int64_t samples_bytes = Samples<A>::bytes(capacity);
  const int64_t samples_count = p.offset_groups * taps;

  using W = Workspace;
  const int64_t private_bytes = W::bytes_of<A>(tile_rows * columns_row) +
                                W::bytes_of<A>(tile_rows * sums_row) +
                                W::bytes_of<A>(3 * capacity) + samples_count * samples_bytes +
                                W::bytes_of<Samples<A>>(samples_count);
  const int64_t shared_bytes =
      W::bytes_of<A>(packed_size) + W::bytes_of<A>(p.out_channels) + W::bytes_of<A>(images * image_size);
  if (!workspace.reserve(shared_bytes + p.threads * private_bytes)) return 1;

  A* packed = workspace.take<A>(packed_size);
  A* biases = workspace.take<A>(p.out_channels);
  A* maps = workspace.take<A>(images * image_size);
  char* private_memory = workspace.take<char>(p.threads * private_bytes);
  for (int64_t c = 0; c < p.out_channels; ++c) biases[c] = bias ? A(read(bias[c])) : A(0);

  const Map<A> map{maps, channels, geometry.padded_row * channels};

#pragma omp parallel num_threads(p.threads)
  {
#if defined(__AMX_BF16__)
    const TileUser tiles_in_use;
#endif
    char* mine = private_memory + omp_get_thread_num() * private_bytes;
    A* columns = reinterpret_cast<A*>(mine);
    mine += W::bytes_of<A>(tile_rows * columns_row);
    A* sums = reinterpret_cast<A*>(mine);
    mine += W::bytes_of<A>(tile_rows * sums_row);
    A* scratch = reinterpret_cast<A*>(mine);
    mine += W::bytes_of<A>(3 * capacity);
    auto* samples = reinterpret_cast<Samples<A>*>(mine);
    mine += W::bytes_of<Samples<A>>(samples_count);
    for (int64_t i = 0; i < samples_count; ++i)
      samples[i] = Samples<A>(mine + i * samples_bytes, capacity);

    if (geometry.depthwise)
      pack_depthwise<A, T>(p, geometry, weight, packed);
    else
      pack_forward<A, pairs>(p, geometry, weight, packed);

    for (int64_t first = 0; first < p.batch; first += images) {
      const int64_t last = least(first + images, p.batch);
      copy_maps<A, T>(p, geometry, input, first, last, maps);
      const int64_t total = (last - first) * geometry.positions;
#pragma omp for schedule(static)
      for (int64_t begin = 0; begin < total; begin += tile_rows) {
        const Tile tile(geometry, first, begin, least(tile_rows, total - begin));
        for (int64_t g = 0; g < p.offset_groups; ++g)
          for (int64_t tap = 0; tap < taps; ++tap)
            locate<A>(p, geometry, tile, tensors.offset, tensors.mask, g, tap, scratch, capacity,
                      samples[g * taps + tap]);
        const bool add = bias || geometry.depthwise;
        if (add)
          for (int64_t i = 0; i < tile.count; ++i)
            for (int64_t c = 0; c < p.out_channels; ++c) sums[i * sums_row + c] = biases[c];

        for (int64_t tap = 0; tap < taps; tap += block_taps)
          for (int64_t channel = 0; channel < channels; channel += block_channels) {
            const Block block{tap, least(tap + block_taps, taps), channel,
                              least(channel + block_channels, channels)};
            sample(tensors.mask, geometry, map, samples, block, tile.count, reinterpret_cast<Column*>(columns),
                   columns_row * together);
            if (geometry.depthwise)
              add_depthwise<A>(block, channels, tile.count, columns, packed, sums, sums_row);
            else
              add_product<pairs>(geometry, block, tile.count, columns, packed, sums, sums_row,
                             add || tap > 0);
          }
        write_tile<A, T>(p, geometry, tile, sums, sums_row, output);
      }
    }
  }
  workspace.trim();
  return 0;
}

// --------------------------------------------------------------------------------- backward

// grad_output of the positions of two tiles as panels [group][panel][position][lane], padded with zeros; for
// depthwise layers as rows [position][channel]. Called by all threads of a team.
template <class A, class T>
void pack_grad_output(const Problem& p, const Geometry& geometry, const Tile* halves, const T* grad_output,
                      A* packed) {
  const int64_t channels = p.out_channels, positions = geometry.positions;
  const int64_t panel = geometry.depthwise ? channels : kPanel<A>;
  const int64_t group_out = geometry.depthwise ? channels : geometry.group_out;
  const int64_t panels = ceil_div(group_out, panel);
  const int64_t groups = geometry.depthwise ? 1 : p.groups;
  constexpr int64_t strip = 256;
  const int64_t count = halves[0].count + halves[1].count, strips = ceil_div(halves[0].count, strip);
#pragma omp for schedule(static)
  for (int64_t item = 0; item < 2 * groups * panels * strips; ++item) {
    const Tile& half = halves[item / (groups * panels * strips)];
    const int64_t group = item / (panels * strips) % groups, which = item / strips % panels;
    const int64_t start = item % strips * strip, n = least(strip, half.count - start);
    if (n <= 0) continue;
    const int64_t channel = group * group_out + which * panel;
    const int64_t width = least(panel, group_out - which * panel);
    const int64_t row = start + (&half == halves ? 0 : halves[0].count);
    A* base = packed + ((group * panels + which) * count + row) * panel;
    const Tile part(geometry, half.first_image, half.begin + start, n);
    part.for_each_run([&](const Run& run) {
      A* to = base + run.start * panel;
      if (p.output_channels_last) {
        const T* from = grad_output + (run.image * positions + run.position) * channels + channel;
        for (int64_t i = 0; i < run.length; ++i)
          convert_row<A>(from + i * channels, width, to + i * panel);
      } else {
        const T* from = grad_output + (run.image * channels + channel) * positions + run.position;
        transpose<A>(from, positions, width, run.length, to, panel);
      }
      for (int64_t i = 0; i < run.length; ++i)
        for (int64_t c = width; c < panel; ++c) to[i * panel + c] = A(0);
    });
  }
}

// Adds the samples' gradients into the map: those of one image of the chunk, in some runs of channels.
template <class A>
void add_to_map(const Problem& p, const Geometry& geometry, const Samples<A>* samples, int64_t tile_rows,
                int64_t position_begin, int64_t position_end, const A* grads, const Panels<A>& panels,
                const ChannelRun* run_begin, const ChannelRun* run_end, A* sums) {
  const int64_t per_tile = p.offset_groups * geometry.taps, row = geometry.padded_row * p.in_channels;
  for (int64_t at = position_begin; at < position_end; ++at) {
    const Samples<A>* tile = samples + at / tile_rows * per_tile;
    const int64_t i = at % tile_rows;
    for (const ChannelRun *runs = run_begin, *end; runs != run_end; runs = end) {
      const int64_t g = runs->channel / geometry.offset_group_in;
      for (end = runs; end != run_end && end->channel < (g + 1) * geometry.offset_group_in;) ++end;
      for (int64_t tap = 0; tap < geometry.taps; ++tap) {
        const Samples<A>& s = tile[g * geometry.taps + tap];
        const A* w = s.weights + 4 * i;
        const A w0 = w[0] * s.mask[i], w1 = w[1] * s.mask[i], w2 = w[2] * s.mask[i], w3 = w[3] * s.mask[i];
        A* const pixel = sums + s.pixel[i] * p.in_channels;
        for (const ChannelRun* run = runs; run != end; ++run) {
          const A* grad = grads + tap * panels.tap + run->place + at * panels.width;
          A *s0 = pixel + run->channel, *s1 = s0 + p.in_channels, *s2 = s0 + row, *s3 = s2 + p.in_channels;
          int64_t c = 0;
          for (; c + kLanes<A> <= run->width; c += kLanes<A>) {
            const Vec<A> u = load(grad + c);
            store(s0 + c, load(s0 + c) + u * w0);
            store(s1 + c, load(s1 + c) + u * w1);
            store(s2 + c, load(s2 + c) + u * w2);
            store(s3 + c, load(s3 + c) + u * w3);
          }
          for (; c < run->width; ++c) {
            s0[c] += grad[c] * w0;
            s1[c] += grad[c] * w1;
            s2[c] += grad[c] * w2;
            s3[c] += grad[c] * w3;
          }
        }
      }
    }
  }
}

template <class T>
int backward_of(const Problem& p, const BackwardTensors& tensors) {
  using A = typename ComputeOf<T>::type;
  constexpr int panel = kPanel<A>;
  const Geometry geometry(p);
  const T* input = static_cast<const T*>(tensors.input);
  const T* weight = static_cast<const T*>(tensors.weight);
  const T* grad_output = static_cast<const T*>(tensors.grad_output);
  const bool want_weight = tensors.grad_weight != nullptr;
  const bool want_input = tensors.grad_input != nullptr;
  const bool want_offset = tensors.grad_offset != nullptr || tensors.grad_mask != nullptr;
  const bool want_columns_grad = want_input || want_offset;

  const int64_t channels = p.in_channels, taps = geometry.taps, positions = geometry.positions;
  const int64_t samples_count = p.offset_groups * taps;
  const bool depthwise = geometry.depthwise;

  // Two halves of some images are worked through side by side, a chunk of each at a time. What is where
  // depends on the shapes alone.
  const int64_t depth = taps * Panels<A>(geometry, channels, 1).tap;  // nearly the numbers of a column
  const int64_t position_bytes =
      most(depth * int64_t(sizeof(A)), samples_count * Samples<A>::bytes(16) / 16);
  const int64_t chunk_positions =
      round_up(most<int64_t>(kChunkPositions, kChunkBytes / position_bytes) / 2, kTileRows);
  const int64_t image_size = geometry.padded_pixels * channels;
  const int64_t images =
      most<int64_t>(1, least(least(most<int64_t>(2, 2 * chunk_positions / positions), p.batch),
                             kImagesBytes / (image_size * int64_t(sizeof(A)))));
  const int64_t longest = least(chunk_positions, ceil_div(images * positions, 2));

  const int64_t wanted = round_up(
      most<int64_t>(kTileRows, kColumnsBytes / (least(depth, kBlockDepth) * int64_t(sizeof(A)))), kTileRows);
  const int64_t tiles = round_up(ceil_div(longest, wanted), ceil_div(p.threads, 2));
  const int64_t tile_rows = round_up(ceil_div(longest, tiles), kTileRows);
  const int64_t half_tiles = ceil_div(longest, tile_rows), tile_count = 2 * half_tiles;

  const Panels<A> panels(geometry, channels, 2 * longest);
  const int64_t columns_size = taps * panels.tap;
  const int64_t in_panels = panels.of_group;
  const int64_t out_panels = ceil_div(geometry.group_out, panel), outs = out_panels * panel;
  const int64_t packed_size =
      depthwise ? taps * channels : p.groups * taps * in_panels * outs * panel;
  const int64_t packed_grad_size = 2 * longest * (depthwise ? channels : p.groups * outs);
  const int64_t weight_sums_size = depthwise ? taps * channels : packed_size;
  const int64_t map_size = images * image_size;
  const int64_t capacity = round_up(tile_rows, kLanes<A>);
  const int64_t samples_bytes = Samples<A>::bytes(capacity);

  using W = Workspace;
  const int64_t private_bytes = W::bytes_of<A>(6 * capacity);
  const int64_t shared_bytes =
      W::bytes_of<A>(packed_size) + W::bytes_of<A>(packed_grad_size) +
      2 * W::bytes_of<A>(columns_size) + W::bytes_of<A>(weight_sums_size) + W::bytes_of<A>(map_size) +
      W::bytes_of<A>(map_size + image_size) +
      W::bytes_of<ChannelRun>(channels) + W::bytes_of<int64_t>(p.offset_groups + 1) +
      W::bytes_of<Samples<A>>(tile_count * samples_count) + tile_count * samples_count * samples_bytes;
  if (!workspace.reserve(shared_bytes + p.threads * private_bytes)) return 1;
  A* packed = workspace.take<A>(packed_size);
  A* packed_grad = workspace.take<A>(packed_grad_size);
  A* columns = want_weight ? workspace.take<A>(columns_size) : nullptr;
  A* grads = workspace.take<A>(columns_size);
  A* weight_sums = workspace.take<A>(weight_sums_size);
  A* maps = workspace.take<A>(map_size);
  A* map_sums = workspace.take<A>(map_size + image_size);
  auto* runs = workspace.take<ChannelRun>(channels);
  auto* first_run = workspace.take<int64_t>(p.offset_groups + 1);
  auto* samples = workspace.take<Samples<A>>(tile_count * samples_count);
  char* samples_memory = workspace.take<char>(tile_count * samples_count * samples_bytes);
  char* private_memory = workspace.take<char>(p.threads * private_bytes);
  for (int64_t i = 0; i < tile_count * samples_count; ++i)
    samples[i] = Samples<A>(samples_memory + i * samples_bytes, capacity);
  const Map<A> map{maps, channels, geometry.padded_row * channels};

  // Threads split the channels of the map by runs: a panel each, or a cache line where those are too few.
  const int64_t slices_wanted = ceil_div(p.threads, 2);
  const int64_t longest_run = channels < slices_wanted * panel ? kCacheLine / int64_t(sizeof(A)) : panel;
  const int64_t run_count = find_runs(p, geometry, panels, longest_run, runs, first_run);
  const int64_t slices = least(slices_wanted, run_count);
  // What lies in no run is multiplied as well.
  if (columns && !depthwise && panels.padded)
    std::memset(columns, 0, size_t(columns_size) * sizeof(A));

#pragma omp parallel num_threads(p.threads)
  {
    A* scratch = reinterpret_cast<A*>(private_memory + omp_get_thread_num() * private_bytes);
    A *grad_y = scratch + 3 * capacity, *grad_x = grad_y + capacity, *grad_mask = grad_x + capacity;

    if (want_columns_grad) {
      if (depthwise)
        pack_depthwise<A, T>(p, geometry, weight, packed);
      else
        pack_backward<A, T>(p, geometry, weight, packed);
    }

    for (int64_t first = 0; first < p.batch; first += images) {
      const int64_t last = least(first + images, p.batch);
      const int64_t total = (last - first) * positions, half = ceil_div(total, 2);
      // An image that both halves share has a second map for the sums of the second one.
      const int64_t shared = half % positions == 0 ? -1 : half / positions;
      copy_maps<A, T>(p, geometry, input, first, last, maps);
      if (want_input) {
        const int64_t numbers = (last - first + (shared >= 0)) * image_size, lines = ceil_div(numbers, 4096);
#pragma omp for
        for (int64_t i = 0; i < lines; ++i)
          std::memset(map_sums + i * 4096, 0, size_t(least<int64_t>(4096, numbers - i * 4096)) * sizeof(A));
      }

      for (int64_t chunk_begin = 0; chunk_begin < half; chunk_begin += chunk_positions) {
        const Tile halves[2] = {
            Tile(geometry, first, chunk_begin, least(chunk_positions, half - chunk_begin)),
            Tile(geometry, first, half + chunk_begin,
                 most<int64_t>(0, least(chunk_positions, total - half - chunk_begin)))};
        const int64_t chunk_count = halves[0].count + halves[1].count;
        pack_grad_output<A, T>(p, geometry, halves, grad_output, packed_grad);

        // Threads split positions.
#pragma omp for schedule(static)
        for (int64_t item = 0; item < tile_count; ++item) {
          const Tile& part = halves[item / half_tiles];
          const int64_t start = item % half_tiles * tile_rows;
          if (start >= part.count) continue;
          const Tile tile(geometry, first, part.begin + start, least(tile_rows, part.count - start));
          const int64_t begin = start + (item < half_tiles ? 0 : halves[0].count);
          Samples<A>* mine = samples + item * samples_count;
          for (int64_t g = 0; g < p.offset_groups; ++g)
            for (int64_t tap = 0; tap < taps; ++tap)
              locate<A>(p, geometry, tile, tensors.offset, tensors.mask, g, tap, scratch, capacity,
                        mine[g * taps + tap]);
          for (int64_t tap = 0; tap < taps; ++tap) {
            A* tap_grads = grads + tap * panels.tap + begin * panel;
            A* tap_columns = columns ? columns + tap * panels.tap + begin * panel : nullptr;
            if (!want_columns_grad) {
              for (const ChannelRun* run = runs; run != runs + run_count; ++run)
                sample(tensors.mask, geometry, map, mine,
                       Block{tap, tap + 1, run->channel, run->channel + run->width}, tile.count,
                       tap_columns + run->place, panel);
              continue;
            }
            if (depthwise) {
              for (const ChannelRun* run = runs; run != runs + run_count; ++run)
                for (int64_t i = 0; i < tile.count; ++i)
                  for (int64_t c = 0; c < run->width; ++c)
                    tap_grads[run->place + i * panel + c] =
                        packed_grad[(begin + i) * channels + run->channel + c] *
                        packed[tap * channels + run->channel + c];
            } else {
              for (int64_t group = 0; group < p.groups; ++group) {
                const LeftFactor<A, panel> left{
                    packed_grad + (group * out_panels * chunk_count + begin) * panel, 1, chunk_count * panel,
                    out_panels, panel};
                for (int64_t which = 0; which < in_panels; ++which) {
                  const int64_t at = (group * taps + tap) * in_panels + which;
                  multiply(tile.count, left, packed + at * outs * panel,
                           tap_grads + panels.place(group * panels.group + which * panel), panel,
                           panels.together == 1 ? panel : int(panels.group), false);
                }
              }
            }
            for (int64_t g = 0; g < p.offset_groups; ++g) {
              const int64_t channel = g * taps + tap;
              const ChannelRun *from = runs + first_run[g], *to = runs + first_run[g + 1];
              if (want_weight)
                sample_backward<true>(map, mine[channel], from, to, tile.count, tap_grads, tap_columns, grad_y,
                                      grad_x, grad_mask);
              else
                sample_backward<false, A>(map, mine[channel], from, to, tile.count, tap_grads, nullptr, grad_y,
                                          grad_x, grad_mask);
              tile.for_each_run([&](const Run& run) {
                const int64_t plane = run.image * samples_count + channel;
                if (tensors.grad_offset) {
                  write_run<A>(grad_y + run.start, run.length, tensors.grad_offset, p.offset_dtype,
                               2 * plane * positions + run.position);
                  write_run<A>(grad_x + run.start, run.length, tensors.grad_offset, p.offset_dtype,
                               (2 * plane + 1) * positions + run.position);
                }
                if (tensors.grad_mask)
                  write_run<A>(grad_mask + run.start, run.length, tensors.grad_mask, p.mask_dtype,
                               plane * positions + run.position);
              });
            }
          }
        }

        // Threads split images, and channels.
        if (want_input) {
#pragma omp for schedule(static) nowait
          for (int64_t item = 0; item < 2 * (last - first) * slices; ++item) {
            const bool second = item >= (last - first) * slices;
            const int64_t image = item / slices % (last - first), slice = item % slices;
            const Tile& part = halves[second];
            const int64_t begin = most<int64_t>(0, image * positions - part.begin);
            const int64_t end = least(part.count, (image + 1) * positions - part.begin);
            A* sums = map_sums + (second && image == shared ? (last - first - shared) * image_size : 0);
            add_to_map<A>(p, geometry, samples + (second ? half_tiles * samples_count : 0), tile_rows, begin, end,
                          grads + (second ? halves[0].count * panel : 0), panels,
                          runs + slice * run_count / slices, runs + (slice + 1) * run_count / slices, sums);
          }
        }
        const bool accumulate = first > 0 || chunk_begin > 0;
        if (want_weight && depthwise) {
#pragma omp for schedule(static)
          for (int64_t item = 0; item < taps * run_count; ++item) {
            const int64_t tap = item / run_count;
            const ChannelRun& run = runs[item % run_count];
            A* sums = weight_sums + tap * channels + run.channel;
            if (!accumulate)
              for (int64_t c = 0; c < run.width; ++c) sums[c] = A(0);
            for (int64_t i = 0; i < chunk_count; ++i)
              for (int64_t c = 0; c < run.width; ++c)
                sums[c] += columns[tap * panels.tap + run.place + i * panel + c] *
                           packed_grad[i * channels + run.channel + c];
          }
        } else if (want_weight) {
#pragma omp for schedule(dynamic, 1)
          for (int64_t item = 0; item < p.groups * taps * in_panels; ++item) {
            const int64_t group = item / (taps * in_panels), tap = item / in_panels % taps;
            const A* from = columns + tap * panels.tap +
                            panels.index(group * panels.group + item % in_panels * panel) * panels.panel;
            for (int64_t which = 0; which < out_panels; ++which) {
              const LeftFactor<A, 1> left{packed_grad + (group * out_panels + which) * chunk_count * panel,
                                          panel, 0, 1, chunk_count};
              multiply(least<int64_t>(panel, geometry.group_out - which * panel), left, from,
                       weight_sums + (item * outs + which * panel) * panel, panel, panel, accumulate);
            }
          }
        } else {
#pragma omp barrier
        }
      }
      if (want_input && shared >= 0) {
        A *sums = map_sums + shared * image_size, *second = map_sums + (last - first) * image_size;
#pragma omp for
        for (int64_t i = 0; i < image_size; ++i) sums[i] += second[i];
      }
      if (want_input)
        write_maps<A, T>(p, geometry, map_sums, first, last, static_cast<T*>(tensors.grad_input));
    }

    if (want_weight) {
      T* grad_weight = static_cast<T*>(tensors.grad_weight);
#pragma omp for
      for (int64_t out = 0; out < p.out_channels; ++out) {
        const int64_t group = out / geometry.group_out, lane = out % geometry.group_out;
        for (int64_t channel = 0; channel < geometry.group_in; ++channel)
          for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t block = (group * taps + tap) * in_panels + channel / panel;
            const A value = depthwise ? weight_sums[tap * channels + out]
                                      : weight_sums[(block * outs + lane) * panel +
                                                    panels.lane(group * panels.group + channel)];
            write(grad_weight + (out * geometry.group_in + channel) * taps + tap, value);
          }
      }
    }
  }
  workspace.trim();
  return 0;
}

}  // namespace

#if defined(__AMX_BF16__)
// Only what tiles are for is compiled again. The rest is there already.
int forward(const Problem& p, const ForwardTensors& tensors) {
  if (p.dtype == kBFloat16 && p.in_channels / p.groups % (2 * kTileStep) == 0)
    return forward_of<BFloat16, true>(p, tensors);
  return avx512::forward(p, tensors);
}
#else
int forward(const Problem& p, const ForwardTensors& tensors) {
  switch (p.dtype) {
    case kFloat64: return forward_of<double>(p, tensors);
    case kFloat32: return forward_of<float>(p, tensors);
    case kBFloat16: return forward_of<BFloat16>(p, tensors);
    default: return forward_of<Float16>(p, tensors);
  }
}

int backward(const Problem& p, const BackwardTensors& tensors) {
  switch (p.dtype) {
    case kFloat64: return backward_of<double>(p, tensors);
    case kFloat32: return backward_of<float>(p, tensors);
    case kBFloat16: return backward_of<BFloat16>(p, tensors);
    default: return backward_of<Float16>(p, tensors);
  }
}
#endif

}  // namespace deformnet::DEFORMNET_ISA

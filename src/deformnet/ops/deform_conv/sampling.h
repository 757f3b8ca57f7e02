// Where the samples of a deformable convolution lie, the map that they are read from, and the bilinear read:
// Eq. 2 to 4 of the paper.
#pragma once

#include "common.h"
#include "problem.h"

namespace deformnet::DEFORMNET_ISA {
namespace {

constexpr int64_t kColumnsBytes = 256 << 10;  // columns of a tile: a part of the private cache
constexpr int64_t kBlockDepth = 640;          // numbers of a column that are summed in one go
constexpr int64_t kImagesBytes = 16 << 20;    // channels-last copies of images, at least one image

// The problem with the sizes that follow from it.
struct Geometry : Problem {
  explicit Geometry(const Problem& p)
      : Problem(p),
        taps(kernel_h * kernel_w),
        pixels(in_h * in_w),
        positions(out_h * out_w),
        samples(offset_groups * taps),
        group_in(in_channels / groups),
        group_out(out_channels / groups),
        offset_group_in(in_channels / offset_groups),
        padded_row(in_w + 1),
        padded_pixels((in_h + 4) * padded_row + 2),
        nowhere((in_h + 2) * padded_row + 1) {}

  int64_t taps, pixels, positions;
  int64_t samples;  // of a position: one for each offset group and tap, in this order
  int64_t group_in, group_out, offset_group_in;
  int64_t padded_row, padded_pixels, nowhere;  // see `Map`
};

// ------------------------------------------------------------------------- where samples lie

// A run of neighboring positions of one image inside a tile.
struct Run {
  int64_t start, length;  // in the tile
  int64_t image;          // in the batch
  int64_t position;       // in the image
};

// Positions [begin, begin + count), counted through the images from `first_image` on.
class Tile {
 public:
  Tile(const Geometry& p, int64_t first_image, int64_t begin, int64_t count)
      : first_image(first_image), begin(begin), count(count), positions_(p.positions) {}

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
  Samples(Memory& memory, int64_t capacity)
      : pixel(memory.take<Index<A>>(capacity)),
        weights(memory.take<A>(4 * capacity)),
        fy(memory.take<A>(capacity)),
        fx(memory.take<A>(capacity)),
        mask(memory.take<A>(capacity)) {}

  // Of `count` taps and offset groups, one after another.
  static Samples* take(Memory& memory, int64_t count, int64_t capacity) {
    Samples* all = memory.take<Samples>(count);
    for (int64_t i = 0; i < count; ++i) {
      const Samples one(memory, capacity);
      if (all) all[i] = one;
    }
    return all;
  }

  Index<A>* pixel;  // of the first corner, counted through the framed maps in memory
  A* weights;       // of the four corners, bilinear, side by side; NaN where the offset is
  A *fy, *fx;       // the fractions that the weights are made of; negative where there is no slope
  A* mask;
};

// Room to place the samples of one tap and offset group: coordinates, and the first pixel of the image.
template <class A>
struct Places {
  Places(Memory& memory, int64_t capacity)
      : y(memory.take<A>(capacity)), x(memory.take<A>(capacity)), image(memory.take<Index<A>>(capacity)) {}

  A *y, *x;
  Index<A>* image;
};

// Reads offsets and masks of a tap and offset group, and adds the tap's place on the regular grid.
template <class A>
void read_places(const Geometry& p, const Tile& tile, const void* offset, const void* mask,
                 int64_t offset_group, int64_t tap, const Places<A>& places, A* masks) {
  const int64_t channel = offset_group * p.taps + tap;
  const int64_t dy = tap / p.kernel_w * p.dilation_h - p.pad_h;
  const int64_t dx = tap % p.kernel_w * p.dilation_w - p.pad_w;
  tile.for_each_run([&](const Run& run) {
    const int64_t plane = run.image * p.samples + channel;
    A *y = places.y + run.start, *x = places.x + run.start, *m = masks + run.start;
    Index<A>* image = places.image + run.start;
    read_run(offset, p.offset_dtype, 2 * plane * p.positions + run.position, run.length, y);
    read_run(offset, p.offset_dtype, (2 * plane + 1) * p.positions + run.position, run.length, x);
    const Index<A> first_pixel = Index<A>((run.image - tile.first_image) * p.padded_pixels);
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
      read_run(mask, p.mask_dtype, plane * p.positions + run.position, run.length, m);
    else
      for (int64_t i = 0; i < run.length; ++i) m[i] = A(1);
  });
}

// Coordinates as the first of their two cells, and the fraction of the way to the second.
template <class A>
inline void split(Vec<A> at, int64_t size, bool msra, IndexVec<A>* cell, Vec<A>* fraction) {
  const Vec<A> lowest = Vec<A>{} - 2, highest = Vec<A>{} + A(size + 1);
  // Beyond these bounds both cells are outside in any case. NaN becomes a defined number here, too.
  Vec<A> clamped = at > lowest ? at : lowest;
  clamped = clamped < highest ? clamped : highest;
  IndexVec<A> low = __builtin_convertvector(clamped, IndexVec<A>);
  low += __builtin_convertvector(low, Vec<A>) > clamped;  // true is -1
  *fraction = clamped - __builtin_convertvector(low, Vec<A>);
  *cell = low;
  // The kernel of 2017 repeats the last cell.
  if (msra) *fraction = low == Index<A>(size - 1) ? Vec<A>{} : *fraction;
}

// Pixels and bilinear weights of `count` samples. Arrays have room for whole vectors; what lies behind the end is
// computed and never used.
template <class A>
void place_samples(const Geometry& p, int64_t count, const Places<A>& places,
                   const Samples<A>& samples) {
  using V = Vec<A>;
  using I = IndexVec<A>;
  const Index<A> height = Index<A>(p.in_h), width = Index<A>(p.in_w);
  const bool msra = p.border == kMsra2017;
  const Index<A> first = msra ? 0 : -1;  // the kernel of 2017 samples nothing before the first cell
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const V y = load(places.y + i), x = load(places.x + i);
    I image;
    std::memcpy(&image, places.image + i, sizeof image);
    I top, left;
    V fy, fx;
    split<A>(y, p.in_h, msra, &top, &fy);
    split<A>(x, p.in_w, msra, &left, &fx);
    const I defined = (y == y) & (x == x);
    const V nan = V{} + A(__builtin_nan(""));
    fy = defined ? fy : nan;
    fx = defined ? fx : nan;
    const I within = (top >= first) & (top < height) & (left >= first) & (left < width);
    const I cell = (top + 1) * Index<A>(p.padded_row) + left + 1;
    const I pixel = image + (within ? cell : I{} + Index<A>(p.nowhere));
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

// All samples of a tile.
template <class A>
void locate(const Geometry& p, const Tile& tile, const void* offset, const void* mask,
            const Places<A>& places, const Samples<A>* samples) {
  for (int64_t g = 0; g < p.offset_groups; ++g)
    for (int64_t tap = 0; tap < p.taps; ++tap, ++samples) {
      read_places<A>(p, tile, offset, mask, g, tap, places, samples->mask);
      place_samples<A>(p, tile.count, places, *samples);
    }
}

// ---------------------------------------------------------------------------------- the map

// A channels-last map with a frame, so that the four corners of a sample are there wherever it lies: a row
// above and one below, a column between the end of one row and the start of the next, and two rows of
// zeros for whatever lies farther out, which `Geometry::nowhere` is in. Pixel (y, x) is at
// (y + 1) * padded_row + x + 1. The frame is zero; for the kernel of 2017 it repeats the last row and
// column, whose slope is zero then.
template <class A>
struct Map {
  Map(const Geometry& p, const A* data) : data(data), channels(p.in_channels), row(p.padded_row * p.in_channels) {}

  const A* at(int64_t pixel, int64_t channel) const { return data + pixel * channels + channel; }

  const A* data;
  int64_t channels, row;  // numbers of a pixel, and of a row
};

// Visits framed maps in strips of pixels with `channels` numbers each: visit(map, start, n, places), where places[i] is
// pixel start + i of the map. Called by all threads of a team.
template <class A, class Visit>
void for_each_strip(const Geometry& p, int64_t count, int64_t channels, A* maps, Visit visit) {
  constexpr int64_t strip = 256;
  const int64_t strips = ceil_div(p.pixels, strip);
#pragma omp for
  for (int64_t item = 0; item < count * strips; ++item) {
    const int64_t which = item / strips, start = item % strips * strip;
    const int64_t n = least(strip, p.pixels - start);
    A* map = maps + which * p.padded_pixels * channels;
    A* places[strip];
    for (int64_t i = 0, y = start / p.in_w, x = start % p.in_w; i < n; ++i) {
      places[i] = map + ((y + 1) * p.padded_row + x + 1) * channels;
      if (++x == p.in_w) x = 0, ++y;
    }
    visit(which, start, n, places);
  }
}

template <class A>
void frame_map(const Geometry& p, int64_t channels, A* map) {
  const int64_t row = p.padded_row;
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
  std::memset(below + channels, 0, size_t(p.padded_pixels - (p.in_h + 1) * row - 1) * pixel);
  if (p.border == kMsra2017) std::memcpy(below + channels, below - p.in_w * channels, size_t(row) * pixel);
}

// Copies channels [channel, channel + width) of pixels [start, start + n) of an image to `places`.
template <class A, class T>
void copy_strip(const Geometry& p, const T* image, int64_t channel, int64_t width, int64_t start, int64_t n,
                A** places) {
  if (p.input_channels_last)
    for (int64_t i = 0; i < n; ++i) convert_row<A>(image + (start + i) * p.in_channels + channel, width, places[i]);
  else
    transpose_between<A, A>(
        width, n, [&](int64_t c) { return image + (channel + c) * p.pixels + start; },
        [&](int64_t i) { return places[i]; });
}

// The reverse: copies `places` to the image.
template <class A, class T>
void write_strip(const Geometry& p, A** places, int64_t channel, int64_t width, int64_t start, int64_t n, T* image) {
  if (p.input_channels_last)
    for (int64_t i = 0; i < n; ++i) convert_row<A>(places[i], width, image + (start + i) * p.in_channels + channel);
  else
    transpose_between<A, T>(
        n, width, [&](int64_t i) { return places[i]; },
        [&](int64_t c) { return image + (channel + c) * p.pixels + start; });
}

// Makes framed maps of images [begin, end). Called by all threads of a team.
template <class A, class T>
void copy_maps(const Geometry& p, const T* input, int64_t begin, int64_t end, A* maps) {
  const int64_t channels = p.in_channels, size = channels * p.pixels;
  for_each_strip(p, end - begin, channels, maps, [=](int64_t image, int64_t start, int64_t n, A** places) {
    copy_strip<A>(p, input + (begin + image) * size, 0, channels, start, n, places);
  });
#pragma omp for
  for (int64_t image = 0; image < end - begin; ++image)
    frame_map(p, channels, maps + image * p.padded_pixels * channels);
}

// The gradient of images [begin, end), from sums in framed maps. Called by all threads of a team.
template <class A, class T>
void write_maps(const Geometry& p, A* maps, int64_t begin, int64_t end, T* grad_input) {
  const int64_t channels = p.in_channels, size = channels * p.pixels;
  for_each_strip(p, end - begin, channels, maps, [=](int64_t image, int64_t start, int64_t n, A** places) {
    write_strip<A>(p, places, 0, channels, start, n, grad_input + (begin + image) * size);
  });
}

// ------------------------------------------------------------------------------- sampling

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
void sample_block(const Geometry& p, const Map<A>& map, const Samples<A>* samples, const Block& block,
                  int64_t count, Column* columns, int64_t row) {
  const int64_t group_width = p.offset_group_in;
  for (int64_t tap = block.tap_begin; tap < block.tap_end; ++tap)
    for (int64_t g = block.channel_begin / group_width; g * group_width < block.channel_end; ++g) {
      const Samples<A>& at = samples[g * p.taps + tap];
      const int64_t channel = most(block.channel_begin, g * group_width);
      const int64_t width = least(block.channel_end, (g + 1) * group_width) - channel;
      Column* first = columns + (tap - block.tap_begin) * block.channels() + channel - block.channel_begin;
      for (int64_t i = 0; i < count; ++i)
        read_sample<modulated>(map, at, i, channel, width, first + i * row);
    }
}

template <class A, class Column>
void sample(bool modulated, const Geometry& p, const Map<A>& map, const Samples<A>* samples,
            const Block& block, int64_t count, Column* columns, int64_t row) {
  if (modulated)
    sample_block<true>(p, map, samples, block, count, columns, row);
  else
    sample_block<false>(p, map, samples, block, count, columns, row);
}

}  // namespace
}  // namespace deformnet::DEFORMNET_ISA

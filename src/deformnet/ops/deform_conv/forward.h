// The forward pass. The positions (n, oy, ox) are cut into tiles; a thread takes a tile, samples a few taps of it into
// `columns` [position, tap, channel], which stay in its cache, and multiplies them at once with the packed weights. The
// map is channels-last here, so the four corners of a sample are four runs of channels, and a whole offset group shares
// their bilinear weights.
#pragma once

#include <type_traits>

#include "gemm.h"
#include "sampling.h"

namespace deformnet::DEFORMNET_ISA {
namespace {

// From one row of columns to the next. A cache line more keeps rows of a power of two out of each other's
// cache sets.
template <class A>
constexpr int64_t kColumnsRow = kBlockDepth + kCacheLine / int64_t(sizeof(A));

// --------------------------------------------------------------------------- packed weights

// [group][panel of output channels][tap][channel][lane]; in pairs
// [group][panel][tap][channel / 2][lane][channel % 2].
template <class E, class T>
void pack_forward(const Geometry& p, const T* weight, E* packed) {
  using A = typename ComputeOf<T>::type;
  constexpr int panel = kPanel<A>;
  const int64_t panels = ceil_div(p.group_out, panel), depth = p.group_in * p.taps;
  // A few rows of the source at a time, so that the lines written to stay in the cache.
  constexpr int64_t stretch = 64;
  const int64_t stretches = ceil_div(depth, stretch);
#pragma omp for
  for (int64_t item = 0; item < p.groups * panels * stretches; ++item) {
    const int64_t group = item / (panels * stretches), which = item / stretches % panels;
    const int64_t begin = item % stretches * stretch, n = least(stretch, depth - begin);
    const int64_t outs = least<int64_t>(panel, p.group_out - which * panel);
    A block[stretch * panel] = {};  // [k][lane]
    const T* from = weight + (group * p.group_out + which * panel) * depth + begin;
    transpose<A>(from, depth, outs, n, block, panel);
    E* to = packed + (group * panels + which) * depth / kTogether<E> * panel;
    int64_t channel = begin / p.taps, tap = begin % p.taps;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t row = tap * p.group_in + channel;
      for (int lane = 0; lane < panel; ++lane) put(to, row, lane, block[k * panel + lane]);
      if (++tap == p.taps) tap = 0, ++channel;
    }
  }
}

// --------------------------------------------------------------------------------- products

// The columns of a block times the weights, added to `sums`, or else in their place.
template <class E, class A>
void add_product(const Geometry& p, const Block& block, int64_t count, const E* columns,
                 const E* packed, A* sums, int64_t sums_row, bool accumulate) {
  constexpr int panel = kPanel<A>;
  constexpr int64_t together = kTogether<E>;
  const int64_t panels = ceil_div(p.group_out, panel), group_in = p.group_in;
  for (int64_t group = block.channel_begin / group_in; group * group_in < block.channel_end; ++group) {
    const int64_t begin = most(block.channel_begin, group * group_in);
    const int64_t end = least(block.channel_end, (group + 1) * group_in);
    const LeftFactor<E, kColumnsRow<A>> left{columns + (begin - block.channel_begin) / together, 1,
                                             block.channels() / together, block.tap_end - block.tap_begin,
                                             (end - begin) / together};
    for (int64_t which = 0; which < panels; ++which) {
      const int64_t at = ((group * panels + which) * p.taps + block.tap_begin) * group_in + begin -
                         group * group_in;
      const E* from = packed + at / together * panel;
      A* to = sums + group * p.group_out + which * panel;
      const int n = int(least<int64_t>(panel, p.group_out - which * panel));
      const bool add = accumulate || begin > group * group_in;
      multiply(count, left, from, to, sums_row, n, add);
    }
  }
}

// Writes channels [channel, channel + width) of a tile's output.
template <class A, class T>
void write_tile(const Geometry& p, const Tile& tile, const A* sums, int64_t row, int64_t channel, int64_t width,
                T* output) {
  const int64_t channels = p.out_channels, positions = p.positions;
  tile.for_each_run([&](const Run& run) {
    const A* from = sums + run.start * row;
    if (p.output_channels_last) {
      T* to = output + (run.image * positions + run.position) * channels + channel;
      for (int64_t i = 0; i < run.length; ++i)
        convert_row<A>(from + i * row, width, to + i * channels);
    } else {
      T* to = output + (run.image * channels + channel) * positions + run.position;
      transpose<A>(from, row, run.length, width, to, positions);
    }
  });
}

// ---------------------------------------------------------------------------- the whole pass

// Sizes. E is the type of columns and packed weights.
template <class A, class E>
struct ForwardPlan : Geometry {
  ForwardPlan(const Problem& p, const ForwardTensors& tensors) : Geometry(p), tensors(tensors) {
    constexpr int64_t together = kTogether<E>, number = sizeof(A);
    block_taps = most<int64_t>(1, least(taps, kBlockDepth * together / in_channels));
    block_channels = least(in_channels, kBlockDepth * together);
    image_size = padded_pixels * in_channels;
    images = least(batch, most<int64_t>(1, kImagesBytes / (image_size * number)));
    packed_size = groups * ceil_div(group_out, kPanel<A>) * taps * group_in / together * kPanel<A>;
    // Tiles of equal size, as many for every thread, in whole vectors, so that rows of the output are written in
    // whole cache lines.
    const int64_t depth = block_taps * block_channels / together, all = images * positions;
    const int64_t fitting = most<int64_t>(kTileRows, kColumnsBytes / (depth * number));
    tile_rows = round_up(ceil_div(all, round_up(ceil_div(all, fitting), threads)), kLanes<A>);
    sums_row = out_channels + kCacheLine / number;  // a cache line more, for the same reason as in kColumnsRow
  }

  const ForwardTensors& tensors;
  int64_t block_taps, block_channels;  // of the columns that are sampled at a time
  int64_t image_size, images;          // numbers of a framed map, and how many there are at a time
  int64_t packed_size, tile_rows, sums_row;
};

template <class T, class E>
struct ForwardShared {
  using A = typename ComputeOf<T>::type;
  using Plan = ForwardPlan<A, E>;

  ForwardShared(const Plan& plan, Memory& memory)
      : packed(memory.take<E>(plan.packed_size)),
        biases(memory.take<A>(plan.out_channels)),
        maps(memory.take<A>(plan.images * plan.image_size)) {}

  void prepare(const Plan& plan) {
    const T* bias = static_cast<const T*>(plan.tensors.bias);
    for (int64_t c = 0; c < plan.out_channels; ++c) biases[c] = bias ? A(read(bias[c])) : A(0);
  }

  E* packed;
  A *biases, *maps;
};

template <class T, class E = typename ComputeOf<T>::type>
class Forward {
  using A = typename ComputeOf<T>::type;
  using Column = std::conditional_t<kSame<E, Pair>, BFloat16, A>;
  using Plan = ForwardPlan<A, E>;
  using Shared = ForwardShared<T, E>;

 public:
  Forward(const Plan& plan, const Shared& shared, Memory& memory)
      : plan(plan),
        tensors(plan.tensors),
        shared(shared),
        columns(memory.take<E>(plan.tile_rows * kColumnsRow<A>)),
        sums(memory.take<A>(plan.tile_rows * plan.sums_row)),
        places(memory, plan.tile_rows),
        samples(Samples<A>::take(memory, plan.samples, plan.tile_rows)) {}

  static int run_team(const Problem& p, const ForwardTensors& tensors) {
    return DEFORMNET_ISA::run_team<Shared, Forward>(Plan(p, tensors));
  }

  void run() const {
    [[maybe_unused]] const TileUser tiles_in_use{};
    pack_forward(plan, static_cast<const T*>(tensors.weight), shared.packed);
    for (int64_t first = 0; first < plan.batch; first += plan.images) {
      const int64_t last = least(first + plan.images, plan.batch), total = (last - first) * plan.positions;
      copy_maps<A>(plan, static_cast<const T*>(tensors.input), first, last, shared.maps);
#pragma omp for schedule(static)
      for (int64_t begin = 0; begin < total; begin += plan.tile_rows)
        convolve(Tile(plan, first, begin, least(plan.tile_rows, total - begin)));
    }
  }

 private:
  void convolve(const Tile& tile) const {
    locate<A>(plan, tile, tensors.offset, tensors.mask, places, samples);
    const Map<A> map(plan, shared.maps);
    const int64_t channels = plan.in_channels;
    if (tensors.bias)
      for (int64_t i = 0; i < tile.count; ++i)
        for (int64_t c = 0; c < plan.out_channels; ++c) sums[i * plan.sums_row + c] = shared.biases[c];
    for (int64_t tap = 0; tap < plan.taps; tap += plan.block_taps)
      for (int64_t channel = 0; channel < channels; channel += plan.block_channels) {
        const Block block{tap, least(tap + plan.block_taps, plan.taps), channel,
                          least(channel + plan.block_channels, channels)};
        sample(tensors.mask, plan, map, samples, block, tile.count, reinterpret_cast<Column*>(columns),
               kColumnsRow<A> * kTogether<E>);
        add_product(plan, block, tile.count, columns, shared.packed, sums, plan.sums_row, tensors.bias || tap > 0);
      }
    write_tile<A>(plan, tile, sums, plan.sums_row, 0, plan.out_channels, static_cast<T*>(tensors.output));
  }

  const Plan& plan;
  const ForwardTensors& tensors;
  const Shared& shared;
  E* columns;  // of a tile
  A* sums;
  Places<A> places;
  Samples<A>* samples;
};

}  // namespace
}  // namespace deformnet::DEFORMNET_ISA

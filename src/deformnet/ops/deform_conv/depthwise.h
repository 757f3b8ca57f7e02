// Depthwise layers. With one filter per channel there is no matrix product, so no columns are stored. Channels are
// divided into slices: a few vectors of one offset group, with a framed map of their own, which stays in the cache. The
// four corners of a sample are read once per slice, and everything that depends on them is computed in registers: in
// the forward pass, the sum over the taps; in the backward pass, the dot products for the gradients of offset and mask,
// the gradient of the filter, and the contributions to the four corners of the map's gradient. One thread computes all
// sums of a slice, and sums over slices and images have a fixed order, so the number of threads does not affect results.
#pragma once

#include "backward.h"

namespace deformnet::DEFORMNET_ISA {
namespace {

constexpr int64_t kPartBytes = 8 << 20;    // samples of an image that are processed at a time
constexpr int64_t kMapsBytes = 512 << 10;  // maps of a thread: a fraction of its private cache
constexpr int64_t kRowsTogether = 64;      // positions whose outputs are written together
// Vectors of a slice: as many sums as fit into registers along with the weights and values of a sample.
constexpr int kSliceVectors = kTileRows * kTileVectors > 16 ? 6 : 4;

template <class A>
constexpr int64_t kSampleBytes = 8 * sizeof(A);  // see `Samples`

// Call::run<vectors>(arguments...), where vectors == wanted.
template <class Call, int vectors = kSliceVectors, class... Arguments>
inline void with_vectors(int64_t wanted, const Arguments&... arguments) {
  if constexpr (vectors > 1)
    if (wanted < vectors) return with_vectors<Call, vectors - 1>(wanted, arguments...);
  Call::template run<vectors>(arguments...);
}

inline bool is_depthwise(const Problem& p) {
  return p.groups > 1 && p.groups == p.in_channels && p.groups == p.out_channels;
}

// ------------------------------------------------------------------------------------ slices

// Sizes. They depend on the number of threads, but results do not.
template <class A>
struct Slices : Geometry {
  Slices(const Problem& p, int64_t most_vectors) : Geometry(p) {
    const int64_t all = ceil_div(offset_group_in, kLanes<A>);
    vectors = ceil_div(all, ceil_div(all, most_vectors));
    width = vectors * kLanes<A>;
    of_group = ceil_div(all, vectors);
    slices = offset_groups * of_group;
    map_size = padded_pixels * width;
  }

  // Chooses sizes from the bytes that a slice of an image takes, and those that a position takes.
  void split(int64_t slice_bytes, int64_t position_bytes) {
    const int64_t bytes = threads * kMapsBytes;
    part = least(positions, round_up(ceil_div(kPartBytes, position_bytes), kLanes<A>));
    block = part < positions ? slices : least<int64_t>(slices, most<int64_t>(threads, bytes / slice_bytes));
    images = least(batch, most<int64_t>(1, bytes / (slices * slice_bytes + part * position_bytes)));
    capacity = round_up(part, kLanes<A>);
  }

  int64_t group(int64_t slice) const { return slice / of_group; }
  int64_t channel(int64_t slice) const { return group(slice) * offset_group_in + slice % of_group * width; }
  int64_t channels(int64_t slice) const { return least(width, offset_group_in - slice % of_group * width); }

  int64_t vectors, width;       // of a slice; lanes without a channel hold zeros
  int64_t of_group, slices;     // slices of an offset group, and in total
  int64_t map_size;             // numbers of a slice's framed map
  int64_t images, block, part;  // images, slices and positions that are processed at a time
  int64_t capacity;             // of arrays of positions
};

// What is processed at a time: some slices of some images, and some of their positions.
struct Part {
  int64_t first_image, images, first_slice, slices, begin, end;

  int64_t maps() const { return images * slices; }
  int64_t image(int64_t map) const { return map / slices; }  // among those of the part
  int64_t slice(int64_t map) const { return first_slice + map % slices; }
  Tile tile(const Geometry& p, int64_t image) const { return Tile(p, first_image + image, begin, end - begin); }
};

// Calls visit(part) for every part, in the order of images, slices and positions. If the positions of an image are
// split, each part has all slices.
template <class A, class Visit>
void for_each_part(const Slices<A>& p, Visit visit) {
  for (int64_t image = 0; image < p.batch; image += p.images)
    for (int64_t slice = 0; slice < p.slices; slice += p.block)
      for (int64_t begin = 0; begin < p.positions; begin += p.part)
        visit(Part{image, least(p.images, p.batch - image), slice, least(p.block, p.slices - slice), begin,
                   least(begin + p.part, p.positions)});
}

// What both passes read.
template <class A>
struct SliceInputs {
  SliceInputs(const Slices<A>& p, Memory& memory)
      : filters(memory.take<A>(p.slices * p.taps * p.width)),
        maps(memory.take<A>(p.images * p.block * p.map_size)),
        samples(Samples<A>::take(memory, p.images * p.samples, p.capacity)) {}

  A *filters;           // [slice][tap][lane]
  A* maps;              // [image][slice] of a part, framed
  Samples<A>* samples;  // [image][offset group][tap]
};

template <class A, class T>
void pack_filters(const Slices<A>& p, const T* weight, A* packed) {
#pragma omp for nowait
  for (int64_t slice = 0; slice < p.slices; ++slice)
    for (int64_t tap = 0; tap < p.taps; ++tap)
      for (int64_t c = 0; c < p.width; ++c)
        packed[(slice * p.taps + tap) * p.width + c] =
            c < p.channels(slice) ? A(read(weight[(p.channel(slice) + c) * p.taps + tap])) : A(0);
}

// Prepares the samples and maps of a part, except for those left from the previous part.
template <class A, class T>
void read_part(const Slices<A>& p, const Part& part, const T* input, const void* offset, const void* mask,
               const Places<A>& places, const SliceInputs<A>& to) {
  if (part.first_slice == 0) {
#pragma omp for nowait
    for (int64_t item = 0; item < part.images * p.samples; ++item) {
      const Tile tile = part.tile(p, item / p.samples);
      const int64_t sample = item % p.samples;
      read_places(p, tile, offset, mask, sample / p.taps, sample % p.taps, places, to.samples[item].mask);
      place_samples(p, tile.count, places, to.samples[item]);
    }
  }
  if (part.begin == 0) {
    for_each_strip(p, part.maps(), p.width, to.maps, [&](int64_t map, int64_t start, int64_t n, A** pixels) {
      const int64_t slice = part.slice(map), image = part.first_image + part.image(map), channels = p.channels(slice);
      copy_strip(p, input + image * p.in_channels * p.pixels, p.channel(slice), channels, start, n, pixels);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = channels; c < p.width; ++c) pixels[i][c] = A(0);
    });
#pragma omp for nowait
    for (int64_t map = 0; map < part.maps(); ++map) frame_map(p, p.width, to.maps + map * p.map_size);
  }
#pragma omp barrier
}

// --------------------------------------------------------------------------------- forward

// Outputs of a slice at positions [begin, end), two at a time if registers suffice, which share loads of the filters.
template <bool modulated>
struct ConvolveSlice {
  template <int vectors, class A>
  __attribute__((noinline)) static void run(const A* map, int64_t padded_row, const Samples<A>* samples, int64_t taps,
                                            int64_t begin, int64_t end, const A* filters, const A* bias, A* to) {
    constexpr int lanes = kLanes<A>, rows = kTileRows * kTileVectors > 16 ? 2 : 1;
    constexpr int64_t width = vectors * lanes;
    const int64_t down = padded_row * width;
    for (int64_t first = begin; first < end; first += rows) {
      int64_t position[rows];  // if their number is odd, the last one is computed twice
      Vec<A> sums[rows][vectors];
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) {
        position[r] = least(first + r, end - 1);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sums[r][v] = load(bias + v * lanes);
      }
      const A* filter = filters;
      for (const Samples<A>* at = samples; at != samples + taps; ++at, filter += width) {
        const A *top[rows], *bottom[rows];
        Vec<A> w[rows][4], mask[rows];
#pragma GCC unroll 2
        for (int r = 0; r < rows; ++r) {
          top[r] = map + at->pixel[position[r]] * width;
          bottom[r] = top[r] + down;
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) w[r][j] = at->weights[4 * position[r] + j] - Vec<A>{};
          mask[r] = at->mask[position[r]] - Vec<A>{};
        }
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          const Vec<A> factor = load(filter + v * lanes);
#pragma GCC unroll 2
          for (int r = 0; r < rows; ++r) {
            const A *t = top[r] + v * lanes, *b = bottom[r] + v * lanes;
            const Vec<A> value = load(t) * w[r][0] + load(t + width) * w[r][1] +  //
                                 load(b) * w[r][2] + load(b + width) * w[r][3];
            sums[r][v] += (modulated ? value * mask[r] : value) * factor;
          }
        }
      }
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) store(to + (position[r] - begin) * width + v * lanes, sums[r][v]);
    }
  }
};

template <class A>
struct DepthwiseForwardPlan : Slices<A> {
  DepthwiseForwardPlan(const Problem& p, const ForwardTensors& tensors)
      : Slices<A>(p, kSliceVectors), tensors(tensors) {
    this->split(this->map_size * int64_t(sizeof(A)), this->samples * kSampleBytes<A>);
  }

  const ForwardTensors& tensors;
};

template <class A>
struct DepthwiseForwardShared : SliceInputs<A> {
  DepthwiseForwardShared(const DepthwiseForwardPlan<A>& plan, Memory& memory)
      : SliceInputs<A>(plan, memory), biases(memory.take<A>(plan.slices * plan.width)) {}

  void prepare(const DepthwiseForwardPlan<A>&) {}

  A* biases;  // [slice][lane]
};

template <class T>
class DepthwiseForward {
  using A = typename ComputeOf<T>::type;
  using Plan = DepthwiseForwardPlan<A>;
  using Shared = DepthwiseForwardShared<A>;

 public:
  DepthwiseForward(const Plan& plan, const Shared& shared, Memory& memory)
      : plan(plan),
        tensors(plan.tensors),
        shared(shared),
        places(memory, plan.capacity),
        rows(memory.take<A>(kRowsTogether * plan.width)) {}

  static int run_team(const Problem& p, const ForwardTensors& tensors) {
    return DEFORMNET_ISA::run_team<Shared, DepthwiseForward>(Plan(p, tensors));
  }

  void run() const {
    pack_filters<A>(plan, static_cast<const T*>(tensors.weight), shared.filters);
    pack_biases();
    for_each_part(plan, [&](const Part& part) {
      read_part<A>(plan, part, static_cast<const T*>(tensors.input), tensors.offset, tensors.mask, places, shared);
      const int64_t strips = ceil_div(part.end - part.begin, kRowsTogether);
#pragma omp for schedule(static)
      for (int64_t item = 0; item < part.maps() * strips; ++item) {
        const int64_t begin = item % strips * kRowsTogether, end = least(begin + kRowsTogether, part.end - part.begin);
        convolve(part, item / strips, begin, end);
      }
    });
  }

 private:
  void pack_biases() const {
    const T* bias = static_cast<const T*>(tensors.bias);
#pragma omp for nowait
    for (int64_t slice = 0; slice < plan.slices; ++slice)
      for (int64_t c = 0; c < plan.width; ++c)
        shared.biases[slice * plan.width + c] =
            bias && c < plan.channels(slice) ? A(read(bias[plan.channel(slice) + c])) : A(0);
  }

  // Positions [begin, end) of a part, in one of its maps.
  void convolve(const Part& part, int64_t which, int64_t begin, int64_t end) const {
    const int64_t image = part.image(which), slice = part.slice(which);
    const auto call = [&](auto convolve_slice) {
      with_vectors<decltype(convolve_slice)>(
          plan.vectors, shared.maps + which * plan.map_size, plan.padded_row,
          shared.samples + image * plan.samples + plan.group(slice) * plan.taps, plan.taps, begin, end,
          shared.filters + slice * plan.taps * plan.width, shared.biases + slice * plan.width, rows);
    };
    if (tensors.mask)
      call(ConvolveSlice<true>());
    else
      call(ConvolveSlice<false>());
    write_tile(plan, Tile(plan, part.first_image + image, part.begin + begin, end - begin), rows, plan.width,
               plan.channel(slice), plan.channels(slice), static_cast<T*>(tensors.output));
  }

  const Plan& plan;
  const ForwardTensors& tensors;
  const Shared& shared;
  Places<A> places;
  A* rows;  // [position][lane]
};

// --------------------------------------------------------------------------------- backward

// For all positions of a part, in one image and slice: adds to the gradients of the map and of the filters, and writes
// the dot products of the gradients of the samples with their corners, [tap][corner][position].
template <bool modulated>
struct DifferentiateSlice {
  template <int vectors, class A>
  __attribute__((noinline)) static void run(const A* map, A* map_sums, int64_t padded_row, const Samples<A>* samples,
                                            int64_t taps, int64_t count, int64_t capacity, const A* filters,
                                            const A* grad_output, A* filter_sums, A* dots) {
    constexpr int lanes = kLanes<A>;
    constexpr int64_t width = vectors * lanes;
    const int64_t down = padded_row * width;
    // As many positions at a time as sums fit into a vector.
    for (int64_t first = 0; first < count; first += lanes) {
      const int64_t some = least<int64_t>(lanes, count - first);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const Samples<A>& at = samples[tap];
        Vec<A> filter[vectors], filter_sum[vectors], products[4][lanes];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          filter[v] = load(filters + tap * width + v * lanes);
          filter_sum[v] = load(filter_sums + tap * width + v * lanes);
        }
        for (int64_t k = 0; k < some; ++k) {
          const int64_t i = first + k, top = at.pixel[i] * width, bottom = top + down;
          const A *w = at.weights + 4 * i, *grads = grad_output + i * width;
          const Vec<A> w0 = w[0] - Vec<A>{}, w1 = w[1] - Vec<A>{}, w2 = w[2] - Vec<A>{}, w3 = w[3] - Vec<A>{};
          const Vec<A> mask = at.mask[i] - Vec<A>{};
          Vec<A> dot[4] = {};
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) {
            const A *t = map + top + v * lanes, *b = map + bottom + v * lanes;
            A *to_t = map_sums + top + v * lanes, *to_b = map_sums + bottom + v * lanes;
            const Vec<A> v0 = load(t), v1 = load(t + width), v2 = load(b), v3 = load(b + width);
            const Vec<A> grad = load(grads + v * lanes), value = v0 * w0 + v1 * w1 + v2 * w2 + v3 * w3;
            filter_sum[v] += (modulated ? value * mask : value) * grad;
            const Vec<A> column = grad * filter[v], masked = modulated ? column * mask : column;
            dot[0] += column * v0;
            dot[1] += column * v1;
            dot[2] += column * v2;
            dot[3] += column * v3;
            const Vec<A> s0 = load(to_t) + masked * w0, s1 = load(to_t + width) + masked * w1;
            const Vec<A> s2 = load(to_b) + masked * w2, s3 = load(to_b + width) + masked * w3;
            store(to_t, s0);
            store(to_t + width, s1);
            store(to_b, s2);
            store(to_b + width, s3);
          }
          for (int j = 0; j < 4; ++j) products[j][k] = dot[j];
        }
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) store(filter_sums + tap * width + v * lanes, filter_sum[v]);
        for (int64_t k = some; k < lanes; ++k)
          for (int j = 0; j < 4; ++j) products[j][k] = Vec<A>{};
        for (int j = 0; j < 4; ++j) store(dots + (tap * 4 + j) * capacity + first, sum_each<A>(products[j]));
      }
    }
  }
};

template <class A>
struct DepthwiseBackwardPlan : Slices<A> {
  // At least two slices, so that two threads have work with one image.
  DepthwiseBackwardPlan(const Problem& p, const BackwardTensors& tensors)
      : Slices<A>(p, least<int64_t>(kSliceVectors, ceil_div(p.in_channels, 2 * kLanes<A>))), tensors(tensors) {
    constexpr int64_t number = sizeof(A);
    this->split((2 * this->map_size + this->taps * this->width) * number,
                this->samples * kSampleBytes<A> + (4 * this->slices * this->taps + this->width) * number);
  }

  const BackwardTensors& tensors;
};

template <class A>
struct DepthwiseBackwardShared : SliceInputs<A> {
  DepthwiseBackwardShared(const DepthwiseBackwardPlan<A>& plan, Memory& memory)
      : SliceInputs<A>(plan, memory),
        map_sums(memory.take<A>(plan.images * plan.block * plan.map_size)),
        filter_sums(memory.take<A>(plan.images * plan.block * plan.taps * plan.width)),
        totals(memory.take<A>(plan.slices * plan.taps * plan.width)),
        dots(memory.take<A>(plan.images * plan.slices * plan.taps * 4 * plan.capacity)) {}

  void prepare(const DepthwiseBackwardPlan<A>& plan) {
    std::memset(totals, 0, size_t(plan.slices * plan.taps * plan.width) * sizeof(A));
  }

  A* map_sums;     // as the maps
  A* filter_sums;  // [image][slice][tap][lane] of a part
  A* totals;       // their sums over images: [slice][tap][lane]
  A* dots;         // [image][slice][tap][corner][position], all slices of an image
};

template <class T>
class DepthwiseBackward {
  using A = typename ComputeOf<T>::type;
  using Plan = DepthwiseBackwardPlan<A>;
  using Shared = DepthwiseBackwardShared<A>;

 public:
  DepthwiseBackward(const Plan& plan, const Shared& shared, Memory& memory)
      : plan(plan),
        tensors(plan.tensors),
        shared(shared),
        places(memory, plan.capacity),
        grad_output(memory.take<A>(plan.part * plan.width)),
        sample_grads(memory, plan.capacity) {}

  static int run_team(const Problem& p, const BackwardTensors& tensors) {
    return DEFORMNET_ISA::run_team<Shared, DepthwiseBackward>(Plan(p, tensors));
  }

  void run() const {
    pack_filters<A>(plan, static_cast<const T*>(tensors.weight), shared.filters);
    for_each_part(plan, [&](const Part& part) {
      read_part<A>(plan, part, static_cast<const T*>(tensors.input), tensors.offset, tensors.mask, places, shared);
#pragma omp for schedule(static)
      for (int64_t map = 0; map < part.maps(); ++map) differentiate(part, map);
      if (part.end == plan.positions) write_maps(part);
      if (part.first_slice + part.slices == plan.slices) write_samples(part);
    });
    write_grad_weight();
  }

 private:
  // Everything except sums over slices and images, for one of the maps of a part.
  void differentiate(const Part& part, int64_t which) const {
    const int64_t image = part.image(which), slice = part.slice(which), filter_size = plan.taps * plan.width;
    A* map_sums = shared.map_sums + which * plan.map_size;
    A* filter_sums = shared.filter_sums + which * filter_size;
    if (part.begin == 0) {
      std::memset(map_sums, 0, size_t(plan.map_size) * sizeof(A));
      std::memset(filter_sums, 0, size_t(filter_size) * sizeof(A));
    }
    const Tile tile = part.tile(plan, image);
    pack_rows<A>(plan, tile, static_cast<const T*>(tensors.grad_output), plan.channel(slice), plan.channels(slice),
                 plan.width, grad_output);
    const auto call = [&](auto differentiate_slice) {
      with_vectors<decltype(differentiate_slice)>(
          plan.vectors, shared.maps + which * plan.map_size, map_sums, plan.padded_row,
          shared.samples + image * plan.samples + plan.group(slice) * plan.taps, plan.taps, tile.count, plan.capacity,
          shared.filters + slice * filter_size, grad_output, filter_sums,
          shared.dots + (image * plan.slices + slice) * plan.taps * 4 * plan.capacity);
    };
    if (tensors.mask)
      call(DifferentiateSlice<true>());
    else
      call(DifferentiateSlice<false>());
  }

  // Writes the gradients of the maps, and adds up those of the filters in the order of the images.
  void write_maps(const Part& part) const {
    const int64_t size = part.slices * plan.taps * plan.width;
    A* totals = shared.totals + part.first_slice * plan.taps * plan.width;
#pragma omp for nowait
    for (int64_t i = 0; i < size; ++i)
      for (int64_t image = 0; image < part.images; ++image) totals[i] += shared.filter_sums[image * size + i];
    T* grad_input = static_cast<T*>(tensors.grad_input);
    if (!grad_input) return;
    for_each_strip(plan, part.maps(), plan.width, shared.map_sums,
                   [&](int64_t map, int64_t start, int64_t n, A** pixels) {
                     const int64_t slice = part.slice(map), image = part.first_image + part.image(map);
                     write_strip(plan, pixels, plan.channel(slice), plan.channels(slice), start, n,
                                 grad_input + image * plan.in_channels * plan.pixels);
                   });
  }

  // Writes the gradients of offset and mask.
  void write_samples(const Part& part) const {
    if (!tensors.grad_offset && !tensors.grad_mask) return;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < part.images * plan.samples; ++item) {
      const int64_t image = item / plan.samples, sample = item % plan.samples;
      const int64_t g = sample / plan.taps, tap = sample % plan.taps;
      const Tile tile = part.tile(plan, image);
      for (int64_t first = 0; first < tile.count; first += kLanes<A>) {
        Vec<A> dot[4] = {};
        for (int64_t slice = g * plan.of_group; slice < (g + 1) * plan.of_group; ++slice) {
          const A* from = shared.dots + ((image * plan.slices + slice) * plan.taps + tap) * 4 * plan.capacity + first;
          for (int j = 0; j < 4; ++j) dot[j] += load(from + j * plan.capacity);
        }
        write_grads(shared.samples[item], first, least<int64_t>(kLanes<A>, tile.count - first), dot, sample_grads);
      }
      write_sample_grads(plan, tensors, tile, sample, sample_grads);
    }
  }

  void write_grad_weight() const {
#pragma omp barrier
    if (!tensors.grad_weight) return;
    T* grad_weight = static_cast<T*>(tensors.grad_weight);
#pragma omp for
    for (int64_t slice = 0; slice < plan.slices; ++slice)
      for (int64_t c = 0; c < plan.channels(slice); ++c)
        for (int64_t tap = 0; tap < plan.taps; ++tap)
          write(grad_weight + (plan.channel(slice) + c) * plan.taps + tap,
                shared.totals[(slice * plan.taps + tap) * plan.width + c]);
  }

  const Plan& plan;
  const BackwardTensors& tensors;
  const Shared& shared;
  Places<A> places;
  A* grad_output;  // of a slice: [position][lane]
  SampleGrads<A> sample_grads;
};

}  // namespace
}  // namespace deformnet::DEFORMNET_ISA

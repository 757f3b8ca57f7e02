// Depthwise layers, one filter per channel: there is no matrix product that columns could feed, so none are made.
// Channels are cut into slices, a few vectors of one offset group, each with a framed map of its own, which stays in the
// cache. A sample's four corners are read once per slice, and all that depends on them is computed in registers: forward,
// the sum over the taps; backward, the dot products that the gradients of offset and mask are made of, the gradient of
// the filter, and what the four corners of the gradient of the map receive.
#pragma once

#include "backward.h"

namespace deformnet::DEFORMNET_ISA {
namespace {

constexpr int64_t kPartBytes = 2 << 20;  // samples of an image that are processed at a time
constexpr int64_t kPartRows = 64;        // positions whose outputs are written together
// Vectors of a slice: as many sums as registers hold, beside the weights and values of a sample.
constexpr int kSliceVectors = kTileRows * kTileVectors > 16 ? 6 : 4;

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

// Sizes. Both passes take a few images at a time, or a part of the positions of one.
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

  // The bytes that an image, and a position of it, take beside the samples.
  void split(int64_t image_bytes, int64_t position_bytes) {
    Memory samples_of_16;
    Samples<A>(samples_of_16, 16);
    const int64_t bytes = position_bytes + samples * samples_of_16.used() / 16;
    part = least(positions, round_up(ceil_div(kPartBytes, bytes), kLanes<A>));
    images = least(batch, most<int64_t>(1, kImagesBytes / (image_bytes + part * bytes)));
    capacity = round_up(part, kLanes<A>);
  }

  int64_t group(int64_t slice) const { return slice / of_group; }
  int64_t channel(int64_t slice) const { return group(slice) * offset_group_in + slice % of_group * width; }
  int64_t channels(int64_t slice) const { return least(width, offset_group_in - slice % of_group * width); }

  int64_t vectors, width;     // of a slice; lanes without a channel hold zeros
  int64_t of_group, slices;   // slices of an offset group, and of all
  int64_t map_size;           // numbers of a slice's framed map
  int64_t images, part;       // that are processed at a time: images, and positions of each
  int64_t capacity;           // of arrays of positions
};

// Positions [begin, end) of images [first, last).
struct Part {
  int64_t first, last, begin, end;

  int64_t count() const { return last - first; }
  Tile tile(const Geometry& p, int64_t image) const { return Tile(p, first + image, begin, end - begin); }
};

// visit(part) for all of them. Parts of the same images follow one another.
template <class A, class Visit>
void for_each_part(const Slices<A>& p, Visit visit) {
  for (int64_t first = 0; first < p.batch; first += p.images)
    for (int64_t begin = 0; begin < p.positions; begin += p.part)
      visit(Part{first, least(first + p.images, p.batch), begin, least(begin + p.part, p.positions)});
}

// What both passes read.
template <class A>
struct SliceInputs {
  SliceInputs(const Slices<A>& p, Memory& memory)
      : filters(memory.take<A>(p.slices * p.taps * p.width)),
        maps(memory.take<A>(p.images * p.slices * p.map_size)),
        samples(Samples<A>::take(memory, p.images * p.samples, p.capacity)) {}

  A *filters;           // [slice][tap][lane]
  A* maps;              // [image][slice], framed
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

// The samples of a part and, if it is the first of its images, their maps.
template <class A, class T>
void read_part(const Slices<A>& p, const Part& part, const T* input, const void* offset, const void* mask,
               const Places<A>& places, const SliceInputs<A>& to) {
  const int64_t maps = part.count() * p.slices, size = p.in_channels * p.pixels;
#pragma omp for nowait
  for (int64_t item = 0; item < part.count() * p.samples; ++item) {
    const Tile tile = part.tile(p, item / p.samples);
    const int64_t sample = item % p.samples;
    read_places(p, tile, offset, mask, sample / p.taps, sample % p.taps, places, to.samples[item].mask);
    place_samples(p, tile.count, places, to.samples[item]);
  }
  if (part.begin == 0) {
    for_each_strip(p, maps, p.width, to.maps, [&](int64_t map, int64_t start, int64_t n, A** pixels) {
      const int64_t slice = map % p.slices, channels = p.channels(slice);
      copy_strip(p, input + (part.first + map / p.slices) * size, p.channel(slice), channels, start, n, pixels);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = channels; c < p.width; ++c) pixels[i][c] = A(0);
    });
#pragma omp for nowait
    for (int64_t map = 0; map < maps; ++map) frame_map(p, p.width, to.maps + map * p.map_size);
  }
#pragma omp barrier
}

// --------------------------------------------------------------------------------- forward

// Rows of outputs of a slice at positions [begin, end).
template <bool modulated>
struct ConvolveSlice {
  template <int vectors, class A>
  __attribute__((noinline)) static void run(const A* map, int64_t padded_row, const Samples<A>* samples, int64_t taps,
                                            int64_t begin, int64_t end, const A* filters, const A* bias, A* to) {
    constexpr int lanes = kLanes<A>;
    constexpr int64_t width = vectors * lanes;
    const int64_t down = padded_row * width;
    for (int64_t i = begin; i < end; ++i, to += width) {
      Vec<A> sums[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[v] = load(bias + v * lanes);
      const A* filter = filters;
      for (const Samples<A>* at = samples; at != samples + taps; ++at, filter += width) {
        const A *top = map + at->pixel[i] * width, *bottom = top + down, *w = at->weights + 4 * i;
        const Vec<A> w0 = w[0] - Vec<A>{}, w1 = w[1] - Vec<A>{}, w2 = w[2] - Vec<A>{}, w3 = w[3] - Vec<A>{};
        const Vec<A> mask = at->mask[i] - Vec<A>{};
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          const A *t = top + v * lanes, *b = bottom + v * lanes;
          const Vec<A> value = load(t) * w0 + load(t + width) * w1 + load(b) * w2 + load(b + width) * w3;
          sums[v] += (modulated ? value * mask : value) * load(filter + v * lanes);
        }
      }
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) store(to + v * lanes, sums[v]);
    }
  }
};

template <class A>
struct DepthwiseForwardPlan : Slices<A> {
  DepthwiseForwardPlan(const Problem& p, const ForwardTensors& tensors) : Slices<A>(p, kSliceVectors), tensors(tensors) {
    this->split(this->slices * this->map_size * int64_t(sizeof(A)), 0);
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
        rows(memory.take<A>(kPartRows * plan.width)) {}

  static int run_team(const Problem& p, const ForwardTensors& tensors) {
    return DEFORMNET_ISA::run_team<Shared, DepthwiseForward>(Plan(p, tensors));
  }

  void run() const {
    pack_filters<A>(plan, static_cast<const T*>(tensors.weight), shared.filters);
    pack_biases();
    for_each_part(plan, [&](const Part& part) {
      read_part<A>(plan, part, static_cast<const T*>(tensors.input), tensors.offset, tensors.mask, places, shared);
      const int64_t strips = ceil_div(part.end - part.begin, kPartRows);
#pragma omp for schedule(static)
      for (int64_t item = 0; item < part.count() * plan.slices * strips; ++item) {
        const int64_t begin = item % strips * kPartRows, end = least(begin + kPartRows, part.end - part.begin);
        convolve(part, item / strips / plan.slices, item / strips % plan.slices, begin, end);
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

  // Positions [begin, end) of a part, in one image and slice.
  void convolve(const Part& part, int64_t image, int64_t slice, int64_t begin, int64_t end) const {
    const A* map = shared.maps + (image * plan.slices + slice) * plan.map_size;
    const Samples<A>* samples = shared.samples + image * plan.samples + plan.group(slice) * plan.taps;
    const A* filters = shared.filters + slice * plan.taps * plan.width;
    const A* bias = shared.biases + slice * plan.width;
    if (tensors.mask)
      with_vectors<ConvolveSlice<true>>(plan.vectors, map, plan.padded_row, samples, plan.taps, begin, end, filters, bias, rows);
    else
      with_vectors<ConvolveSlice<false>>(plan.vectors, map, plan.padded_row, samples, plan.taps, begin, end, filters, bias, rows);
    write_tile(plan, Tile(plan, part.first + image, part.begin + begin, end - begin), rows, plan.width,
               plan.channel(slice), plan.channels(slice), static_cast<T*>(tensors.output));
  }

  const Plan& plan;
  const ForwardTensors& tensors;
  const Shared& shared;
  Places<A> places;
  A* rows;  // [position][lane]
};

// --------------------------------------------------------------------------------- backward

// For all positions of a part, in one image and slice: adds to the sums of the gradient of the map and of the filters,
// and sets the dot products of the samples' gradients with their corners, [tap][corner][position].
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
  DepthwiseBackwardPlan(const Problem& p, const BackwardTensors& tensors) : Slices<A>(p, 4), tensors(tensors) {
    constexpr int64_t number = sizeof(A);
    const auto& s = *this;
    this->split(s.slices * (2 * s.map_size + s.taps * s.width) * number, s.slices * s.taps * 4 * number);
  }

  const BackwardTensors& tensors;
};

template <class A>
struct DepthwiseBackwardShared : SliceInputs<A> {
  DepthwiseBackwardShared(const DepthwiseBackwardPlan<A>& plan, Memory& memory)
      : SliceInputs<A>(plan, memory),
        map_sums(memory.take<A>(plan.images * plan.slices * plan.map_size)),
        filter_sums(memory.take<A>((plan.images + 1) * plan.slices * plan.taps * plan.width)),
        dots(memory.take<A>(plan.images * plan.slices * plan.taps * 4 * plan.capacity)) {}

  void prepare(const DepthwiseBackwardPlan<A>& plan) {
    // The filters' sums over all images lie behind those of the images at hand.
    const int64_t size = plan.slices * plan.taps * plan.width;
    totals = filter_sums + plan.images * size;
    std::memset(totals, 0, size_t(size) * sizeof(A));
  }

  A* map_sums;     // as the maps
  A* filter_sums;  // [image][slice][tap][lane]
  A* totals = nullptr;
  A* dots;         // [image][slice][tap][corner][position]
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
      for (int64_t item = 0; item < part.count() * plan.slices; ++item)
        differentiate(part, item / plan.slices, item % plan.slices);
#pragma omp for schedule(static)
      for (int64_t item = 0; item < part.count() * plan.samples; ++item)
        write_samples(part, item / plan.samples, item % plan.samples);
      if (part.end == plan.positions) write_images(part);
    });
    write_grad_weight();
  }

 private:
  // All but the sums over slices. A slice's sums belong to one thread.
  void differentiate(const Part& part, int64_t image, int64_t slice) const {
    const int64_t item = image * plan.slices + slice, filter_size = plan.taps * plan.width;
    A* map_sums = shared.map_sums + item * plan.map_size;
    A* filter_sums = shared.filter_sums + item * filter_size;
    if (part.begin == 0) {
      std::memset(map_sums, 0, size_t(plan.map_size) * sizeof(A));
      std::memset(filter_sums, 0, size_t(filter_size) * sizeof(A));
    }
    const Tile tile = part.tile(plan, image);
    pack_rows<A>(plan, tile, static_cast<const T*>(tensors.grad_output), plan.channel(slice), plan.channels(slice),
                 plan.width, grad_output);
    const auto call = [&](auto differentiate_slice) {
      with_vectors<decltype(differentiate_slice)>(
          plan.vectors, shared.maps + item * plan.map_size, map_sums, plan.padded_row,
          shared.samples + image * plan.samples + plan.group(slice) * plan.taps, plan.taps, tile.count, plan.capacity,
          shared.filters + slice * filter_size, grad_output, filter_sums,
          shared.dots + item * plan.taps * 4 * plan.capacity);
    };
    if (tensors.mask)
      call(DifferentiateSlice<true>());
    else
      call(DifferentiateSlice<false>());
  }

  // Gradients of offset and mask of one sample at all positions.
  void write_samples(const Part& part, int64_t image, int64_t sample) const {
    if (!tensors.grad_offset && !tensors.grad_mask) return;
    const int64_t g = sample / plan.taps, tap = sample % plan.taps;
    const Tile tile = part.tile(plan, image);
    for (int64_t first = 0; first < tile.count; first += kLanes<A>) {
      Vec<A> dot[4] = {};
      for (int64_t slice = g * plan.of_group; slice < (g + 1) * plan.of_group; ++slice) {
        const A* from = shared.dots + ((image * plan.slices + slice) * plan.taps + tap) * 4 * plan.capacity + first;
        for (int j = 0; j < 4; ++j) dot[j] += load(from + j * plan.capacity);
      }
      write_grads(shared.samples[image * plan.samples + sample], first, least<int64_t>(kLanes<A>, tile.count - first),
                  dot, sample_grads);
    }
    write_sample_grads(plan, tensors, tile, sample, sample_grads);
  }

  // Gradients of the input, and the sums of the filters in the order of the images.
  void write_images(const Part& part) const {
    const int64_t size = plan.slices * plan.taps * plan.width;
#pragma omp for nowait
    for (int64_t i = 0; i < size; ++i)
      for (int64_t image = 0; image < part.count(); ++image) shared.totals[i] += shared.filter_sums[image * size + i];
    if (!tensors.grad_input) return;
    T* grad_input = static_cast<T*>(tensors.grad_input);
    for_each_strip(plan, part.count() * plan.slices, plan.width, shared.map_sums,
                   [&](int64_t map, int64_t start, int64_t n, A** pixels) {
                     const int64_t slice = map % plan.slices, image = part.first + map / plan.slices;
                     write_strip(plan, pixels, plan.channel(slice), plan.channels(slice), start, n,
                                 grad_input + image * plan.in_channels * plan.pixels);
                   });
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

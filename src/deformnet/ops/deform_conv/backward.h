// The backward pass. The positions are processed in two halves side by side, a chunk of each at a time, small enough
// for the caches. First, threads split the chunk's positions: gradient of the columns = grad_output * weight; its dot
// products with the four corners give the gradients of offset and mask, and the columns are sampled again. Then one
// thread per half and run of channels adds up grad_input, in order: with two threads the one that computed the half,
// because memory that another core has written is slow to read. Last, threads split channels and taps of grad_weight.
// So nothing is added atomically, and the bits do not depend on the number of threads.
#pragma once

#include "forward.h"

namespace deformnet::DEFORMNET_ISA {
namespace {

constexpr int64_t kChunkBytes = 1 << 20;  // columns of a chunk
constexpr int64_t kChunkPositions = 384;  // at least: the gradient of the weight is read and written once per chunk

// ----------------------------------------------------------------------------------- layouts

// The layout of the columns and of their gradient: [tap][panel of channels][position][lane], or for columns in pairs
// [...][position / 2][lane][position % 2]. A thread that processes some channels of all positions thus reads contiguous
// memory, and the product with the gradient of the output reads packed panels. A panel has channels of one group, or of
// several whole groups.
template <class A>
struct Panels {
  static constexpr int64_t width = kPanel<A>;

  Panels(const Geometry& p, int64_t channels, int64_t positions)
      : group(p.group_in),
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
  int64_t panel, lane;  // start of their panel among those of a tap, and first lane
};

// All channels in runs of at most `longest`; those of offset group g begin at first[g].
template <class A>
int64_t find_runs(const Geometry& p, const Panels<A>& panels, int64_t longest,
                  ChannelRun* runs, int64_t* first) {
  int64_t count = 0;
  for (int64_t g = 0; g < p.offset_groups; ++g) {
    first[g] = count;
    const int64_t end = (g + 1) * p.offset_group_in;
    for (int64_t channel = g * p.offset_group_in; channel < end; channel += runs[count++].width) {
      int64_t width = least(longest, panels.used - panels.lane(channel));
      if (panels.together == 1) width = least(width, panels.group - channel % panels.group);
      runs[count] = {channel, least(width, end - channel), panels.index(channel) * panels.panel, panels.lane(channel)};
    }
  }
  first[p.offset_groups] = count;
  return count;
}

// Images [first, last) and the two halves of their positions.
struct Images {
  Images(const Geometry& p, int64_t first, int64_t last)
      : first(first), count(last - first), total(count * p.positions), half(ceil_div(total, 2)),
        shared(half % p.positions == 0 ? -1 : half / p.positions) {}

  int64_t first, count, total, half;
  int64_t shared;  // the image that both halves have a part of, or -1
};

// The positions that are processed at a time: a tile of each half. In memory, each half is padded to a multiple of
// kSumStep positions: 1, a pair, or 32 for AMX tiles.
struct Chunk {
  Chunk(const Geometry& p, const Images& images, int64_t begin, int64_t positions, int64_t step)
      : halves{Tile(p, images.first, begin, least(positions, images.half - begin)),
               Tile(p, images.first, images.half + begin,
                    most<int64_t>(0, least(positions, images.total - images.half - begin)))},
        second(round_up(halves[0].count, step)),
        rows(second + round_up(halves[1].count, step)),
        is_first(images.first == 0 && begin == 0) {}

  // Where a half begins among the chunk's positions.
  int64_t row(bool of_second) const { return of_second ? second : 0; }

  Tile halves[2];
  int64_t second, rows;
  bool is_first;
};

// The weight for the gradient of the columns: [group][tap][panel of input channels][output channel][lane]; in pairs
// [...][output channel / 2][lane][output channel % 2]. Output channels are padded to whole panels, as they are in the
// packed grad_output.
template <class E, class T>
void pack_backward(const Geometry& p, const T* weight, E* packed) {
  using A = typename ComputeOf<T>::type;
  constexpr int panel = kPanel<A>;
  const int64_t panels = ceil_div(p.group_in, panel);
  const int64_t outs = round_up(p.group_out, panel), taps = p.taps;
#pragma omp for collapse(2)
  for (int64_t group = 0; group < p.groups; ++group)
    for (int64_t out = 0; out < outs; ++out) {
      const T* from = weight + (group * p.group_out + out) * p.group_in * taps;
      for (int64_t channel = 0; channel < panels * panel; ++channel)
        for (int64_t tap = 0; tap < taps; ++tap) {
          const bool real = out < p.group_out && channel < p.group_in;
          const int64_t at = ((group * taps + tap) * panels + channel / panel) * outs + out;
          put(packed, at, channel % panel, real ? A(read(from[channel * taps + tap])) : A(0));
        }
    }
}

// grad_output of a tile and channels [channel, channel + width), as rows of `panel` numbers, padded with zeros.
template <class Number, class T>
void pack_rows(const Problem& p, const Tile& tile, const T* grad_output, int64_t channel, int64_t width,
               int64_t panel, Number* packed) {
  using A = typename ComputeOf<T>::type;
  const int64_t channels = p.out_channels, positions = p.out_h * p.out_w;
  tile.for_each_run([&](const Run& run) {
    Number* to = packed + run.start * panel;
    if (p.output_channels_last) {
      const T* from = grad_output + (run.image * positions + run.position) * channels + channel;
      for (int64_t i = 0; i < run.length; ++i) convert_row<A>(from + i * channels, width, to + i * panel);
    } else {
      const T* from = grad_output + (run.image * channels + channel) * positions + run.position;
      transpose<A>(from, positions, width, run.length, to, panel);
    }
    for (int64_t i = 0; i < run.length; ++i)
      for (int64_t c = width; c < panel; ++c) to[i * panel + c] = Number{};
  });
}

// grad_output as the left factor of both products: panels [group][panel][position][lane]. Pairs need two copies: this
// one for the sum over lanes, and [...][position / kSumStep][lane][position % kSumStep] for the sum over positions.
template <class E>
struct PackedOutput {
  PackedOutput(Memory& memory, int64_t size)
      : by_lane(memory.take<E>(size / kTogether<E>)),
        by_position(kTogether<E> == 1 ? by_lane : memory.take<E>(size / kTogether<E>)) {}

  E *by_lane, *by_position;
};

// Transposes a panel in steps of kSumStep rows, and pads the last step with zeros.
inline void pair_rows(const BFloat16* rows, int64_t count, Pair* pairs) {
  constexpr int64_t panel = kPanel<Pair>, step = kSumStep<Pair>;
  for (int64_t i = 0; i < round_up(count, step); i += 2) {
    Pair* to = pairs + i / step * panel * (step / 2) + i % step / 2;
    for (int lane = 0; lane < panel; ++lane)
      to[lane * (step / 2)] = {i < count ? rows[i * panel + lane] : BFloat16{},
                               i + 1 < count ? rows[(i + 1) * panel + lane] : BFloat16{}};
  }
}

// Packs grad_output of the positions of a chunk. Called by all threads of a team.
template <class E, class T>
void pack_grad_output(const Geometry& p, const Chunk& chunk, const T* grad_output, const PackedOutput<E>& packed) {
  const int64_t panel = kPanel<E>, group_out = p.group_out, panels = ceil_div(group_out, panel), groups = p.groups;
  constexpr int64_t strip = 256;
  const int64_t strips = ceil_div(chunk.halves[0].count, strip);
#pragma omp for schedule(static)
  for (int64_t item = 0; item < 2 * groups * panels * strips; ++item) {
    const bool second = item >= groups * panels * strips;
    const Tile& half = chunk.halves[second];
    const int64_t group = item / (panels * strips) % groups, which = item / strips % panels;
    const int64_t start = item % strips * strip, n = least(strip, half.count - start);
    if (n <= 0) continue;
    const int64_t at = ((group * panels + which) * chunk.rows + start + chunk.row(second)) * panel;
    const auto pack = [&](auto* rows) {
      pack_rows(p, Tile(p, half.first_image, half.begin + start, n), grad_output, group * group_out + which * panel,
                least(panel, group_out - which * panel), panel, rows);
    };
    if constexpr (kSame<E, Pair>) {
      BFloat16* rows = reinterpret_cast<BFloat16*>(packed.by_lane) + at;
      pack(rows);
      pair_rows(rows, n, packed.by_position + at / 2);
    } else {
      pack(packed.by_lane + at);
    }
  }
}

// --------------------------------------------------------------- gradients of offset and mask

// Gradients of the samples of one tap and offset group, by their coordinates and masks.
template <class A>
struct SampleGrads {
  SampleGrads(Memory& memory, int64_t capacity)
      : y(memory.take<A>(capacity)), x(memory.take<A>(capacity)), mask(memory.take<A>(capacity)) {}

  A *y, *x, *mask;
};

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

// The same for a run of `width` channels: whole vectors into `dots`, the channels left over into `rest`.
// `weights` and `masks` are `w` and `mask` as vectors, which all runs share. If `write`, also writes row `i` of the
// panel of columns, from `lane` on.
template <bool write, class A, class E>
__attribute__((always_inline)) inline void add_run_dots(const A* corner, ptrdiff_t right, ptrdiff_t down,
                                                        int64_t width, const A* grad, const A* w,
                                                        const Vec<A>* weights, A mask, Vec<A> masks, E* to, int64_t i,
                                                        int64_t lane, Vec<A>* dots, A* rest) {
  constexpr int lanes = kLanes<A>;
  if (width == kPanel<A>) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const Vec<A> value = add_dots(corner + v * lanes, right, down, load(grad + v * lanes), weights, dots);
      if (write) append_vector(to, i, lane + v * lanes, value * masks);
    }
    return;
  }
  int64_t c = 0;
  for (; c + lanes <= width; c += lanes) {
    const Vec<A> value = add_dots(corner + c, right, down, load(grad + c), weights, dots);
    if (write) append_vector(to, i, lane + c, value * masks);
  }
  for (; c < width; ++c) {
    const A* v = corner + c;
    rest[0] += grad[c] * v[0];
    rest[1] += grad[c] * v[right];
    rest[2] += grad[c] * v[down];
    rest[3] += grad[c] * v[down + right];
    if (write) append(to, i, lane + c, (v[0] * w[0] + v[right] * w[1] + v[down] * w[2] + v[down + right] * w[3]) * mask);
  }
}

// Gradients of the samples [first, first + count), as many as a vector has lanes, from the dot products.
template <class A>
__attribute__((always_inline)) inline void write_grads(const Samples<A>& at, int64_t first, int64_t count,
                                                       const Vec<A>* dot, const SampleGrads<A>& to) {
  const Vec<A> fy = load(at.fy + first), fx = load(at.fx + first), mask = load(at.mask + first);
  // Not a product with zero: the gradient of the output may be infinite.
  IndexVec<A> sign_y, sign_x;
  std::memcpy(&sign_y, &fy, sizeof fy);
  std::memcpy(&sign_x, &fx, sizeof fx);
  const Vec<A> by_y = sign_y >= 0 ? mask * ((1 - fx) * (dot[2] - dot[0]) + fx * (dot[3] - dot[1])) : Vec<A>{};
  const Vec<A> by_x = sign_x >= 0 ? mask * ((1 - fy) * (dot[1] - dot[0]) + fy * (dot[3] - dot[2])) : Vec<A>{};
  const Vec<A> by_mask = (1 - fy) * ((1 - fx) * dot[0] + fx * dot[1]) + fy * ((1 - fx) * dot[2] + fx * dot[3]);
  std::memcpy(to.y + first, &by_y, size_t(count) * sizeof(A));
  std::memcpy(to.x + first, &by_x, size_t(count) * sizeof(A));
  std::memcpy(to.mask + first, &by_mask, size_t(count) * sizeof(A));
}

// Writes them to the tensors. `sample` is an index into offset groups and taps.
template <class A>
void write_sample_grads(const Geometry& p, const BackwardTensors& tensors, const Tile& tile, int64_t sample,
                        const SampleGrads<A>& grads) {
  tile.for_each_run([&](const Run& run) {
    const int64_t plane = run.image * p.samples + sample;
    const auto write = [&](const A* numbers, void* tensor, int32_t dtype, int64_t at) {
      if (tensor) write_run<A>(numbers + run.start, run.length, tensor, dtype, at * p.positions + run.position);
    };
    write(grads.y, tensors.grad_offset, p.offset_dtype, 2 * plane);
    write(grads.x, tensors.grad_offset, p.offset_dtype, 2 * plane + 1);
    write(grads.mask, tensors.grad_mask, p.mask_dtype, plane);
  });
}

// Samples of one tap and offset group, whose runs of channels are `runs` to `end`: their gradients, from `grads`, the
// gradient of the columns, and the columns if `write`.
template <bool write, class A, class E>
void sample_backward(const Map<A>& map, const Samples<A>& at, const ChannelRun* runs, const ChannelRun* end,
                     int64_t count, const A* grads, E* columns, const SampleGrads<A>& to) {
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
      const Vec<A> masks = at.mask[i] - Vec<A>{};
      Vec<A> dot[4] = {};
      A left_over[4] = {};
      for (const ChannelRun* run = runs; run != end; ++run) {
        add_run_dots<write>(map.at(at.pixel[i], run->channel), right, down, run->width,
                            grads + run->panel + i * kPanel<A> + run->lane, w, weights, at.mask[i], masks,
                            write ? columns + run->panel / kTogether<E> : nullptr, i, run->lane, dot, left_over);
      }
      for (int j = 0; j < 4; ++j) dots[j][k] = dot[j], rest[j][k] = left_over[j];
    }
    for (int64_t k = some; k < lanes; ++k)
      for (int j = 0; j < 4; ++j) dots[j][k] = Vec<A>{};
    Vec<A> dot[4];
    for (int j = 0; j < 4; ++j) dot[j] = sum_each<A>(dots[j]) + load(rest[j]);
    write_grads(at, first, some, dot, to);
  }
}

// ---------------------------------------------------------------------- gradient of the input

// Adds the gradient of a run of `width` channels of a sample to its four corners.
template <class A>
__attribute__((always_inline)) inline void add_to_corners(const A* grad, int64_t width, A w0, A w1, A w2, A w3,
                                                          A* s0, ptrdiff_t right, ptrdiff_t down) {
  A *s1 = s0 + right, *s2 = s0 + down, *s3 = s2 + right;
  int64_t c = 0;
  for (; c + kLanes<A> <= width; c += kLanes<A>) {
    const Vec<A> u = load(grad + c);
    store(s0 + c, load(s0 + c) + u * w0);
    store(s1 + c, load(s1 + c) + u * w1);
    store(s2 + c, load(s2 + c) + u * w2);
    store(s3 + c, load(s3 + c) + u * w3);
  }
  for (; c < width; ++c) {
    s0[c] += grad[c] * w0;
    s1[c] += grad[c] * w1;
    s2[c] += grad[c] * w2;
    s3[c] += grad[c] * w3;
  }
}

// Adds the samples' gradients at position i of a tile to the map, in some runs of channels of one offset group, whose
// samples, a tap each, are `samples`. `grads` is the gradient of the position's columns.
template <class A>
__attribute__((always_inline)) inline void add_position(const Geometry& p,
                                                        const Samples<A>* samples, int64_t i, const A* grads,
                                                        int64_t grads_tap, const ChannelRun* runs,
                                                        const ChannelRun* end, A* sums) {
  const ptrdiff_t right = p.in_channels, down = p.padded_row * p.in_channels;
  for (int64_t tap = 0; tap < p.taps; ++tap) {
    const Samples<A>& s = samples[tap];
    const A* w = s.weights + 4 * i;
    const A w0 = w[0] * s.mask[i], w1 = w[1] * s.mask[i], w2 = w[2] * s.mask[i], w3 = w[3] * s.mask[i];
    A* const pixel = sums + s.pixel[i] * right;
    for (const ChannelRun* run = runs; run != end; ++run)
      add_to_corners(grads + tap * grads_tap + run->panel + run->lane, run->width, w0, w1, w2, w3, pixel + run->channel, right,
                     down);
  }
}

// The same for positions [begin, end) of a half, whose samples are `samples`, tile by tile, and any runs.
template <class A>
void add_to_map(const Geometry& p, const Samples<A>* samples, int64_t tile_rows,
                int64_t begin, int64_t end, const A* grads, const Panels<A>& panels, const ChannelRun* run_begin,
                const ChannelRun* run_end, A* sums) {
  for (int64_t at = begin; at < end; ++at) {
    const Samples<A>* tile = samples + at / tile_rows * p.samples;
    for (const ChannelRun *runs = run_begin, *next; runs != run_end; runs = next) {
      const int64_t g = runs->channel / p.offset_group_in;
      for (next = runs; next != run_end && next->channel < (g + 1) * p.offset_group_in;) ++next;
      add_position(p, tile + g * p.taps, at % tile_rows, grads + at * panels.width, panels.tap, runs,
                   next, sums);
    }
  }
}

// ---------------------------------------------------------------------------- the whole pass

// Sizes. Those that depend on the number of threads do not affect results. E is the type of columns, packed weight and
// packed grad_output.
template <class A, class E>
struct BackwardPlan : Geometry {
  BackwardPlan(const Problem& p, const BackwardTensors& tensors)
      : Geometry(p),
        tensors(tensors),
        image_size(padded_pixels * in_channels),
        chunk_positions(round_up(most<int64_t>(kChunkPositions, kChunkBytes / position_bytes()) / 2, kRowStep<E>)),
        images(most<int64_t>(1, least(least(most<int64_t>(2, 2 * chunk_positions / positions), batch),
                                      kImagesBytes / (image_size * number)))),
        longest(round_up(least(chunk_positions, ceil_div(images * positions, 2)), kSumStep<E>)),
        panels(*this, in_channels, 2 * longest),
        out_panels(ceil_div(group_out, kPanel<A>)),
        outs(out_panels * kPanel<A>),
        slices(ceil_div(threads, 2)) {
    weight_size = groups * taps * panels.of_group * outs * kPanel<A>;
    grad_output_size = 2 * longest * groups * outs;
    const int64_t fitting = kColumnsBytes / (least(column_size(), kBlockDepth) * number);
    const int64_t rows = round_up(most<int64_t>(kRowStep<E>, fitting), kRowStep<E>);
    tile_rows = round_up(ceil_div(longest, round_up(ceil_div(longest, rows), slices)), kRowStep<E>);
    half_tiles = ceil_div(longest, tile_rows);
    capacity = round_up(tile_rows, kLanes<A>);
  }

  const BackwardTensors& tensors;
  int64_t image_size;       // numbers of a framed map
  int64_t chunk_positions;  // of each half
  int64_t images;           // that are processed at a time, in two halves
  int64_t longest;          // positions of a half's chunk, padded to a multiple of kSumStep
  Panels<A> panels;
  int64_t out_panels, outs;  // panels of a group's output channels, and lanes of those
  int64_t slices;            // of the channels, among the threads of a half
  int64_t weight_size, grad_output_size;
  int64_t tile_rows, half_tiles;  // positions of a tile, and tiles of a half's chunk
  int64_t capacity;               // of a tile's arrays

 private:
  static constexpr int64_t number = sizeof(A);
  // Nearly the numbers of a column.
  int64_t column_size() const { return taps * Panels<A>(*this, in_channels, 1).tap; }
  int64_t position_bytes() const {
    Memory samples_of_16;
    Samples<A>(samples_of_16, 16);
    return most(column_size() * number, samples * samples_of_16.used() / 16);
  }
};

template <class A, class E>
struct BackwardShared {
  BackwardShared(const BackwardPlan<A, E>& plan, Memory& memory)
      : weight(memory.take<E>(plan.weight_size / kTogether<E>)),
        grad_output(memory, plan.grad_output_size),
        columns(plan.tensors.grad_weight ? memory.take<E>(plan.taps * plan.panels.tap / kTogether<E>) : nullptr),
        grads(memory.take<A>(plan.taps * plan.panels.tap)),
        weight_sums(memory.take<A>(plan.weight_size)),
        maps(memory.take<A>(plan.images * plan.image_size)),
        map_sums(memory.take<A>((plan.images + 1) * plan.image_size)),
        runs(memory.take<ChannelRun>(plan.in_channels)),
        first_run(memory.take<int64_t>(plan.offset_groups + 1)),
        samples(Samples<A>::take(memory, 2 * plan.half_tiles * plan.samples, plan.capacity)) {}

  void prepare(const BackwardPlan<A, E>& plan) {
    // Threads split the channels of the map by runs: a panel each, or a cache line where those are too few.
    const bool few = plan.in_channels < plan.slices * kPanel<A>;
    run_count = find_runs(plan, plan.panels, few ? kCacheLine / int64_t(sizeof(A)) : kPanel<A>, runs, first_run);
    // Lanes of no channel are multiplied as well.
    if (columns && plan.panels.padded)
      std::memset(columns, 0, size_t(plan.taps * plan.panels.tap) / kTogether<E> * sizeof(E));
  }

  E* weight;  // packed
  PackedOutput<E> grad_output;
  E* columns;  // of a chunk: see `Panels`
  A* grads;    // of the columns
  A* weight_sums;
  A *maps, *map_sums;  // framed; one more of the sums, for the image that both halves share
  ChannelRun* runs;
  int64_t *first_run, run_count = 0;
  Samples<A>* samples;  // [tile][offset group][tap]
};

template <class T, class E = typename ComputeOf<T>::type>
class Backward {
  using A = typename ComputeOf<T>::type;
  using Plan = BackwardPlan<A, E>;
  using Shared = BackwardShared<A, E>;
  static constexpr int64_t together = kTogether<E>;
  static constexpr int64_t panel = kPanel<A>;

 public:
  Backward(const Plan& plan, const Shared& shared, Memory& memory)
      : plan(plan),
        tensors(plan.tensors),
        shared(shared),
        map(plan, shared.maps),
        places(memory, plan.capacity),
        sample_grads(memory, plan.capacity) {}

  static int run_team(const Problem& p, const BackwardTensors& tensors) {
    return DEFORMNET_ISA::run_team<Shared, Backward>(Plan(p, tensors));
  }

  void run() const {
    [[maybe_unused]] const TileUser tiles_in_use{};
    pack_weight();
    for (int64_t first = 0; first < plan.batch; first += plan.images) {
      const Images images(plan, first, least(first + plan.images, plan.batch));
      copy_maps<A>(plan, static_cast<const T*>(tensors.input), first, first + images.count, shared.maps);
      clear_map_sums(images);
      for (int64_t begin = 0; begin < images.half; begin += plan.chunk_positions) {
        const Chunk chunk(plan, images, begin, plan.chunk_positions, kSumStep<E>);
        pack_grad_output(plan, chunk, static_cast<const T*>(tensors.grad_output), shared.grad_output);
        differentiate_samples(chunk);
        add_to_maps(images, chunk);
        add_to_weight(chunk);
      }
      write_grad_input(images);
    }
    write_grad_weight();
  }

 private:
  bool needs_column_grads() const { return tensors.grad_input || tensors.grad_offset || tensors.grad_mask; }

  void pack_weight() const {
    if (needs_column_grads()) pack_backward(plan, static_cast<const T*>(tensors.weight), shared.weight);
  }

  void clear_map_sums(const Images& images) const {
    if (!tensors.grad_input) return;
    const int64_t numbers = (images.count + (images.shared >= 0)) * plan.image_size, stretch = 4096;
#pragma omp for
    for (int64_t begin = 0; begin < numbers; begin += stretch)
      std::memset(shared.map_sums + begin, 0, size_t(least(stretch, numbers - begin)) * sizeof(A));
  }

  // Columns, their gradient, and the gradients of offset and mask. Threads split positions.
  void differentiate_samples(const Chunk& chunk) const {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < 2 * plan.half_tiles; ++item) {
      const bool second = item >= plan.half_tiles;
      const Tile& half = chunk.halves[second];
      const int64_t start = item % plan.half_tiles * plan.tile_rows, row = start + chunk.row(second);
      if (start >= half.count) continue;
      const Tile tile(plan, half.first_image, half.begin + start, least(plan.tile_rows, half.count - start));
      const Samples<A>* samples = shared.samples + item * plan.samples;
      locate<A>(plan, tile, tensors.offset, tensors.mask, places, samples);
      for (int64_t tap = 0; tap < plan.taps; ++tap) {
        E* columns = shared.columns ? shared.columns + (tap * plan.panels.tap + row * panel) / together : nullptr;
        A* grads = shared.grads + tap * plan.panels.tap + row * panel;
        // Otherwise, differentiate_tap computes gradients that nothing reads.
        if (needs_column_grads()) multiply_grads(tile.count, row, chunk.rows, tap, grads);
        for (int64_t g = 0; g < plan.offset_groups; ++g)
          differentiate_tap(tile, g, tap, samples[g * plan.taps + tap], grads, columns);
        if (columns) pad_columns(tile.count, columns);
      }
    }
  }

  // The gradient of a tap's columns. `row`: where the tile begins in the chunk.
  void multiply_grads(int64_t count, int64_t row, int64_t chunk_rows, int64_t tap, A* grads) const {
    for (int64_t group = 0; group < plan.groups; ++group) {
      const int64_t begin = (group * plan.out_panels * chunk_rows + row) * panel;
      const LeftFactor<E, panel / together> left{shared.grad_output.by_lane + begin / together, 1,
                                                 chunk_rows * panel / together, plan.out_panels, panel / together};
      for (int64_t which = 0; which < plan.panels.of_group; ++which) {
        const int64_t at = (group * plan.taps + tap) * plan.panels.of_group + which;
        multiply(count, left, shared.weight + at * plan.outs * panel / together,
                 grads + plan.panels.place(group * plan.panels.group + which * panel), panel,
                 plan.panels.together == 1 ? panel : int(plan.panels.group), false);
      }
    }
  }

  // Gradients of offset and mask of a tap and offset group, and its columns.
  void differentiate_tap(const Tile& tile, int64_t g, int64_t tap, const Samples<A>& samples, const A* grads,
                         E* columns) const {
    const ChannelRun *from = shared.runs + shared.first_run[g], *to = shared.runs + shared.first_run[g + 1];
    if (columns)
      sample_backward<true>(map, samples, from, to, tile.count, grads, columns, sample_grads);
    else
      sample_backward<false>(map, samples, from, to, tile.count, grads, columns, sample_grads);
    write_sample_grads(plan, tensors, tile, g * plan.taps + tap, sample_grads);
  }

  // Pads a tile's columns with zeros to a multiple of kSumStep positions. `append` has filled the last pair.
  void pad_columns(int64_t count, E* columns) const {
    const int64_t begin = ceil_div(count, together) * panel, end = round_up(count, kSumStep<E>) / together * panel;
    for (int64_t at = 0; at < plan.panels.tap; at += plan.panels.panel)
      std::memset(columns + at / together + begin, 0, size_t(end - begin) * sizeof(E));
  }

  // Adds a chunk to the gradient of the map. Threads split halves, channels and images, in this order, since most
  // images have positions in one half only; they do not wait at the end.
  void add_to_maps(const Images& images, const Chunk& chunk) const {
    if (!tensors.grad_input) return;
    const int64_t slices = least(plan.slices, shared.run_count);
#pragma omp for schedule(static) nowait
    for (int64_t item = 0; item < 2 * images.count * slices; ++item) {
      const bool second = item >= images.count * slices;
      const int64_t slice = item / images.count % slices, image = item % images.count;
      const Tile& half = chunk.halves[second];
      const int64_t begin = most<int64_t>(0, image * plan.positions - half.begin);
      const int64_t end = least(half.count, (image + 1) * plan.positions - half.begin);
      // `Samples::pixel` counts through all images. In the second half the shared image has a map behind the last.
      A* sums = shared.map_sums + (second && image == images.shared ? (images.count - image) * plan.image_size : 0);
      add_to_map<A>(plan, shared.samples + (second ? plan.half_tiles * plan.samples : 0), plan.tile_rows, begin, end,
                    shared.grads + chunk.row(second) * panel, plan.panels,
                    shared.runs + slice * shared.run_count / slices,
                    shared.runs + (slice + 1) * shared.run_count / slices, sums);
    }
  }

  // Adds a chunk to the gradient of the weight. Threads split channels and taps.
  void add_to_weight(const Chunk& chunk) const {
    if (!tensors.grad_weight) {
#pragma omp barrier
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t item = 0; item < plan.groups * plan.taps * plan.panels.of_group; ++item)
        multiply_columns(chunk, item);
    }
  }

  // For panel `item` of the input channels, counted through groups and taps.
  void multiply_columns(const Chunk& chunk, int64_t item) const {
    constexpr int64_t depth = kSumStep<E> / together;  // elements of type E in a step
    const int64_t of_group = plan.panels.of_group;
    const int64_t group = item / (plan.taps * of_group), tap = item / of_group % plan.taps;
    const int64_t index = plan.panels.index(group * plan.panels.group + item % of_group * panel);
    const E* columns = shared.columns + (tap * plan.panels.tap + index * plan.panels.panel) / together;
    for (int64_t which = 0; which < plan.out_panels; ++which) {
      const int64_t begin = (group * plan.out_panels + which) * chunk.rows * panel;
      const LeftFactor<E, depth> left{shared.grad_output.by_position + begin / together, panel, panel * depth,
                                      chunk.rows / kSumStep<E>, depth};
      multiply(least<int64_t>(panel, plan.group_out - which * panel), left, columns,
               shared.weight_sums + (item * plan.outs + which * panel) * panel, panel, panel, !chunk.is_first);
    }
  }

  void write_grad_input(const Images& images) const {
    if (!tensors.grad_input) return;
    if (images.shared >= 0) {
      A* sums = shared.map_sums + images.shared * plan.image_size;
      const A* second = shared.map_sums + images.count * plan.image_size;
#pragma omp for
      for (int64_t i = 0; i < plan.image_size; ++i) sums[i] += second[i];
    }
    write_maps(plan, shared.map_sums, images.first, images.first + images.count, static_cast<T*>(tensors.grad_input));
  }

  void write_grad_weight() const {
    if (!tensors.grad_weight) return;
    T* grad_weight = static_cast<T*>(tensors.grad_weight);
    const int64_t taps = plan.taps;
#pragma omp for collapse(2)
    for (int64_t out = 0; out < plan.out_channels; ++out)
      for (int64_t channel = 0; channel < plan.group_in; ++channel) {
        const int64_t group = out / plan.group_out, lane = out % plan.group_out;
        const int64_t in_lane = plan.panels.lane(group * plan.panels.group + channel);
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t block = (group * taps + tap) * plan.panels.of_group + channel / panel;
          write(grad_weight + (out * plan.group_in + channel) * taps + tap,
                shared.weight_sums[(block * plan.outs + lane) * panel + in_lane]);
        }
      }
  }

  const Plan& plan;
  const BackwardTensors& tensors;
  const Shared& shared;
  Map<A> map;
  Places<A> places;
  SampleGrads<A> sample_grads;
};

}  // namespace
}  // namespace deformnet::DEFORMNET_ISA

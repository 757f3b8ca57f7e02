// What `deform_roi_pool` and `deform_ps_roi_pool` take from Python. Order and types of the fields are repeated in
// cpu.py.
#pragma once

#include <cstdint>

namespace deformnet {

// Where a bin has its samples; see docstring of deform_roi_pool.
enum Sampling : int32_t { kBins = 0, kMsra = 1, kAligned = 2 };

// One RoI pooling: R boxes, C channels of the output, G offset groups.
struct RoiProblem {
  int64_t batch, in_h, in_w, boxes, out_channels, out_h, out_w;
  int64_t groups;  // 1 without offsets
  int64_t samples_per_bin;
  double spatial_scale, gamma;
  int32_t dtype;         // of input, output and their gradients
  int32_t boxes_dtype;
  int32_t offset_dtype;  // of offset and its gradient
  int32_t sampling;
  int32_t position_sensitive;
  int32_t input_channels_last;  // input and grad_input; never if position-sensitive
  int32_t threads;
};

// All but input and its gradient are contiguous. `offset` has a cell for every bin of the output.
// A null pointer: not given, or not needed.
struct RoiForwardTensors {
  const void *input, *boxes, *offset;
  void* output;
};

struct RoiBackwardTensors {
  const void *grad_output, *input, *boxes, *offset;
  void *grad_input, *grad_offset;
};

}  // namespace deformnet

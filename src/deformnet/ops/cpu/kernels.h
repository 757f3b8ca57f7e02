// What the Python side and the kernels agree on. Plain C: no header of PyTorch or Python is needed,
// so one build serves every version of both.
#pragma once

#include <cstdint>

namespace deformnet {

enum DType : int32_t { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

// How the map continues outside of itself; see docstring of deform_conv2d.
enum Border : int32_t { kZeros = 0, kMsra2017 = 1 };

// One deformable convolution. Letters as in the docs: N C H W, K taps, G offset groups.
// Field order and types are mirrored by `_Problem` in deform_conv.py.
struct Problem {
  int64_t batch, in_channels, in_h, in_w, out_channels, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, offset_groups;
  int32_t dtype;         // of input, weight, bias, output and their gradients
  int32_t offset_dtype;  // of offset and its gradient
  int32_t mask_dtype;    // of mask and its gradient
  int32_t border;
  int32_t input_channels_last;   // input and grad_input
  int32_t output_channels_last;  // output or grad_output
  int32_t threads;
};

// All but input, output and their gradients are contiguous. A null pointer: not given, or not wanted.
struct ForwardTensors {
  const void *input, *offset, *mask, *weight, *bias;
  void* output;
};

struct BackwardTensors {
  const void *grad_output, *input, *offset, *mask, *weight;
  void *grad_input, *grad_offset, *grad_mask, *grad_weight;
};

// Where a bin has its samples; see docstring of deform_roi_pool.
enum Sampling : int32_t { kBins = 0, kMsra = 1, kAligned = 2 };

// One RoI pooling: R boxes, C channels of the output, G offset groups.
// Field order and types are mirrored by `_Problem` in roi_pool.py.
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
// A null pointer: not given, or not wanted.
struct RoiForwardTensors {
  const void *input, *boxes, *offset;
  void* output;
};

struct RoiBackwardTensors {
  const void *grad_output, *input, *boxes, *offset;
  void *grad_input, *grad_offset;
};

// Return 0, or 1 when the workspace cannot be allocated.
using ForwardFn = int (*)(const Problem&, const ForwardTensors&);
using BackwardFn = int (*)(const Problem&, const BackwardTensors&);
using RoiForwardFn = int (*)(const RoiProblem&, const RoiForwardTensors&);
using RoiBackwardFn = int (*)(const RoiProblem&, const RoiBackwardTensors&);

// Every instruction set compiles the same kernels into a namespace of its own.
namespace baseline {
int forward(const Problem&, const ForwardTensors&);
int backward(const Problem&, const BackwardTensors&);
int roi_forward(const RoiProblem&, const RoiForwardTensors&);
int roi_backward(const RoiProblem&, const RoiBackwardTensors&);
}  // namespace baseline
namespace avx2 {
int forward(const Problem&, const ForwardTensors&);
int backward(const Problem&, const BackwardTensors&);
int roi_forward(const RoiProblem&, const RoiForwardTensors&);
int roi_backward(const RoiProblem&, const RoiBackwardTensors&);
}  // namespace avx2
namespace avx512 {
int forward(const Problem&, const ForwardTensors&);
int backward(const Problem&, const BackwardTensors&);
int roi_forward(const RoiProblem&, const RoiForwardTensors&);
int roi_backward(const RoiProblem&, const RoiBackwardTensors&);
}  // namespace avx512
namespace amx {
int forward(const Problem&, const ForwardTensors&);
}  // namespace amx

}  // namespace deformnet

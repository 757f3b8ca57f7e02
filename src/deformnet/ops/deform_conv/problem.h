// What `deform_conv2d` takes from Python. Plain C: no header of PyTorch or Python is needed, so one build serves
// every version of both. Order and types of the fields are repeated in cpu.py.
#pragma once

#include <cstdint>

namespace deformnet {

// How the map continues outside of itself; see docstring of deform_conv2d.
enum Border : int32_t { kZeros = 0, kMsra2017 = 1 };

// One deformable convolution. Letters as in the docs: N C H W, K taps, G offset groups.
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

// All but input, output and their gradients are contiguous. A null pointer: not given, or not needed.
struct ForwardTensors {
  const void *input, *offset, *mask, *weight, *bias;
  void* output;
};

struct BackwardTensors {
  const void *grad_output, *input, *offset, *mask, *weight;
  void *grad_input, *grad_offset, *grad_mask, *grad_weight;
};

}  // namespace deformnet

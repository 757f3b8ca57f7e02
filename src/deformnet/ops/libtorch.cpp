// The operators for C++ programs: schemas and CPU kernels, registered through LibTorch's stable ABI, so that exported
// programs run without Python. Forward passes only. In Python, registration.py registers the operators instead; a
// process can have only one of the two. Built with CMake's option DEFORMNET_LIBTORCH; see docs/install.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "deform_conv/problem.h"
#include "roi_pool/problem.h"

extern "C" int deformnet_deform_conv2d(const deformnet::Problem*, const deformnet::ForwardTensors*);
extern "C" int deformnet_roi_pool(const deformnet::RoiProblem*, const deformnet::RoiForwardTensors*);

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Pair = std::vector<int64_t>;

// As `MOST` and `MOST_SAMPLES` of the checks in Python.
constexpr int64_t kMost = 2000000000, kMostSamples = 1024;

// The checks in Python are more detailed and ran at export. These keep kernels within their tensors.
void expect(bool right, const char* what) { STD_TORCH_CHECK(right, "deformnet: expected ", what); }

int32_t place(const std::string& name, std::initializer_list<const char*> names, const char* what) {
  int32_t at = 0;
  for (const char* one : names) {
    if (name == one) return at;
    ++at;
  }
  STD_TORCH_CHECK(false, "deformnet: expected ", what, ", but got ", name);
}

// As `DType` of common.h.
int32_t dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return 0;
    case ScalarType::Float: return 1;
    case ScalarType::BFloat16: return 2;
    case ScalarType::Half: return 3;
    default: STD_TORCH_CHECK(false, "deformnet: expected tensors of float64, float32, bfloat16 or float16");
  }
}

bool has_shape(const Tensor& tensor, const Pair& shape) {
  bool equal = tensor.dim() == int64_t(shape.size());
  for (size_t i = 0; equal && i < shape.size(); ++i) equal = tensor.size(int64_t(i)) == shape[i];
  return equal;
}

bool in(const Pair& pair, int64_t least) {
  return pair.size() == 2 && pair[0] >= least && pair[1] >= least && pair[0] <= kMost / 4 && pair[1] <= kMost / 4;
}

// Whether a non-contiguous tensor [N, C, H, W] is contiguous in channels-last order.
bool is_channels_last(const Tensor& tensor) {
  if (tensor.is_contiguous()) return false;
  int64_t stride = 1;
  for (int64_t axis : {1, 3, 2, 0}) {
    if (tensor.size(axis) != 1 && tensor.stride(axis) != stride) return false;
    stride *= tensor.size(axis);
  }
  return true;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

const void* address(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

Tensor deform_conv2d(Tensor input, Tensor offset, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> mask,
                     Pair stride, Pair padding, Pair dilation, std::string border) {
  expect(input.dim() == 4 && weight.dim() == 4 && offset.dim() == 4, "input, offset and weight to have 4 dimensions");
  const int64_t n = input.size(0), channels = input.size(1), height = input.size(2), width = input.size(3);
  const int64_t out = weight.size(0), group = weight.size(1), kh = weight.size(2), kw = weight.size(3);
  expect((height + 4) * (width + 1) <= kMost, "input to have at most 2e9 pixels");
  expect(in(stride, 1) && in(padding, 0) && in(dilation, 1), "stride, padding and dilation to be pairs in range");
  expect(out > 0 && group > 0 && kh > 0 && kw > 0 && channels % group == 0 && channels > 0 &&
             out % (channels / group) == 0,
         "weight to have shape [C_out, C / groups, kh, kw]");
  const int64_t out_h = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) / stride[0] + 1;
  const int64_t out_w = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) / stride[1] + 1;
  const int64_t taps = kh * kw, offset_groups = offset.size(1) / (2 * taps);
  expect(out_h > 0 && out_w > 0 && offset_groups > 0 && channels % offset_groups == 0 &&
             has_shape(offset, {n, 2 * taps * offset_groups, out_h, out_w}),
         "offset to have shape [N, 2 * G * kh * kw, Ho, Wo]");
  expect(!bias || has_shape(*bias, {out}), "bias to have shape [C_out]");
  expect(!mask || has_shape(*mask, {n, taps * offset_groups, out_h, out_w}),
         "mask to have shape [N, G * kh * kw, Ho, Wo]");
  expect(dtype(weight) == dtype(input) && (!bias || dtype(*bias) == dtype(input)),
         "input, weight and bias to have the same dtype");

  const bool channels_last = is_channels_last(input);
  const Pair shape{n, out, out_h, out_w};
  Tensor output = torch::stable::empty(shape, input.scalar_type(), std::nullopt, input.device(), std::nullopt,
                                       channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (output.numel() == 0) return output;
  if (!channels_last) input = torch::stable::contiguous(input);
  offset = torch::stable::contiguous(offset);
  weight = torch::stable::contiguous(weight);
  bias = contiguous(bias);
  mask = contiguous(mask);
  const int32_t threads = int32_t(torch::stable::get_num_threads());
  const deformnet::Problem problem{
      n, channels, height, width, out, out_h, out_w, kh, kw, stride[0], stride[1], padding[0], padding[1], dilation[0],
      dilation[1], channels / group, offset_groups, dtype(input), dtype(offset), dtype(mask ? *mask : offset),
      place(border, {"zeros", "msra2017"}, "border to be zeros or msra2017"), channels_last, channels_last, threads};
  const deformnet::ForwardTensors tensors{input.const_data_ptr(),  offset.const_data_ptr(), address(mask),
                                          weight.const_data_ptr(), address(bias),           output.mutable_data_ptr()};
  expect(deformnet_deform_conv2d(&problem, &tensors) == 0, "enough memory for the workspace of deform_conv2d");
  return output;
}

Tensor roi_pool(Tensor input, Tensor boxes, std::optional<Tensor> offset, Pair output_size, double spatial_scale,
                double gamma, std::string sampling, int64_t samples_per_bin, bool position_sensitive) {
  expect(input.dim() == 4, "input to have 4 dimensions");
  expect(boxes.dim() == 2 && boxes.size(1) == 5, "boxes to have shape [R, 5]");
  expect(in(output_size, 1) && output_size[0] * output_size[1] <= kMost, "output_size to be a pair in range");
  const int64_t ph = output_size[0], pw = output_size[1], r = boxes.size(0);
  expect(!position_sensitive || input.size(1) % (ph * pw) == 0, "input to have channels for each bin");
  const int64_t channels = position_sensitive ? input.size(1) / (ph * pw) : input.size(1);
  const int64_t groups = offset && offset->dim() == 4 ? offset->size(1) / 2 : 1;
  expect(groups > 0 && channels % groups == 0 && (!offset || has_shape(*offset, {r, 2 * groups, ph, pw})),
         "offset to have shape [R, 2 * G, ph, pw]");
  const int32_t rule = place(sampling, {"bins", "msra", "aligned"}, "sampling to be bins, msra or aligned");
  expect(samples_per_bin <= kMostSamples && samples_per_bin >= (sampling == "aligned" ? 0 : 1),
         "samples_per_bin to be in range");
  expect(input.size(2) <= kMost / 2 && input.size(3) <= kMost / 2, "input to have at most 1e9 rows and columns");

  Tensor output = torch::stable::empty(Pair{r, channels, ph, pw}, input.scalar_type(), std::nullopt, input.device());
  if (output.numel() == 0) return output;
  const bool channels_last = !position_sensitive && is_channels_last(input);
  if (!channels_last) input = torch::stable::contiguous(input);
  boxes = torch::stable::contiguous(boxes);
  offset = contiguous(offset);
  const int32_t threads = int32_t(torch::stable::get_num_threads());
  const deformnet::RoiProblem problem{
      input.size(0), input.size(2), input.size(3), r, channels, ph, pw, groups, samples_per_bin, spatial_scale, gamma,
      dtype(input), dtype(boxes), dtype(offset ? *offset : input), rule, position_sensitive, channels_last, threads};
  const deformnet::RoiForwardTensors tensors{input.const_data_ptr(), boxes.const_data_ptr(), address(offset),
                                             output.mutable_data_ptr()};
  expect(deformnet_roi_pool(&problem, &tensors) == 0, "enough memory for the workspace of roi_pool");
  return output;
}

}  // namespace

// As in operator.py of each operator.
STABLE_TORCH_LIBRARY(deformnet, library) {
  library.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, int[2] stride, "
      "int[2] padding, int[2] dilation, str border) -> Tensor");
  library.def(
      "roi_pool(Tensor input, Tensor boxes, Tensor? offset, int[2] output_size, float spatial_scale, float gamma, "
      "str sampling, int samples_per_bin, bool position_sensitive) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(deformnet, CPU, library) {
  library.impl("deform_conv2d", TORCH_BOX(&deform_conv2d));
  library.impl("roi_pool", TORCH_BOX(&roi_pool));
}

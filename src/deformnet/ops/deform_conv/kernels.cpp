// Deformable convolution, forward and backward. Compiled once per instruction set.
#include "backward.h"
#include "depthwise.h"
#include "dispatch.h"
#include "forward.h"

#if defined(__AVX512BF16__)
// Only kernels that multiply bfloat16 are compiled again.
namespace deformnet::avx512 {
int deform_conv2d(const Problem& p, const ForwardTensors& tensors);
int deform_conv2d_backward(const Problem& p, const BackwardTensors& tensors);
}
#endif

namespace deformnet::DEFORMNET_ISA {

#if defined(__AVX512BF16__)
int deform_conv2d(const Problem& p, const ForwardTensors& tensors) {
  if (p.dtype == kBFloat16 && p.in_channels / p.groups % kSumStep<Pair> == 0)
    return Forward<BFloat16, Pair>::run_team(p, tensors);
  return avx512::deform_conv2d(p, tensors);
}

int deform_conv2d_backward(const Problem& p, const BackwardTensors& tensors) {
  if (p.dtype == kBFloat16 && p.in_channels / p.groups % kSumStep<Pair> == 0)
    return Backward<BFloat16, Pair>::run_team(p, tensors);
  return avx512::deform_conv2d_backward(p, tensors);
}
#else
int deform_conv2d(const Problem& p, const ForwardTensors& tensors) {
  return with_type(p.dtype, [&](auto type) {
    return is_depthwise(p) ? DepthwiseForward<decltype(type)>::run_team(p, tensors)
                           : Forward<decltype(type)>::run_team(p, tensors);
  });
}

int deform_conv2d_backward(const Problem& p, const BackwardTensors& tensors) {
  return with_type(p.dtype, [&](auto type) {
    return is_depthwise(p) ? DepthwiseBackward<decltype(type)>::run_team(p, tensors)
                           : Backward<decltype(type)>::run_team(p, tensors);
  });
}
#endif

}  // namespace deformnet::DEFORMNET_ISA

#ifdef DEFORMNET_EXPORTS
DEFORMNET_EXPORT_KERNEL(deform_conv2d, Problem, ForwardTensors, amx, avx512_bf16)
DEFORMNET_EXPORT_KERNEL(deform_conv2d_backward, Problem, BackwardTensors, amx, avx512_bf16)
#endif

// Deformable RoI pooling, plain and position-sensitive, forward and backward. Compiled once per instruction set.
//
// The samples of a bin lie on a grid, and bilinear weights are products. So a bin is a sum over the pixels of a few
// rows and columns of the map, with a weight for each row and one for each column, and every pixel is read once,
// however many samples lie beside it.
//
// Each sum of a gradient is made by one thread, in the order of the boxes: nothing is added atomically, and the bits do
// not depend on the number of threads.
//
// This file is compiled without contraction of products and sums: positions are those of the reference to the last bit,
// so that what lies inside the map and in which cell is the same.
#include "cells.h"
#include "dispatch.h"
#include "plain.h"
#include "sensitive.h"

namespace deformnet::DEFORMNET_ISA {

int roi_pool(const RoiProblem& p, const RoiForwardTensors& tensors) {
  return with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (!p.position_sensitive) return PlainForward<T>::run_team(p, tensors);
    return for_each_class<typename ComputeOf<T>::type>(p) ? CellsForward<T>::run_team(p, tensors) : SensitiveForward<T>::run_team(p, tensors);
  });
}

int roi_pool_backward(const RoiProblem& p, const RoiBackwardTensors& tensors) {
  return with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (!p.position_sensitive) return PlainBackward<T>::run_team(p, tensors);
    return for_each_class<typename ComputeOf<T>::type>(p) ? CellsBackward<T>::run_team(p, tensors) : SensitiveBackward<T>::run_team(p, tensors);
  });
}

}  // namespace deformnet::DEFORMNET_ISA

#ifdef DEFORMNET_EXPORTS
DEFORMNET_EXPORT_KERNEL(roi_pool, RoiProblem, RoiForwardTensors, avx512, avx512)
DEFORMNET_EXPORT_KERNEL(roi_pool_backward, RoiProblem, RoiBackwardTensors, avx512, avx512)
#endif

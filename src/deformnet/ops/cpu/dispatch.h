// Exports an operator's kernels, each in the instruction set in use. A kernel takes the operator's problem and its
// tensors, as structs that Python fills in, and returns 0, or 1 when there is not enough memory.
#pragma once

namespace deformnet {
extern int instruction_set;  // the number of the one in use, in the order below
}

// Not every kernel has versions with bfloat16 products: `on_amx` and `on_bf16` name the instruction sets whose versions
// run on processors with AMX tiles and with AVX512-BF16.
#ifdef DEFORMNET_X86
#define DEFORMNET_KERNELS(name, on_amx, on_bf16)                                                    \
  deformnet::on_amx::name, deformnet::on_bf16::name, deformnet::avx512::name, deformnet::avx2::name, \
      deformnet::baseline::name
#else
#define DEFORMNET_KERNELS(name, on_amx, on_bf16) deformnet::baseline::name
#endif

#define DEFORMNET_EXPORT extern "C" __attribute__((visibility("default")))

#define DEFORMNET_EXPORT_KERNEL(name, Problem, Tensors, on_amx, on_bf16)                                   \
  namespace deformnet {                                                                                    \
  namespace on_amx { int name(const Problem&, const Tensors&); }                                           \
  namespace on_bf16 { int name(const Problem&, const Tensors&); }                                          \
  namespace avx512 { int name(const Problem&, const Tensors&); }                                           \
  namespace avx2 { int name(const Problem&, const Tensors&); }                                             \
  namespace baseline { int name(const Problem&, const Tensors&); }                                         \
  DEFORMNET_EXPORT int deformnet_##name(const Problem* problem, const Tensors* tensors) {                  \
    static constexpr int (*kernels[])(const Problem&, const Tensors&) = {                                  \
        DEFORMNET_KERNELS(name, on_amx, on_bf16)};                                                         \
    return kernels[instruction_set](*problem, *tensors);                                                   \
  }                                                                                                        \
  }  /* namespace deformnet */

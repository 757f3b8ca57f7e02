// The C interface of the library, and the choice of instruction set.
#include <cstring>

#ifdef DEFORMNET_HAS_AVX512
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "kernels.h"

using namespace deformnet;

namespace {

struct Implementation {
  const char* name;
  bool (*runs_here)();
  ForwardFn forward;
  BackwardFn backward;
  RoiForwardFn roi_forward;
  RoiBackwardFn roi_backward;
};

#ifdef DEFORMNET_HAS_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Whether there are tiles of bfloat16, and the system lets this process use them.
bool has_amx() {
#ifdef __linux__
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, avx512_bf16 = 1u << 5;
  if (!(d & bf16) || !(d & tile)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & avx512_bf16)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

// Best first.
const Implementation kImplementations[] = {
#ifdef DEFORMNET_HAS_AVX512
    {"amx", [] { return has_avx512() && has_amx(); }, amx::forward, avx512::backward, avx512::roi_forward,
     avx512::roi_backward},
    {"avx512", has_avx512, avx512::forward, avx512::backward, avx512::roi_forward, avx512::roi_backward},
#endif
#ifdef DEFORMNET_HAS_AVX2
    // Every processor with AVX2 and FMA has F16C.
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     avx2::forward, avx2::backward, avx2::roi_forward, avx2::roi_backward},
#endif
    {"baseline", [] { return true; }, baseline::forward, baseline::backward, baseline::roi_forward,
     baseline::roi_backward},
};

const Implementation* best() {
  for (const auto& implementation : kImplementations)
    if (implementation.runs_here()) return &implementation;
  return nullptr;
}

const Implementation* chosen = best();

}  // namespace

#define DEFORMNET_EXPORT extern "C" __attribute__((visibility("default")))

DEFORMNET_EXPORT const char* deformnet_instruction_set() { return chosen->name; }

// Returns 0, or 1 when this build or this machine has no such instruction set.
DEFORMNET_EXPORT int deformnet_select_instruction_set(const char* name) {
  for (const auto& implementation : kImplementations)
    if (std::strcmp(implementation.name, name) == 0 && implementation.runs_here()) {
      chosen = &implementation;
      return 0;
    }
  return 1;
}

DEFORMNET_EXPORT int deformnet_deform_conv2d(const Problem* problem, const ForwardTensors* tensors) {
  return chosen->forward(*problem, *tensors);
}

DEFORMNET_EXPORT int deformnet_deform_conv2d_backward(const Problem* problem,
                                                      const BackwardTensors* tensors) {
  return chosen->backward(*problem, *tensors);
}

DEFORMNET_EXPORT int deformnet_roi_pool(const RoiProblem* problem, const RoiForwardTensors* tensors) {
  return chosen->roi_forward(*problem, *tensors);
}

DEFORMNET_EXPORT int deformnet_roi_pool_backward(const RoiProblem* problem,
                                                 const RoiBackwardTensors* tensors) {
  return chosen->roi_backward(*problem, *tensors);
}

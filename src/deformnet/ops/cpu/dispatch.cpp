// The choice of instruction set.
#include "dispatch.h"

#include <cstring>

#if defined(DEFORMNET_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef DEFORMNET_X86
// Every processor with AVX2 and FMA has F16C.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Whether the processor has AMX tiles of bfloat16, and the system lets this process use them. Emulated tiles need only
// AVX512-BF16.
bool has_amx() {
#if defined(DEFORMNET_EMULATE_TILES)
  return has_avx512_bf16();
#elif defined(__linux__)
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if (!(d & bf16) || !(d & tile)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
};

// Best first, in the order of DEFORMNET_KERNELS.
constexpr InstructionSet kSets[] = {
#ifdef DEFORMNET_X86
    {"amx", has_amx},
    {"avx512_bf16", has_avx512_bf16},
    {"avx512", has_avx512},
    {"avx2", has_avx2},
#endif
    {"baseline", [] { return true; }},
};

int best() {
  int set = 0;
  while (!kSets[set].runs_here()) ++set;
  return set;
}

}  // namespace

#ifdef __clang__
// Since version 19, Clang calls this after a loop. It is empty in LLVM's runtime; PyTorch's may be older and lack it.
extern "C" void __kmpc_dispatch_deinit(void*, int) {}
#endif

int deformnet::instruction_set = best();

DEFORMNET_EXPORT const char* deformnet_instruction_set() { return kSets[deformnet::instruction_set].name; }

// Returns 0, or 1 when this build or this machine has no such instruction set.
DEFORMNET_EXPORT int deformnet_select_instruction_set(const char* name) {
  for (const InstructionSet& set : kSets)
    if (std::strcmp(set.name, name) == 0 && set.runs_here()) {
      deformnet::instruction_set = int(&set - kSets);
      return 0;
    }
  return 1;
}

// Windows: a stub of PyTorch's OpenMP runtime for the linker. Only its import library is used; the stub itself is never
// installed.
#define FUNCTION(name) \
  extern "C" __declspec(dllexport) void name() {}

FUNCTION(omp_get_thread_num)
FUNCTION(omp_in_parallel)
FUNCTION(__kmpc_barrier)
FUNCTION(__kmpc_dispatch_init_8)
FUNCTION(__kmpc_dispatch_init_8u)
FUNCTION(__kmpc_dispatch_next_8)
FUNCTION(__kmpc_dispatch_next_8u)
FUNCTION(__kmpc_for_static_fini)
FUNCTION(__kmpc_for_static_init_8)
FUNCTION(__kmpc_for_static_init_8u)
FUNCTION(__kmpc_fork_call)
FUNCTION(__kmpc_global_thread_num)
FUNCTION(__kmpc_push_num_threads)

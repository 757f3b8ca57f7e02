// When preloaded into a process, makes one selected system call on a file in a folder fail.
//
// It sits between the process and the C library, so that it sees the writers of C libraries as well as
// Python's. Nothing happens until `faults_arm`; counters and the choice are those of each forked child.

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>

namespace {

// In the order of `harness.KINDS` and `harness.MODES`.
enum Kind { CREATE, WRITE, SYNC, RENAME, MKDIR, OPEN, READ, ALLOCATE, KINDS };
enum Mode { COUNT, ONCE, FULL, SHORT, KILL };
enum Fate { PASS, FAIL, HALF };

bool armed = false;
char folder[4096], place[4096];
int chosen_kind, mode, error_number;
long chosen_call;
size_t large;  // minimum size of an allocation that counts
std::atomic<long> calls[KINDS];
std::atomic<bool> fired{false};

bool below(const char* path) {
  const size_t length = strlen(folder);
  return path && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

Fate fate(Kind kind, const char* path) {
  if (!armed || (kind != ALLOCATE && !below(path))) return PASS;
  const long call = ++calls[kind];
  if (mode == FULL && fired && (kind == CREATE || kind == WRITE || kind == MKDIR)) {
    errno = error_number;
    return FAIL;
  }
  if (mode == COUNT || kind != chosen_kind || call != chosen_call) return PASS;
  if (mode == KILL) raise(SIGKILL);
  fired = true;
  snprintf(place, sizeof place, "%s", path);
  if (mode == SHORT || (mode == FULL && kind == WRITE)) return HALF;
  errno = error_number;
  return FAIL;
}

Fate fate(Kind kind, int file) {
  if (!armed) return PASS;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  path[length < 0 ? 0 : length] = 0;
  return fate(kind, path);
}

size_t half(size_t count) { return count > 1 ? count / 2 : count; }

template <typename Function>
Function* next(const char* name, Function*) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

#define NEXT(name) static auto* const real = next(#name, &name)

extern "C" {

void faults_arm(const char* below_folder, int kind, long call, int how, int number, size_t bytes) {
  snprintf(folder, sizeof folder, "%s", below_folder);
  chosen_kind = kind, chosen_call = call, mode = how, error_number = number, large = bytes;
  for (auto& count : calls) count = 0;
  fired = false, place[0] = 0, armed = true;
}
void faults_disarm() { armed = false; }
long faults_calls(int kind) { return calls[kind]; }
const char* faults_place() { return fired ? place : nullptr; }

#define OPENER(name, at_declared, at_passed)                                        \
  int name(at_declared const char* path, int flags, ...) {                          \
    NEXT(name);                                                                     \
    va_list more;                                                                   \
    va_start(more, flags);                                                          \
    const mode_t permissions = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; \
    va_end(more);                                                                   \
    const bool writes = flags & (O_CREAT | O_WRONLY | O_RDWR);                      \
    if (fate(writes ? CREATE : OPEN, path) == FAIL) return -1;                      \
    return real(at_passed path, flags, permissions);                                \
  }
#define COMMA ,
OPENER(open, , )
OPENER(open64, , )
OPENER(openat, int at COMMA, at COMMA)
OPENER(openat64, int at COMMA, at COMMA)

DIR* opendir(const char* path) {
  NEXT(opendir);
  return fate(OPEN, path) == FAIL ? nullptr : real(path);
}

#define PLAIN(result, name, kind, declared, watched, passed) \
  result name declared {                                     \
    NEXT(name);                                              \
    return fate(kind, watched) == FAIL ? -1 : real passed;   \
  }
PLAIN(int, fsync, SYNC, (int file), file, (file))
PLAIN(int, fdatasync, SYNC, (int file), file, (file))
PLAIN(int, mkdir, MKDIR, (const char* path, mode_t bits), path, (path, bits))
PLAIN(int, mkdirat, MKDIR, (int at, const char* path, mode_t bits), path, (at, path, bits))
PLAIN(int, ftruncate64, WRITE, (int file, off64_t size), file, (file, size))

#define RENAMER(name, declared, passed)                                            \
  int name declared {                                                              \
    NEXT(name);                                                                    \
    return fate(RENAME, below(target) ? target : source) == FAIL ? -1 : real passed; \
  }
RENAMER(rename, (const char* source, const char* target) noexcept, (source, target))
RENAMER(link, (const char* source, const char* target) noexcept, (source, target))
RENAMER(renameat, (int from, const char* source, int to, const char* target) noexcept,
        (from, source, to, target))

// `bytes` is the size of the transfer that `short` halves.
#define TRANSFER(name, kind, file, bytes, declared, passed) \
  ssize_t name declared {                                   \
    NEXT(name);                                             \
    switch (fate(kind, file)) {                             \
      case FAIL: return -1;                                 \
      case HALF: bytes = half(bytes); break;                \
      case PASS: break;                                     \
    }                                                       \
    return real passed;                                     \
  }
TRANSFER(write, WRITE, file, size, (int file, const void* data, size_t size), (file, data, size))
TRANSFER(pwrite64, WRITE, file, size, (int file, const void* data, size_t size, off64_t start),
         (file, data, size, start))
TRANSFER(writev, WRITE, file, parts, (int file, const iovec* data, int parts), (file, data, parts))
TRANSFER(sendfile64, WRITE, out, size, (int out, int in, off64_t* start, size_t size) noexcept,
         (out, in, start, size))
TRANSFER(sendfile, WRITE, out, size, (int out, int in, off_t* start, size_t size) noexcept,
         (out, in, start, size))
TRANSFER(copy_file_range, WRITE, out, size,
         (int in, off64_t* from, int out, off64_t* to, size_t size, unsigned flags),
         (in, from, out, to, size, flags))
TRANSFER(read, READ, file, size, (int file, void* data, size_t size), (file, data, size))
TRANSFER(pread64, READ, file, size, (int file, void* data, size_t size, off64_t start),
         (file, data, size, start))
TRANSFER(readv, READ, file, parts, (int file, const iovec* data, int parts), (file, data, parts))

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

static bool refused(size_t size) {
  return armed && size >= large && fate(ALLOCATE, "memory") == FAIL;
}
void* malloc(size_t size) noexcept { return refused(size) ? nullptr : __libc_malloc(size); }
void* calloc(size_t count, size_t size) noexcept {
  return refused(count * size) ? nullptr : __libc_calloc(count, size);
}
void* realloc(void* old, size_t size) noexcept {
  return refused(size) ? nullptr : __libc_realloc(old, size);
}
int posix_memalign(void** result, size_t alignment, size_t size) noexcept {
  if (refused(size)) return ENOMEM;
  *result = __libc_memalign(alignment, size);
  return *result ? 0 : ENOMEM;
}

}  // extern "C"

/* Counts what a process does to the files of one folder, and makes the N-th of it fatal or fail.

   Preloaded into a run (LD_PRELOAD), so that it sees the libraries' own C, C++ and Rust code as well as Python's.
   CHAOS_FOLDER  operations on paths that begin with it are counted, from 1; reading is not
   CHAOS_RANK    only in a process whose command line holds sft_recipes.training.main and whose RANK is this (one alone: none)
   CHAOS_LOG     a file to write "number call path" to, before each operation
   CHAOS_KILL_AT SIGKILL to itself just before this operation
   CHAOS_FAIL_IN every operation on a path that holds this text fails with CHAOS_ERRNO
   CHAOS_STAIRS  the j-th operation on checkpoint-N fails where N is 2j + 1: a list of errno, taken in turn */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long counted;

static long number_of(const char *name) {
    const char *text = getenv(name);
    return text ? strtol(text, NULL, 10) : 0;
}

/* The absolute path that (folder descriptor, path) or a descriptor alone means. */
static void absolute(char *into, int at, const char *path) {
    char link[64];
    ssize_t length = 0;
    into[0] = 0;
    if (path && path[0] == '/') {
        snprintf(into, PATH_MAX, "%s", path);
        return;
    }
    if (at == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    length = readlink(link, into, PATH_MAX - 1);
    into[length > 0 ? length : 0] = 0;
    if (path && length > 0)
        snprintf(into + length, PATH_MAX - (size_t)length, "/%s", path);
}

static int is_meant(void) {
    static int meant = -1;
    if (meant >= 0)
        return meant;
    const char *rank = getenv("CHAOS_RANK"), *mine = getenv("RANK");
    char command[4096] = {0};
    int file = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/cmdline", O_RDONLY);
    ssize_t length = file < 0 ? 0 : syscall(SYS_read, file, command, sizeof command - 1);
    if (file >= 0)
        syscall(SYS_close, file);
    for (ssize_t i = 0; i < length; i++)
        if (!command[i])
            command[i] = ' ';
    int rank_is = rank && !strcmp(rank, mine ? mine : "none");
    /* the launcher's command line contains the program too, after its own name */
    return meant = rank_is && strstr(command, "sft_recipes.training.main") && !strstr(command, "training.rank_launcher");
}

/* The errno with which this step of the stairs fails; 0 where it does not. */
static int stair(const char *path) {
    static long folder, within;
    const char *list = getenv("CHAOS_STAIRS"), *named = strstr(path, "checkpoint-");
    if (!list || !named)
        return 0;
    long number = strtol(named + strlen("checkpoint-"), NULL, 10);
    if (number != folder) {
        folder = number;
        within = 0;
    }
    if (number % 2 == 0 || ++within != (number - 1) / 2)
        return 0;
    long which = within;
    int errors[8], many = 0;
    for (const char *at = list; many < 8 && at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        errors[many++] = atoi(at);
    return errors[which % many];
}

/* 0, or the errno with which this operation fails. */
static int reached(const char *call, int at, const char *path) {
    char full[2 * PATH_MAX], line[3 * PATH_MAX];
    const char *folder = getenv("CHAOS_FOLDER"), *log = getenv("CHAOS_LOG");
    if (!folder || !is_meant())
        return 0;
    absolute(full, at, path);
    if (strncmp(full, folder, strlen(folder)))
        return 0;
    /* where a rank stands, and what it was doing: read by the parent alone, and gone with the start */
    if (!strncmp(full + strlen(folder), ".ranks", 6) || !strncmp(full + strlen(folder), "stack_traces", 12))
        return 0;
    long n = atomic_fetch_add(&counted, 1) + 1;
    const char *fail_in = getenv("CHAOS_FAIL_IN");
    int failed = fail_in && strstr(full + strlen(folder), fail_in) ? (int)number_of("CHAOS_ERRNO")
                                                                   : stair(full + strlen(folder));
    if (log) {
        int file = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT, 0644);
        int length = snprintf(line, sizeof line, "%ld %s %s %d\n", n, call, full + strlen(folder), failed);
        if (file >= 0) {
            syscall(SYS_write, file, line, length);
            syscall(SYS_close, file);
        }
    }
    if (n == number_of("CHAOS_KILL_AT"))
        syscall(SYS_kill, getpid(), SIGKILL);
    return failed;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAILS(call, at, path)                                                                                          \
    do {                                                                                                               \
        int failed = reached(call, at, path);                                                                          \
        if (failed) {                                                                                                  \
            errno = failed;                                                                                            \
            return -1;                                                                                                 \
        }                                                                                                              \
    } while (0)
#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & O_CREAT))

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = (mode_t)va_arg(more, int);                                                                       \
        va_end(more);                                                                                                  \
        if (WRITES(flags))                                                                                             \
            FAILS("open", AT_FDCWD, path);                                                                             \
        return NEXT(name)(path, flags, mode);                                                                          \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                   \
    int name(int at, const char *path, int flags, ...) {                                                               \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = (mode_t)va_arg(more, int);                                                                       \
        va_end(more);                                                                                                  \
        if (WRITES(flags))                                                                                             \
            FAILS("open", at, path);                                                                                   \
        return NEXT(name)(at, path, flags, mode);                                                                      \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                                                    \
    FILE *name(const char *path, const char *mode) {                                                                   \
        int failed = mode[0] == 'r' && !strchr(mode, '+') ? 0 : reached("open", AT_FDCWD, path);                       \
        if (failed) {                                                                                                  \
            errno = failed;                                                                                            \
            return NULL;                                                                                               \
        }                                                                                                              \
        return NEXT(name)(path, mode);                                                                                 \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int file, const void *from, size_t length) {
    FAILS("write", file, NULL);
    return NEXT(write)(file, from, length);
}
ssize_t writev(int file, const struct iovec *from, int parts) {
    FAILS("write", file, NULL);
    return NEXT(writev)(file, from, parts);
}
ssize_t pwrite64(int file, const void *from, size_t length, off64_t offset) {
    FAILS("write", file, NULL);
    return NEXT(pwrite64)(file, from, length, offset);
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t length) {
    FAILS("write", to, NULL);
    static ssize_t (*next)(int, int, off64_t *, size_t);
    if (!next)
        *(void **)&next = dlsym(RTLD_NEXT, "sendfile64");
    return next(to, from, offset, length);
}
ssize_t copy_file_range(int from, off64_t *offset, int to, off64_t *at, size_t length, unsigned flags) {
    FAILS("write", to, NULL);
    return NEXT(copy_file_range)(from, offset, to, at, length, flags);
}
int ftruncate64(int file, off64_t length) {
    FAILS("truncate", file, NULL);
    return NEXT(ftruncate64)(file, length);
}
int fsync(int file) {
    FAILS("fsync", file, NULL);
    return NEXT(fsync)(file);
}
int fdatasync(int file) {
    FAILS("fsync", file, NULL);
    return NEXT(fdatasync)(file);
}
int rename(const char *from, const char *to) {
    FAILS("rename", AT_FDCWD, from);
    return NEXT(rename)(from, to);
}
int renameat(int at, const char *from, int to_at, const char *to) {
    FAILS("rename", at, from);
    return NEXT(renameat)(at, from, to_at, to);
}
int unlink(const char *path) {
    FAILS("unlink", AT_FDCWD, path);
    return NEXT(unlink)(path);
}
int unlinkat(int at, const char *path, int flags) {
    FAILS("unlink", at, path);
    return NEXT(unlinkat)(at, path, flags);
}
int rmdir(const char *path) {
    FAILS("rmdir", AT_FDCWD, path);
    return NEXT(rmdir)(path);
}
int mkdir(const char *path, mode_t mode) {
    FAILS("mkdir", AT_FDCWD, path);
    return NEXT(mkdir)(path, mode);
}

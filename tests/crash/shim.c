// Preloaded into a process under test: counts its file operations below one folder, writes them to a trace, and makes one of
// them fail. Armed by crash_arm(); without it every call passes through.
//
// A record of the trace is a line `name id flags position length path other\n` (paths hold no blank), then `length`
// bytes of data. `id` numbers the openings of files, so that a write is known by its opening and not by a name.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, KILL, TORN, EIO_ONCE, FULL, READ_ONLY };  // what happens at operation `fault_at`; the last two stay

#define FILES 4096
static char root[PATH_MAX];
static size_t root_length;
static long fault_at, count;
static int fault, trace = -1, serial;
static char *names[FILES];  // of the open files below root
static int ids[FILES];
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static ssize_t plain_write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return real(fd, data, size);
}

void crash_arm(const char *folder, long at, int kind, const char *trace_path) {
    REAL(int, "open", const char *, int, ...);
    root_length = strlen(folder);
    memcpy(root, folder, root_length + 1);
    fault_at = at;
    fault = kind;
    count = 0;
    if (trace_path) trace = real(trace_path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
}

long crash_count(void) { return count; }

// The absolute name of `path` relative to `dir`, in `out`; 1 if it is below root.
static int locate(int dir, const char *path, char *out) {
    if (!root_length || !path) return 0;
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
    } else if (dir == AT_FDCWD) {
        if (!getcwd(out, PATH_MAX)) return 0;
        size_t length = strlen(out);
        snprintf(out + length, PATH_MAX - length, "/%s", path);
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t length = readlink(link, out, PATH_MAX - 1);
        if (length < 0) return 0;
        out[length] = 0;
        if (path[0]) snprintf(out + length, PATH_MAX - length, "/%s", path);
    }
    return !strncmp(out, root, root_length) && (out[root_length] == '/' || !out[root_length]);
}

static void record(const char *name, int id, int flags, long position, const char *path, const char *other, const void *data,
                   size_t size) {
    if (trace < 0) return;
    char line[3 * PATH_MAX];
    int length = snprintf(line, sizeof line, "%s %d %d %ld %zu %s %s", name, id, flags, position, size, path ? path : "-",
                          other ? other : "-");
    line[length++] = '\n';
    plain_write(trace, line, length);
    if (size) plain_write(trace, data, size);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    pause();
}

// What becomes of the operation that is about to happen: 0 go on, -1 fail with errno set, 1 tear it and die. `changes`: it
// would change the disk.
static int judge(int changes) {
    count++;
    if (count < fault_at || !fault || (count > fault_at && fault < FULL)) return 0;
    switch (fault) {
        case KILL: die(); break;
        case TORN: return 1;
        case EIO_ONCE: errno = EIO; return -1;
        case FULL: errno = ENOSPC; return changes ? -1 : 0;
        case READ_ONLY: errno = EROFS; return changes ? -1 : 0;
    }
    return 0;
}

static int open_below(int (*call)(int, const char *, int, mode_t), int dir, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    if (!locate(dir, path, full)) return call(dir, path, flags, mode);
    pthread_mutex_lock(&lock);
    int writes = (flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT;
    int verdict = judge(writes);
    int fd = verdict < 0 ? -1 : call(dir, path, flags, mode);
    if (verdict > 0) die();
    int problem = errno;
    if (fd >= 0 && fd < FILES) {
        free(names[fd]);
        names[fd] = strdup(full);
        ids[fd] = ++serial;
        record("open", ids[fd], flags, 0, full, NULL, NULL, 0);
    }
    errno = problem;
    pthread_mutex_unlock(&lock);
    return fd;
}

static int call_openat(int dir, const char *path, int flags, mode_t mode) {
    REAL(int, "openat64", int, const char *, int, ...);
    return real(dir, path, flags, mode);
}

static mode_t mode_of(int flags, va_list list) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list list; va_start(list, flags); mode_t mode = mode_of(flags, list); va_end(list); \
        return open_below(call_openat, AT_FDCWD, path, flags, mode); }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        va_list list; va_start(list, flags); mode_t mode = mode_of(flags, list); va_end(list); \
        return open_below(call_openat, dir, path, flags, mode); }
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    REAL(int, "close", int);
    if (fd >= 0 && fd < FILES && names[fd]) {
        pthread_mutex_lock(&lock);
        free(names[fd]);
        names[fd] = NULL;
        pthread_mutex_unlock(&lock);
    }
    return real(fd);
}

static const char *name_of(int fd) { return root_length && fd >= 0 && fd < FILES ? names[fd] : NULL; }

ssize_t write(int fd, const void *data, size_t size) {
    if (!name_of(fd)) return plain_write(fd, data, size);
    pthread_mutex_lock(&lock);
    int verdict = judge(1);
    ssize_t done = -1;
    if (verdict >= 0) {
        int append = fcntl(fd, F_GETFL) & O_APPEND;
        struct stat status;
        fstat(fd, &status);
        long position = append ? status.st_size : lseek(fd, 0, SEEK_CUR);
        done = plain_write(fd, data, verdict > 0 ? size / 2 : size);
        if (verdict > 0) die();
        if (done > 0) record("write", ids[fd], 0, position, NULL, NULL, data, done);
    }
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t read(int fd, void *data, size_t size) {
    REAL(ssize_t, "read", int, void *, size_t);
    if (name_of(fd)) {
        pthread_mutex_lock(&lock);
        int verdict = judge(0);
        pthread_mutex_unlock(&lock);
        if (verdict < 0) return -1;
        if (verdict > 0) die();
    }
    return real(fd, data, size);
}

#define SYNC(name) \
    int name(int fd) { \
        REAL(int, #name, int); \
        if (!name_of(fd)) return real(fd); \
        pthread_mutex_lock(&lock); \
        int verdict = judge(1); \
        if (verdict > 0) die(); \
        int done = verdict < 0 ? -1 : real(fd); \
        if (!done) record("sync", ids[fd], 0, 0, names[fd], NULL, NULL, 0); \
        pthread_mutex_unlock(&lock); \
        return done; }
SYNC(fsync)
SYNC(fdatasync)

int ftruncate64(int fd, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    if (!name_of(fd)) return real(fd, size);
    pthread_mutex_lock(&lock);
    int verdict = judge(1);
    if (verdict > 0) die();
    int done = verdict < 0 ? -1 : real(fd, size);
    if (!done) record("truncate", ids[fd], 0, size, NULL, NULL, NULL, 0);
    pthread_mutex_unlock(&lock);
    return done;
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

// Changes of names: `call` does it, `first` (and `second`) are below root or not.
#define CHANGE(operation, first, second, call) \
    do { \
        pthread_mutex_lock(&lock); \
        int verdict = judge(1); \
        int done = verdict < 0 ? -1 : call; \
        if (verdict > 0) die(); \
        int problem = errno; \
        if (!done) record(operation, 0, 0, 0, first, second, NULL, 0); \
        errno = problem; \
        pthread_mutex_unlock(&lock); \
        return done; \
    } while (0)

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    char a[PATH_MAX], b[PATH_MAX];
    int below = locate(AT_FDCWD, from, a);
    if (!(locate(AT_FDCWD, to, b) | below)) return real(from, to);
    CHANGE("rename", a, b, real(from, to));
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    char a[PATH_MAX];
    if (!locate(AT_FDCWD, path, a)) return real(path);
    CHANGE("remove", a, NULL, real(path));
}

int unlinkat(int dir, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    char a[PATH_MAX];
    if (!locate(dir, path, a)) return real(dir, path, flags);
    CHANGE("remove", a, NULL, real(dir, path, flags));
}

int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    char a[PATH_MAX];
    if (!locate(AT_FDCWD, path, a)) return real(path);
    CHANGE("remove", a, NULL, real(path));
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    char a[PATH_MAX];
    if (!locate(AT_FDCWD, path, a)) return real(path, mode);
    CHANGE("mkdir", a, NULL, real(path, mode));
}

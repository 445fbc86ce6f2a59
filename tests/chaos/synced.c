/* Loaded into the store's server: after each fsync or fdatasync of its log, writes down how much of the file is on the disk.

   The size is taken before the sync, so what is noted was surely written then; and it is noted before the server goes on, so
   what the server has answered is surely noted. Notes: one file for each log file, of the same name, in $CHAOS_SYNCED. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define LOG ".incr.aof"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char noted[NAME_MAX + 1];
static int note = -1;

/* The name of the log file behind fd, without its folder; 0 where it is none. */
static int log_name(int fd, char *name) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= (ssize_t)strlen(LOG)) return 0;
    path[length] = 0;
    if (strcmp(path + length - strlen(LOG), LOG) != 0) return 0;
    const char *slash = strrchr(path, '/');
    slash = slash ? slash + 1 : path;
    if (strlen(slash) > NAME_MAX) return 0;
    memcpy(name, slash, strlen(slash) + 1);
    return 1;
}

static void write_down(const char *name, long long size) {
    const char *folder = getenv("CHAOS_SYNCED");
    if (!folder) return;
    pthread_mutex_lock(&lock);
    if (note < 0 || strcmp(noted, name) != 0) {
        char path[PATH_MAX];
        if (note >= 0) close(note);
        snprintf(path, sizeof path, "%s/%s", folder, name);
        note = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        snprintf(noted, sizeof noted, "%s", name);
    }
    char text[24];
    int length = snprintf(text, sizeof text, "%020lld", size);
    if (note < 0 || pwrite(note, text, (size_t)length, 0) != length) abort(); /* a note that is missing would be a lie */
    pthread_mutex_unlock(&lock);
}

static int synced(int fd, const char *call) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, call);
    char name[NAME_MAX + 1];
    struct stat before;
    int is_log = log_name(fd, name) && fstat(fd, &before) == 0;
    int result = real(fd);
    if (is_log && result == 0) write_down(name, (long long)before.st_size);
    return result;
}

int fsync(int fd) { return synced(fd, "fsync"); }
int fdatasync(int fd) { return synced(fd, "fdatasync"); }

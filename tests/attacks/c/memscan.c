/* memscan SECONDS HEXMARKER: reads the memory, the exe link and the fds of every other process it can see, over and over.
 * Prints "marker PID" when a process holds the marker, "exe PID PATH" for a program that is none of the container's,
 * "fd PID TARGET" for an fd that leads to a directory or a memfd, and "rounds N pids M" at the end. */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static unsigned char marker[256];
static size_t marker_len;
static unsigned char chunk[1 << 20];

static void scan_memory(const char *pid) {
    char path[64], line[512];
    snprintf(path, sizeof path, "/proc/%s/mem", pid);
    int mem = open(path, O_RDONLY);
    snprintf(path, sizeof path, "/proc/%s/maps", pid);
    FILE *maps = fopen(path, "r");
    while (mem >= 0 && maps && fgets(line, sizeof line, maps)) {
        unsigned long from, to;
        char mode[8];
        if (sscanf(line, "%lx-%lx %7s", &from, &to, mode) != 3 || mode[0] != 'r' || mode[1] != 'w') continue;
        for (unsigned long at = from; at < to; at += sizeof chunk - marker_len) {
            size_t want = to - at < sizeof chunk ? to - at : sizeof chunk;
            ssize_t got = pread(mem, chunk, want, (off_t)at);
            if (got <= 0) break;
            if (memmem(chunk, (size_t)got, marker, marker_len)) {
                printf("marker %s\n", pid);
                fflush(stdout);
                break;
            }
            if ((size_t)got < sizeof chunk) break;
        }
    }
    if (maps) fclose(maps);
    if (mem >= 0) close(mem);
}

static void scan_links(const char *pid) {
    char path[320], target[512];
    snprintf(path, sizeof path, "/proc/%s/exe", pid);
    ssize_t n = readlink(path, target, sizeof target - 1);
    if (n > 0) {
        target[n] = 0;
        if (strstr(target, "python")) printf("exe %s %s\n", pid, target), fflush(stdout);
        int fd = open(path, O_WRONLY);
        if (fd >= 0) printf("writable %s %s\n", pid, target), fflush(stdout), close(fd);
    }
    snprintf(path, sizeof path, "/proc/%s/fd", pid);
    DIR *fds = opendir(path);
    for (struct dirent *e; fds && (e = readdir(fds));) {
        if (!isdigit((unsigned char)e->d_name[0])) continue;
        snprintf(path, sizeof path, "/proc/%s/fd/%s", pid, e->d_name);
        n = readlink(path, target, sizeof target - 1);
        if (n <= 0) continue;
        target[n] = 0;
        if (target[0] == '/' && strcmp(target, "/dev/null") && !strstr(target, "/std") && !strstr(target, "/proc"))
            printf("fd %s %s\n", pid, target), fflush(stdout);
        if (strstr(target, "memfd:")) printf("fd %s %s\n", pid, target), fflush(stdout);
    }
    if (fds) closedir(fds);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    time_t end = time(NULL) + atoi(argv[1]);
    for (const char *h = argv[2]; h[0] && h[1] && marker_len < sizeof marker; h += 2) {
        unsigned byte;
        sscanf(h, "%2x", &byte);
        marker[marker_len++] = (unsigned char)byte;
    }
    long rounds = 0, most = 0;
    while (time(NULL) < end) {
        DIR *proc = opendir("/proc");
        long pids = 0;
        for (struct dirent *e; proc && (e = readdir(proc));) {
            if (!isdigit((unsigned char)e->d_name[0]) || atoi(e->d_name) == getpid()) continue;
            pids++;
            scan_links(e->d_name);
            scan_memory(e->d_name);
        }
        if (proc) closedir(proc);
        rounds++;
        if (pids > most) most = pids;
    }
    printf("rounds %ld pids %ld\n", rounds, most);
    return 0;
}

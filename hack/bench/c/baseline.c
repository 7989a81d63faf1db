/* baseline LOWER WORK COUNT: what a container start costs when nothing but system calls is left of it.
 *
 * Makes, COUNT times, the system calls that starting a host-network pod with one container takes (an IPC namespace with its /dev/shm, a
 * cgroup in every hierarchy of cgroup v1 or one on v2, mount and PID namespace, overlay root, /dev /proc /sys, masked and read-only paths,
 * the pod's files, pivot, capabilities, a seccomp filter, execve) and prints the milliseconds of each from the first call to the execve's
 * success, one a line. LOWER is an unpacked image with /bin/busybox, WORK an empty directory on a file system that overlay can write to.
 * Differences from a runtime, all in favour of this program: no daemon, no messages, no records, no image lookup, no log, no recovery.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *lower, *work;
static char hierarchies[32][64];
static int hierarchy_count;

static void die(const char *what, const char *path)
{
    fprintf(stderr, "%s %s: %s\n", what, path ? path : "", strerror(errno));
    _exit(1);
}
#define TRY(call, path) do { if ((call) < 0) die(#call, path); } while (0)

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void put(const char *directory, const char *file, const char *text)
{
    char path[2700];
    snprintf(path, sizeof path, "%s/%s", directory, file);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return; /* a file of another controller */
    if (write(fd, text, strlen(text)) < 0 && errno != EINVAL && errno != EPERM)
        die("write", path);
    close(fd);
}

static void find_hierarchies(void)
{
    struct stat st;
    if (stat("/sys/fs/cgroup/cgroup.controllers", &st) == 0) {
        strcpy(hierarchies[hierarchy_count++], "/sys/fs/cgroup");
        return;
    }
    DIR *d = opendir("/sys/fs/cgroup");
    if (!d)
        die("opendir", "/sys/fs/cgroup");
    for (struct dirent *e; (e = readdir(d)) && hierarchy_count < 32;)
        if (e->d_type == DT_DIR && e->d_name[0] != '.' && strcmp(e->d_name, "unified") && strcmp(e->d_name, "systemd"))
            snprintf(hierarchies[hierarchy_count++], 64, "/sys/fs/cgroup/%.40s", e->d_name);
    closedir(d);
}

static void make_cgroups(const char *name)
{
    static const char *devices[] = {"c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm", "c 5:0 rwm",
                                    "c 5:2 rwm", "c 136:* rwm"};
    for (int i = 0; i < hierarchy_count; i++) {
        char path[2200];
        snprintf(path, sizeof path, "%s/%s", hierarchies[i], name);
        TRY(mkdir(path, 0755), path);
        if (strstr(hierarchies[i], "cpuset")) {
            put(path, "cgroup.clone_children", "1");
            char from[2200], value[256];
            static const char *files[] = {"cpuset.cpus", "cpuset.mems"};
            for (int k = 0; k < 2; k++) {
                snprintf(from, sizeof from, "%s/%s", hierarchies[i], files[k]);
                FILE *f = fopen(from, "re");
                if (f && fgets(value, sizeof value, f))
                    put(path, files[k], value);
                if (f)
                    fclose(f);
            }
        }
        put(path, "cpu.shares", "1024");
        put(path, "memory.limit_in_bytes", "-1");
        if (strstr(hierarchies[i], "devices")) {
            put(path, "devices.deny", "a");
            for (size_t k = 0; k < sizeof devices / sizeof *devices; k++)
                put(path, "devices.allow", devices[k]);
        }
        put(path, access("/sys/fs/cgroup/cgroup.controllers", F_OK) ? "tasks" : "cgroup.procs", "0");
    }
}

static void remove_cgroups(const char *name)
{
    for (int i = 0; i < hierarchy_count; i++) {
        char path[2200];
        snprintf(path, sizeof path, "%s/%s", hierarchies[i], name);
        for (int k = 0; rmdir(path) < 0 && errno == EBUSY && k < 200; k++)
            usleep(5000);
    }
}

static void bind(const char *from, const char *to, unsigned long flags)
{
    TRY(mount(from, to, 0, MS_BIND | MS_REC, 0), to);
    if (flags)
        TRY(mount(0, to, 0, MS_REMOUNT | MS_BIND | flags, 0), to);
}

static void root_file_system(const char *directory)
{
    char option[1200], at[400];
    snprintf(at, sizeof at, "%s/root", directory);
    snprintf(option, sizeof option, "lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, directory, directory);
    TRY(mount(0, "/", 0, MS_REC | MS_PRIVATE, 0), "/");
    TRY(mount("overlay", at, "overlay", 0, option), at);
    TRY(chdir(at), at);
    TRY(mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0), "proc");
    TRY(mount("tmpfs", "dev", "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k"), "dev");
    TRY(mkdir("dev/pts", 0755), 0);
    TRY(mkdir("dev/shm", 0755), 0);
    TRY(mkdir("dev/mqueue", 0755), 0);
    TRY(mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"), "dev/pts");
    TRY(mount("mqueue", "dev/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0), "dev/mqueue");
    TRY(mount("shm", "dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777,size=65536k"), "dev/shm");
    TRY(mount("sysfs", "sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, 0), "sys");
    TRY(mount("tmpfs", "sys/fs/cgroup", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755"), "sys/fs/cgroup");
    for (int i = 0; i < hierarchy_count; i++) {
        const char *base = strrchr(hierarchies[i], '/');
        snprintf(option, sizeof option, "sys/fs/cgroup%s", base);
        TRY(mkdir(option, 0755), option);
        bind(hierarchies[i], option, MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC);
    }
    static const struct { const char *name; int major, minor; } nodes[] = {
        {"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}};
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++) {
        snprintf(option, sizeof option, "dev/%s", nodes[i].name);
        TRY(mknod(option, S_IFCHR | 0666, makedev(nodes[i].major, nodes[i].minor)), option);
        TRY(chmod(option, 0666), option);
    }
    TRY(symlink("/proc/self/fd", "dev/fd"), 0);
    TRY(symlink("/proc/self/fd/0", "dev/stdin"), 0);
    TRY(symlink("/proc/self/fd/1", "dev/stdout"), 0);
    TRY(symlink("/proc/self/fd/2", "dev/stderr"), 0);
    TRY(symlink("pts/ptmx", "dev/ptmx"), 0);
    static const char *files[] = {"etc/hosts", "etc/hostname", "etc/resolv.conf"};
    for (size_t i = 0; i < 3; i++) {
        int fd = open(files[i], O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
        if (fd >= 0)
            close(fd);
        snprintf(option, sizeof option, "%s/file", work);
        bind(option, files[i], 0);
    }
    static const char *readonly[] = {"proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger"};
    for (size_t i = 0; i < sizeof readonly / sizeof *readonly; i++)
        if (access(readonly[i], F_OK) == 0)
            bind(readonly[i], readonly[i], MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC);
    static const char *masked[] = {"proc/asound", "proc/acpi", "proc/kcore", "proc/keys", "proc/latency_stats", "proc/timer_list",
                                   "proc/timer_stats", "proc/sched_debug", "proc/scsi", "sys/firmware"};
    for (size_t i = 0; i < sizeof masked / sizeof *masked; i++) {
        struct stat st;
        if (stat(masked[i], &st) < 0)
            continue;
        if (S_ISDIR(st.st_mode))
            TRY(mount("tmpfs", masked[i], "tmpfs", MS_RDONLY, 0), masked[i]);
        else
            TRY(mount("dev/null", masked[i], 0, MS_BIND, 0), masked[i]);
    }
    TRY(syscall(SYS_pivot_root, ".", "."), at);
    TRY(umount2(".", MNT_DETACH), at);
    TRY(chdir("/"), "/");
}

static void drop_and_filter(void)
{
    static const unsigned long long keep = 0x00000000a80425fbULL; /* the default set of every runtime */
    for (int cap = 0; cap <= 40; cap++)
        if (!(keep >> cap & 1))
            prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
    struct { unsigned version; int pid; } header = {0x20080522, 0};
    struct { unsigned effective, permitted, inheritable; } data[2] = {{(unsigned)keep, (unsigned)keep, 0}, {0, 0, 0}};
    /* a filter as long as a default profile's, whose every path allows */
    static struct sock_filter code[600];
    code[0] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 1; i < 599; i++)
        code[i] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 100000 + (unsigned)i, 0, 0);
    code[599] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {600, code};
    TRY(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program), "seccomp");
    gid_t none = 0;
    TRY(setgroups(1, &none), 0);
    TRY(setresgid(0, 0, 0), 0);
    TRY(setresuid(0, 0, 0), 0);
    TRY(syscall(SYS_capset, &header, data), "capset");
}

struct start { const char *directory; int ready; };

static int container(void *argument)
{
    struct start *s = argument;
    struct rlimit files = {1 << 16, 1 << 16};
    syscall(SYS_keyctl, 1 /* KEYCTL_JOIN_SESSION_KEYRING */, 0, 0, 0, 0);
    root_file_system(s->directory);
    setrlimit(RLIMIT_NOFILE, &files);
    setsid();
    drop_and_filter();
    char *argv[] = {"busybox", "sleep", "1000", 0}, *env[] = {"PATH=/bin", 0};
    execve("/bin/busybox", argv, env);
    die("execve", "/bin/busybox");
    return 1;
}

static pid_t start_one(const char *name, const char *directory, int ready)
{
    /* the parent of the container: joins its cgroups, so that everything that follows is charged to it */
    pid_t middle = fork();
    if (middle)
        return middle;
    make_cgroups(name);
    TRY(unshare(CLONE_NEWIPC), "ipc");
    static char stack[1 << 16] __attribute__((aligned(16)));
    struct start s = {directory, ready};
    pid_t pid = clone(container, stack + sizeof stack, CLONE_NEWNS | CLONE_NEWPID | SIGCHLD, &s);
    TRY(pid, "clone");
    close(ready);
    char text[32];
    snprintf(text, sizeof text, "%d", pid);
    int fd = open("pid", O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        die("write", "pid");
    close(fd);
    _exit(0);
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: baseline LOWER WORK COUNT\n");
        return 2;
    }
    lower = argv[1];
    work = argv[2];
    find_hierarchies();
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    TRY(chdir(work), work);
    close(open("file", O_CREAT | O_WRONLY, 0644));
    for (int i = 0; i < atoi(argv[3]); i++) {
        char name[64], directory[400], sub[440];
        snprintf(name, sizeof name, "crishim-baseline-%d-%d", getpid(), i);
        double began = now();
        snprintf(directory, sizeof directory, "%s/%d", work, i);
        TRY(mkdir(directory, 0700), directory);
        static const char *parts[] = {"upper", "work", "root"};
        for (int k = 0; k < 3; k++) {
            snprintf(sub, sizeof sub, "%s/%s", directory, parts[k]);
            TRY(mkdir(sub, 0755), sub);
        }
        int ready[2];
        TRY(pipe2(ready, O_CLOEXEC), "pipe");
        pid_t middle = start_one(name, directory, ready[1]);
        close(ready[1]);
        char byte;
        if (read(ready[0], &byte, 1) != 0)
            die("read", "ready");
        double spent = now() - began;
        close(ready[0]);
        int status, pid = 0;
        waitpid(middle, &status, 0);
        FILE *f = fopen("pid", "re");
        if (!f || fscanf(f, "%d", &pid) != 1 || kill(pid, 0) < 0)
            die("container", "pid");
        fclose(f);
        kill(pid, SIGKILL);
        if (waitpid(pid, &status, 0) != pid || !WIFSIGNALED(status)) {
            fprintf(stderr, "the container did not run\n");
            remove_cgroups(name);
            return 1;
        }
        remove_cgroups(name);
        printf("%.3f\n", spent);
    }
    return 0;
}

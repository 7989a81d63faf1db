/* handover give|take SOCKET: "give" passes its stdout to whoever listens and exits; "take" writes to what it was passed without end. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv) {
    char control[CMSG_SPACE(sizeof(int))] = {0}, byte = 0;
    struct iovec data = {&byte, 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (argc != 3) return 2;
    strncpy(address.sun_path, argv[2], sizeof address.sun_path - 1);
    int line = socket(AF_UNIX, SOCK_STREAM, 0), fd = 1;
    if (!strcmp(argv[1], "give")) {
        if (connect(line, (void *)&address, sizeof address)) return 1;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET, header->cmsg_type = SCM_RIGHTS, header->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
        return sendmsg(line, &message, 0) != 1;
    }
    if (bind(line, (void *)&address, sizeof address) || listen(line, 1)) return 1;
    int giver = accept(line, 0, 0);
    if (recvmsg(giver, &message, 0) != 1) return 1;
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    usleep(500000);
    printf("took\n");
    fflush(stdout);
    for (;;)
        if (write(fd, "still here\n", 11) < 0) usleep(1000);
}

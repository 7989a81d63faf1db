/* sockets: prints "family N open|EPERM|other errno" for the socket families that a container has no business with. */
#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>

int main(void) {
    int families[] = {38, 40};
    for (int i = 0; i < 2; i++) {
        int fd = socket(families[i], SOCK_STREAM, 0);
        if (fd < 0 && errno == ESOCKTNOSUPPORT) fd = socket(families[i], SOCK_SEQPACKET, 0);
        printf("family %d %s %d\n", families[i], fd >= 0 ? "open" : errno == EPERM ? "EPERM" : "other", fd >= 0 ? 0 : errno);
    }
    return 0;
}

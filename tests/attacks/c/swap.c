/* swap DIRECTORY NAME TARGET SECONDS: exchanges DIRECTORY/NAME with a symlink to TARGET (renameat2(RENAME_EXCHANGE)) as fast as it can. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv) {
    char link[256];
    if (argc != 5) return 2;
    int directory = open(argv[1], O_RDONLY | O_DIRECTORY);
    snprintf(link, sizeof link, "%s.link", argv[2]);
    if (directory < 0 || symlinkat(argv[3], directory, link)) return 1;
    printf("swapping\n");
    fflush(stdout);
    for (time_t end = time(NULL) + atoi(argv[4]); time(NULL) < end;)
        for (int i = 0; i < 1000; i++) syscall(SYS_renameat2, directory, argv[2], directory, link, 2);
    return 0;
}

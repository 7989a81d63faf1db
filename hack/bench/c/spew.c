/* spew LINES: that many lines of 100 bytes on stdout, each with one write(2), each with its number, so that a lost, repeated or torn one
 * is found in the log. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    long lines = argc > 1 ? atol(argv[1]) : 1000;
    char line[101];

    memset(line, 'x', sizeof line);
    line[99] = '\n';
    for (long i = 0; i < lines; i++) {
        char number[16];
        int n = snprintf(number, sizeof number, "%010ld ", i);
        memcpy(line, number, (size_t)n);
        if (write(1, line, 100) != 100)
            return 1;
    }
    return 0;
}

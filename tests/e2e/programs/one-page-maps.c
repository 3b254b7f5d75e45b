/* A victim of very many areas of one page each, alternately writable and read-only, with a hole
   behind each; every page has content of its own, and all are looked at again and again.

       one-page-maps STATUS COUNT [fixed]

   CRIU maps all areas beforehand, packed one behind the other. One that happens to lie where it
   belongs then is not registered for a lazy restore: a row of areas with holes sweeps thousands of
   places where that can happen. `fixed`: without random addresses, where the row begins at the
   same place each time. The status has a line for each pass: its number, the first page that is
   wrong or -1, and how many are. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <unistd.h>

#define PAGE 4096
#define MOST 20000

static unsigned char *page[MOST];

static int wrong(int i) {
  for (size_t at = 0; at < PAGE; at += 512)
    if (page[i][at] != 1 + i % 250) return 1;
  return 0;
}

int main(int argc, char **argv) {
  int count = argc > 2 ? atoi(argv[2]) : 0;
  if (count < 1 || count > MOST) return 2;
  int now = personality(0xffffffff);
  if (argc > 3 && !(now & ADDR_NO_RANDOMIZE)) {
    if (personality(now | ADDR_NO_RANDOMIZE) < 0) return 3;
    execvp(argv[0], argv);
    return 3;
  }
  for (int i = 0; i < count; i++) {
    page[i] = mmap(0, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page[i] == MAP_FAILED || munmap(page[i] + PAGE, PAGE)) return 4;
    memset(page[i], 1 + i % 250, PAGE);
    if (i % 2 && mprotect(page[i], PAGE, PROT_READ)) return 4;
  }
  setsid();
  int status = open(argv[1], O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0644);
  int null = open("/dev/null", O_RDWR);
  if (status < 0 || null < 0) return 5;
  dup2(null, 0), dup2(status, 1), dup2(null, 2);
  for (int fd = 3; fd < 64; fd++) close(fd);
  for (int pass = 0;; pass++) {
    int bad = 0, first = -1;
    for (int i = 0; i < count; i++)
      if (wrong(i) && !bad++) first = i;
    dprintf(1, "%d %d %d\n", pass, first, bad);
    usleep(300000);
  }
}

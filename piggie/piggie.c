/*
 * piggie: the ancestor's counter. A child in a pid namespace of its own counts for ever and
 * appends each number, with the wall clock, to a file.
 *
 *   piggie FILE [INTERVAL_MS]      prints the child's outside pid and ends
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t ending;

static void end(int signo)
{
	(void)signo;
	ending = 1;
}

static int count(int fd, long interval_ms)
{
	struct timespec pause = { interval_ms / 1000, interval_ms % 1000 * 1000000 };
	struct sigaction action = { .sa_handler = end };
	unsigned long number = 0;

	sigaction(SIGTERM, &action, NULL);
	while (!ending) {
		struct timespec now;
		char line[64];
		int size;

		clock_gettime(CLOCK_REALTIME, &now);
		size = snprintf(line, sizeof(line), "%lu %ld.%03ld\n", number++, (long)now.tv_sec,
				now.tv_nsec / 1000000);
		if (write(fd, line, size) != size)
			return 1;
		nanosleep(&pause, NULL);
	}
	return 0;
}

int main(int argc, char **argv)
{
	long interval_ms = argc > 2 ? atol(argv[2]) : 100;
	int fd, null;
	pid_t child;

	if (argc < 2 || interval_ms <= 0) {
		fprintf(stderr, "usage: piggie FILE [INTERVAL_MS]\n");
		return 2;
	}
	fd = open(argv[1], O_WRONLY | O_CREAT | O_APPEND, 0644);
	null = open("/dev/null", O_RDWR);
	if (fd < 0 || null < 0) {
		fprintf(stderr, "piggie: %s: %s\n", argv[1], strerror(errno));
		return 1;
	}
	/* The next child becomes pid 1 of a new namespace. */
	if (unshare(CLONE_NEWPID)) {
		fprintf(stderr, "piggie: pid namespace: %s\n", strerror(errno));
		return 1;
	}
	child = fork();
	if (child < 0) {
		perror("piggie: fork");
		return 1;
	}
	if (child == 0) {
		setsid();
		for (int i = 0; i < 3; i++)
			dup2(null, i);
		if (null > 2)
			close(null);
		return count(fd, interval_ms);
	}
	printf("%d\n", (int)child);
	return 0;
}

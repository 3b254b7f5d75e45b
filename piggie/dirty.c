/*
 * piggie-dirty: owns memory, rewrites pages of a hot region, and verifies every page, for ever.
 *
 * Each page holds a pattern made of its index and its version; the versions lie in an array of
 * their own whose sum is kept beside it. A page that is not what it should be is counted and
 * written to the status file at once. With --children, a tree: each child owns memory too and
 * sends numbered tokens through a pipe; a token out of order counts as wrong.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / 8)
#define STATUS_SIZE 512
#define TICK_MS 10
#define STATUS_MS 100
#define MAX_CHILDREN 16

struct options {
	size_t pages, hot;
	double writes_per_s, verifies_per_s;
	const char *status, *udp;
	int children, detach;
};

struct dirtier {
	uint64_t *memory;
	uint32_t *version;
	uint64_t version_sum;
	size_t pages, hot, write_at, verify_at;
	uint64_t written, verified, passes, wrong, tokens, tick;
	long long last_wrong;
	double max_gap_ms, last_loop, started;
};

static volatile sig_atomic_t ending, spoil, verify_now;

static void on_signal(int signo)
{
	if (signo == SIGUSR1)
		spoil = 1;
	else if (signo == SIGUSR2)
		verify_now = 1;
	else
		ending = 1;
}

static double now(void)
{
	struct timespec t;

	/* CLOCK_MONOTONIC of a restored process leaves out the time between dump and restore. */
	clock_gettime(CLOCK_REALTIME, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static uint64_t seed(size_t page, uint32_t version)
{
	uint64_t x = (page + 1) * 0x9E3779B97F4A7C15ull ^ (uint64_t)version * 0xD1B54A32D192ED03ull;

	x ^= x >> 29;
	return x * 0xBF58476D1CE4E5B9ull;
}

static void fill(struct dirtier *d, size_t page)
{
	uint64_t *word = d->memory + page * WORDS, x;

	d->version[page]++;
	d->version_sum++;
	x = seed(page, d->version[page]);
	for (size_t i = 0; i < WORDS; i++)
		word[i] = x + i;
	d->written++;
}

static void verify(struct dirtier *d, size_t page)
{
	const uint64_t *word = d->memory + page * WORDS;
	uint64_t x = seed(page, d->version[page]), bad = 0;

	for (size_t i = 0; i < WORDS; i++)
		bad |= word[i] ^ (x + i);
	if (bad) {
		d->wrong++;
		d->last_wrong = (long long)page;
		/* Count a page once, not once a pass. */
		fill(d, page);
	}
	d->verified++;
}

static void verify_versions(struct dirtier *d)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < d->pages; i++)
		sum += d->version[i];
	if (sum != d->version_sum) {
		d->wrong++;
		d->last_wrong = -2;
		d->version_sum = sum;
	}
}

static int init(struct dirtier *d, const struct options *o)
{
	memset(d, 0, sizeof(*d));
	d->pages = o->pages;
	d->hot = o->hot;
	d->last_wrong = -1;
	d->memory = mmap(NULL, d->pages * PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	d->version = mmap(NULL, d->pages * sizeof(*d->version), PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (d->memory == MAP_FAILED || d->version == MAP_FAILED)
		return -1;
	for (size_t i = 0; i < d->pages; i++)
		fill(d, i);
	d->written = 0;
	d->started = d->last_loop = now();
	return 0;
}

/* One step of elapsed_s seconds: so many writes, so many verifications. */
static void step(struct dirtier *d, const struct options *o, double elapsed_s)
{
	static double writes, verifies;

	/* After a standstill (a freeze, a busy machine) do not catch up; nor when the clock jumps. */
	if (elapsed_s > 0.1)
		elapsed_s = 0.1;
	if (elapsed_s < 0)
		elapsed_s = 0;
	for (writes += o->writes_per_s * elapsed_s; writes >= 1 && d->hot; writes--) {
		fill(d, d->write_at);
		d->write_at = (d->write_at + 1) % d->hot;
	}
	verifies += o->verifies_per_s * elapsed_s;
	if (verify_now) {
		verify_now = 0;
		verifies += d->pages;
	}
	for (; verifies >= 1; verifies--) {
		verify(d, d->verify_at);
		if (++d->verify_at == d->pages) {
			d->verify_at = 0;
			d->passes++;
			verify_versions(d);
		}
	}
	if (spoil) {
		spoil = 0;
		d->memory[d->verify_at * WORDS] ^= 1;
	}
}

static void report(struct dirtier *d, int fd, int children)
{
	char line[STATUS_SIZE + 1];
	int size = snprintf(line, sizeof(line),
		"{\"pid\": %d, \"time\": %.3f, \"tick\": %llu, \"verified\": %llu, \"passes\": %llu, "
		"\"wrong\": %llu, \"last_wrong\": %lld, \"written\": %llu, \"tokens\": %llu, "
		"\"children\": %d, \"max_gap_ms\": %.1f, \"pages\": %zu, \"base\": %llu}",
		(int)getpid(), now(), (unsigned long long)d->tick, (unsigned long long)d->verified,
		(unsigned long long)d->passes, (unsigned long long)d->wrong, d->last_wrong,
		(unsigned long long)d->written, (unsigned long long)d->tokens, children,
		d->max_gap_ms, d->pages, (unsigned long long)(uintptr_t)d->memory);

	/* One write of a fixed size: a reader never sees half of it. */
	memset(line + size, ' ', STATUS_SIZE - size);
	line[STATUS_SIZE - 1] = '\n';
	if (pwrite(fd, line, STATUS_SIZE, 0) != STATUS_SIZE)
		_exit(3);
}

static double pace(struct dirtier *d)
{
	double t = now(), elapsed = t - d->last_loop;

	if (elapsed * 1000 > d->max_gap_ms)
		d->max_gap_ms = elapsed * 1000;
	d->last_loop = t;
	d->tick++;
	return elapsed;
}

/* A child: memory of its own, and a token at each tick: its number, and its count of wrongs. */
static int child_main(const struct options *o, int out)
{
	struct dirtier d;
	uint64_t token[2] = { 0, 0 };

	prctl(PR_SET_NAME, "piggie-child");
	if (init(&d, o))
		return 1;
	while (!ending) {
		step(&d, o, pace(&d));
		token[1] = d.wrong;
		if (write(out, token, sizeof(token)) != sizeof(token))
			return 1; /* the parent is gone */
		token[0]++;
		usleep(TICK_MS * 1000);
	}
	return d.wrong != 0;
}

static void take_tokens(struct dirtier *d, int fd, uint64_t *expected, uint64_t *wrong)
{
	struct pollfd poller = { .fd = fd, .events = POLLIN };
	uint64_t token[2];

	while (poll(&poller, 1, 0) == 1) {
		if (read(fd, token, sizeof(token)) != sizeof(token)) {
			d->wrong++;
			d->last_wrong = -3; /* the child is gone */
			return;
		}
		if (token[0] != *expected)
			d->wrong++;
		*expected = token[0] + 1;
		d->wrong += token[1] - *wrong;
		*wrong = token[1];
		d->tokens++;
	}
}

static int observer(const char *text, struct sockaddr_in *to)
{
	char host[64];
	const char *colon = strrchr(text, ':');
	int fd, yes = 1;

	if (!colon || (size_t)(colon - text) >= sizeof(host))
		return -1;
	memcpy(host, text, colon - text);
	host[colon - text] = 0;
	to->sin_family = AF_INET;
	to->sin_port = htons(atoi(colon + 1));
	if (inet_pton(AF_INET, host, &to->sin_addr) != 1)
		return -1;
	fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
	/* A copy on the same host, before this one has ended, gets the same port. */
	if (fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes))) {
		close(fd);
		return -1;
	}
	return fd;
}

static int run(const struct options *o, int ready)
{
	struct sockaddr_in to = { 0 };
	struct dirtier d;
	uint64_t expected[MAX_CHILDREN] = { 0 }, wrong[MAX_CHILDREN] = { 0 };
	int pipes[MAX_CHILDREN][2], udp = -1, children = o->children;
	double last_status = 0;
	int status = open(o->status, O_RDWR | O_CREAT | O_TRUNC, 0644);

	if (status < 0) {
		fprintf(stderr, "piggie-dirty: %s: %s\n", o->status, strerror(errno));
		return 1;
	}
	if (o->udp) {
		udp = observer(o->udp, &to);
		if (udp < 0) {
			fprintf(stderr, "piggie-dirty: --udp wants ADDRESS:PORT\n");
			return 2;
		}
	}
	if (ready >= 0)
		dup2(STDIN_FILENO, STDERR_FILENO); /* all that can go wrong has been said */
	for (int i = 0; i < children; i++) {
		pid_t pid;

		if (pipe(pipes[i]))
			return 1;
		pid = fork();
		if (pid < 0)
			return 1;
		if (pid == 0) {
			for (int j = 0; j <= i; j++)
				close(pipes[j][0]);
			close(status);
			if (ready >= 0)
				close(ready);
			_exit(child_main(o, pipes[i][1]));
		}
		close(pipes[i][1]);
	}
	if (init(&d, o))
		return 1;
	report(&d, status, children);
	if (ready >= 0) {
		if (write(ready, "r", 1) != 1)
			return 1;
		close(ready);
	}
	while (!ending) {
		uint64_t before = d.wrong;

		step(&d, o, pace(&d));
		for (int i = 0; i < children; i++)
			take_tokens(&d, pipes[i][0], &expected[i], &wrong[i]);
		if (udp >= 0) {
			struct utsname host;
			char text[128];
			int size;

			/* Asked anew each time: it is the host on which this copy runs. */
			uname(&host);
			size = snprintf(text, sizeof(text), "%llu %.6f %.64s\n",
					(unsigned long long)d.tick, d.last_loop, host.nodename);

			/* Nobody listening is no trouble of ours. */
			(void)!sendto(udp, text, size, 0, (struct sockaddr *)&to, sizeof(to));
		}
		if (d.wrong != before || d.last_loop - last_status > STATUS_MS / 1e3 ||
		    d.last_loop < last_status) {
			report(&d, status, children);
			last_status = d.last_loop;
		}
		usleep(TICK_MS * 1000);
	}
	report(&d, status, children);
	return d.wrong != 0;
}

static int detach(const struct options *o)
{
	int pipes[2], null = open("/dev/null", O_RDWR);
	pid_t pid;
	char byte;

	if (null < 0 || pipe(pipes))
		return 1;
	pid = fork();
	if (pid < 0)
		return 1;
	if (pid == 0) {
		setsid();
		close(pipes[0]);
		dup2(null, 0);
		dup2(null, 1);
		if (null > 2)
			close(null);
		/* Errors of the start still reach the caller by stderr. */
		_exit(run(o, pipes[1]));
	}
	close(pipes[1]);
	if (read(pipes[0], &byte, 1) != 1)
		return 1;
	printf("%d\n", (int)pid);
	return 0;
}

static void usage(FILE *out)
{
	fprintf(out,
		"usage: piggie-dirty --status FILE [--mib N] [--hot-mib N] [--writes N] [--verifies N]\n"
		"                    [--children N] [--udp ADDRESS:PORT] [--detach]\n"
		"  --mib N       memory to own (16)\n"
		"  --hot-mib N   part of it that is rewritten (1)\n"
		"  --writes N    pages rewritten a second (100)\n"
		"  --verifies N  pages verified a second (20000)\n"
		"  --children N  as many children with as much memory, and pipes (0)\n"
		"  --udp A:P     send \"TICK TIME HOST\" there every 10 ms\n"
		"  --detach      a session of its own; print the pid once the memory is filled\n"
		"SIGUSR1 spoils a page on purpose; SIGUSR2 verifies every page at once; SIGTERM ends, with 1 if anything was wrong.\n");
}

int main(int argc, char **argv)
{
	static const struct option longs[] = {
		{ "status", 1, 0, 's' }, { "mib", 1, 0, 'm' },	  { "hot-mib", 1, 0, 'h' },
		{ "writes", 1, 0, 'w' }, { "verifies", 1, 0, 'v' }, { "children", 1, 0, 'c' },
		{ "udp", 1, 0, 'u' },	 { "detach", 0, 0, 'd' },   { "help", 0, 0, '?' }, { 0 },
	};
	struct options o = { .pages = 16 * 256, .hot = 256, .writes_per_s = 100,
			     .verifies_per_s = 20000 };
	struct sigaction action = { .sa_handler = on_signal };
	int c;

	while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
		switch (c) {
		case 's': o.status = optarg; break;
		case 'm': o.pages = strtoul(optarg, NULL, 10) * 256; break;
		case 'h': o.hot = strtod(optarg, NULL) * 256; break;
		case 'w': o.writes_per_s = strtod(optarg, NULL); break;
		case 'v': o.verifies_per_s = strtod(optarg, NULL); break;
		case 'c': o.children = atoi(optarg); break;
		case 'u': o.udp = optarg; break;
		case 'd': o.detach = 1; break;
		default: usage(stderr); return 2;
		}
	}
	if (!o.status || !o.pages || o.hot > o.pages || o.children > MAX_CHILDREN || optind < argc) {
		usage(stderr);
		return 2;
	}
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGINT, &action, NULL);
	sigaction(SIGUSR1, &action, NULL);
	sigaction(SIGUSR2, &action, NULL);
	return o.detach ? detach(&o) : run(&o, -1);
}

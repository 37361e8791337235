// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * Keeps every part of a kernel that allocates busy for some seconds:  bustle SECONDS [MODULE.ko]
 * Does the work of one of its processes so many times, and no other:  bustle WORKER ROUNDS
 *
 * One process each forks and executes, makes and removes files, opens and closes sockets of several kinds, loads and unloads
 * the module, makes and removes what has per-CPU memory (mounts and network namespaces), and takes nearly all memory, so that
 * the caches that another fills are shrunk. Says in the end how often each did so; a zero is a failure, exit code 1.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MIB (1UL << 20)
/* Memory that is left to everybody else while pressure is on. */
#define MARGIN_KB (14 << 10)

static const char *module;
static char *self;

static void forks(long round)
{
	pid_t child = fork();

	if (child == 0) {
		if (round % 2)
			execl(self, self, "0", NULL);
		_exit(0);
	}
	if (child < 0 || waitpid(child, NULL, 0) != child)
		_exit(1);
}

static void files(long round)
{
	char name[64], other[160], data[3000] = "bustle";
	int file;

	snprintf(name, sizeof(name), "/tmp/bustle.%ld", round % 50);
	snprintf(other, sizeof(other), "%s/a file with a name that does not fit into its directory entry", name);
	if (mkdir(name, 0700) && errno != EEXIST)
		_exit(1);
	file = open(other, O_CREAT | O_RDWR, 0600);
	if (file < 0)
		_exit(1);
	for (long i = 0; i < round % 8; i++)
		if (write(file, data, sizeof(data)) != sizeof(data))
			_exit(1);
	close(file);
	rename(other, "/tmp/bustle.moved");
	symlink(other, "/tmp/bustle.link");
	unlink("/tmp/bustle.moved");
	unlink("/tmp/bustle.link");
	rmdir(name);
}

static void loopback_up(void)
{
	struct ifreq request = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	int file = socket(AF_INET, SOCK_DGRAM, 0);

	ioctl(file, SIOCSIFFLAGS, &request);
	close(file);
}

static void connect_tcp(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM, 0), one = socket(AF_INET, SOCK_STREAM, 0), other;
	/* No port is left behind in TIME_WAIT. */
	struct linger linger = { .l_onoff = 1 };

	setsockopt(one, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
	if (bind(listener, (void *)&address, sizeof(address)) || listen(listener, 1) ||
	    getsockname(listener, (void *)&address, &length) || connect(one, (void *)&address, sizeof(address)))
		_exit(1);
	other = accept(listener, NULL, NULL);
	if (write(one, "bustle", 6) != 6)
		_exit(1);
	close(one);
	close(other);
	close(listener);
}

static void sockets(long round)
{
	char text[600] = "bustle";
	int pair[2], queue = epoll_create1(0), event = eventfd(0, 0);
	struct epoll_event wanted = { .events = EPOLLIN };

	if (socketpair(AF_UNIX, round % 2 ? SOCK_STREAM : SOCK_DGRAM, 0, pair))
		_exit(1);
	for (int i = 0; i < 4; i++)
		if (write(pair[0], text, sizeof(text)) != sizeof(text))
			_exit(1);
	epoll_ctl(queue, EPOLL_CTL_ADD, pair[1], &wanted);
	epoll_ctl(queue, EPOLL_CTL_ADD, event, &wanted);
	close(pair[0]);
	close(pair[1]);
	close(queue);
	close(event);
	if (round == 0)
		loopback_up();
	connect_tcp();
	close(socket(AF_NETLINK, SOCK_RAW, 0));
	if (pipe(pair) || write(pair[1], text, sizeof(text)) != sizeof(text))
		_exit(1);
	close(pair[0]);
	close(pair[1]);
}

static void modules(long round)
{
	int file;

	(void)round;
	if (!module) {
		pause();
		return;
	}
	file = open(module, O_RDONLY);
	if (syscall(SYS_finit_module, file, "rounds=1", 0) || syscall(SYS_delete_module, "clean", 0))
		_exit(1);
	close(file);
}

static void per_cpu(long round)
{
	const char *folder = "/tmp/bustle.mount";
	pid_t child;

	if ((mkdir(folder, 0700) && errno != EEXIST) || mount("bustle", folder, "tmpfs", 0, "size=1m"))
		_exit(1);
	if (umount(folder))
		_exit(1);
	if (round % 8)
		return;
	child = fork();
	if (child == 0)
		_exit(unshare(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS) != 0);
	if (child < 0 || waitpid(child, NULL, 0) != child)
		_exit(1);
}

/* Names that are not there: each look-up leaves an entry in a cache that can be shrunk. */
static void names(long round)
{
	char name[64];
	struct stat status;

	for (int i = 0; i < 50; i++) {
		snprintf(name, sizeof(name), "/proc/sys/net/bustle.%ld.%d", round, i);
		stat(name, &status);
		snprintf(name, sizeof(name), "/tmp/no.%ld.%d", round, i);
		stat(name, &status);
	}
	usleep(2000);
}

static long available_kb(void)
{
	char line[128];
	long value = 0;
	FILE *file = fopen("/proc/meminfo", "r");

	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "MemAvailable: %ld", &value) == 1)
			break;
	if (file)
		fclose(file);
	return value;
}

static void drop(const char *what)
{
	int file = open("/proc/sys/vm/drop_caches", O_WRONLY);

	if (file < 0 || write(file, what, 1) != 1)
		_exit(1);
	close(file);
}

static void pressure(long round)
{
	size_t size = 0, most = 4096 * MIB;
	char *memory = mmap(NULL, most, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED)
		_exit(1);
	while (size < most && available_kb() > MARGIN_KB) {
		for (size_t at = 0; at < MIB; at += 4096)
			memory[size + at] = 1;
		size += MIB;
	}
	usleep(100000);
	munmap(memory, most);
	drop(round % 2 ? "2" : "3");
	usleep(400000);
}

static const struct {
	const char *name;
	void (*once)(long round);
} workers[] = {
	{ "forks", forks },	{ "files", files }, { "sockets", sockets },   { "modules", modules },
	{ "per_cpu", per_cpu }, { "names", names }, { "pressure", pressure },
};

#define WORKERS (sizeof(workers) / sizeof(workers[0]))

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

/* Whether there is such a worker; it has worked then. */
static int one(const char *name, long rounds)
{
	for (size_t i = 0; i < WORKERS; i++) {
		if (strcmp(workers[i].name, name))
			continue;
		for (long round = 0; round < rounds; round++)
			workers[i].once(round);
		return 1;
	}
	return 0;
}

int main(int argc, char **argv)
{
	double end = now() + (argc > 1 ? atof(argv[1]) : 0);
	volatile long *counts = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t children[WORKERS];
	int failed = 0;

	self = argv[0];
	if (argc == 3 && one(argv[1], atol(argv[2])))
		return 0;
	if (argc < 2 || atof(argv[1]) <= 0)
		return 0;
	module = argc > 2 ? argv[2] : NULL;
	for (size_t i = 0; i < WORKERS; i++) {
		children[i] = fork();
		if (children[i] == 0) {
			while (now() < end)
				workers[i].once(counts[i]++);
			_exit(0);
		}
	}
	while (now() < end)
		usleep(100000);
	printf("bustle:");
	for (size_t i = 0; i < WORKERS; i++) {
		int status, idle = !module && workers[i].once == modules;

		if (idle)
			kill(children[i], SIGKILL);
		waitpid(children[i], &status, 0);
		failed |= !idle && (status != 0 || counts[i] == 0);
		printf(" %s %ld%s", workers[i].name, counts[i], !idle && status ? " FAILED" : "");
	}
	printf("\n");
	return failed;
}

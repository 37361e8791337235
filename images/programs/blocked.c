// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * Makes system calls that sleep for ever with an object that nothing else in the kernel refers to, each in a process of
 * its own, and says how many do:  blocked
 *
 * Their objects are in use, so a leak detector must not report them; all that says so is in the frames of the sleeping
 * calls: in their local variables, many of them registers that some deeper function saved.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PIECES 64
#define FILES 400

static char piece[PIECES][16];
static struct iovec pieces[PIECES];
static int empty_pipe[2], full_pipe[2], full_socket[2];

/* The copied table of buffers. */
static int read_into_pieces(void)
{
	return readv(empty_pipe[0], pieces, PIECES);
}

static int write_from_pieces(void)
{
	return writev(full_pipe[1], pieces, PIECES);
}

static int send_pieces(void)
{
	struct msghdr message = { .msg_iov = pieces, .msg_iovlen = PIECES };

	return sendmsg(full_socket[0], &message, 0);
}

static int receive_pieces(void)
{
	struct msghdr message = { .msg_iov = pieces, .msg_iovlen = PIECES };
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_DGRAM, 0, pair))
		return -1;
	return recvmsg(pair[0], &message, 0);
}

/* The path's copy. */
static int open_fifo(void)
{
	const char *path = "/tmp/blocked.fifo";

	if (mkfifo(path, 0600) && errno != EEXIST)
		return -1;
	return open(path, O_RDONLY);
}

/* The bit maps, larger than what fits the stack. */
static int select_many(void)
{
	fd_set set[4];

	memset(set, 0, sizeof(set));
	FD_SET(empty_pipe[0], set);
	dup2(empty_pipe[0], FILES);
	return syscall(SYS_select, FILES + 1, set, NULL, NULL, NULL);
}

/* The table of files, larger than what fits the stack. */
static int poll_many(void)
{
	static struct pollfd files[FILES];

	for (int i = 0; i < FILES; i++)
		files[i] = (struct pollfd){ .fd = empty_pipe[0], .events = POLLIN };
	return poll(files, FILES, -1);
}

/* The operations, more than fit the stack. */
static int wait_for_semaphores(void)
{
	struct sembuf operations[PIECES + 36];
	int set = semget(IPC_PRIVATE, 100, 0600);

	if (set < 0)
		return -1;
	for (int i = 0; i < 100; i++)
		operations[i] = (struct sembuf){ .sem_num = i, .sem_op = -1 };
	return semop(set, operations, 100);
}

/* The message, while its queue is full. */
static int send_message(void)
{
	struct {
		long type;
		char text[6000];
	} message = { .type = 1 };
	int queue = msgget(IPC_PRIVATE, 0600);

	if (queue < 0)
		return -1;
	while (!msgsnd(queue, &message, sizeof(message.text), 0))
		;
	return -1;
}

static void *close_soon(void *file)
{
	usleep(300000);
	close(*(int *)file);
	pause();
	return NULL;
}

/* The file itself, which another thread closes meanwhile. */
static int read_closed(void)
{
	pthread_t other;
	int pair[2];

	if (pipe(pair) || pthread_create(&other, NULL, close_soon, &pair[0]))
		return -1;
	return read(pair[0], piece, 1);
}

static int (*const calls[])(void) = {
	read_into_pieces, write_from_pieces, send_pieces,	  receive_pieces, open_fifo,
	select_many,	  poll_many,	     wait_for_semaphores, send_message,	  read_closed,
};

#define CALLS ((int)(sizeof(calls) / sizeof(calls[0])))

static void fill(int file)
{
	char waste[4096] = { 0 };

	fcntl(file, F_SETFL, O_NONBLOCK);
	while (write(file, waste, sizeof(waste)) > 0)
		;
	while (write(file, waste, 1) > 0)
		;
	fcntl(file, F_SETFL, 0);
}

int main(void)
{
	int children[CALLS], asleep = 0;

	for (int i = 0; i < PIECES; i++)
		pieces[i] = (struct iovec){ .iov_base = piece[i], .iov_len = sizeof(piece[i]) };
	if (pipe(empty_pipe) || pipe(full_pipe) || socketpair(AF_UNIX, SOCK_STREAM, 0, full_socket)) {
		perror("blocked");
		return 1;
	}
	fill(full_pipe[1]);
	fill(full_socket[0]);
	for (int i = 0; i < CALLS; i++) {
		children[i] = fork();
		if (children[i] == 0) {
			calls[i]();
			_exit(1);
		}
	}
	sleep(1);
	for (int i = 0; i < CALLS; i++)
		asleep += children[i] > 0 && waitpid(children[i], NULL, WNOHANG) == 0;
	printf("%d of %d calls sleep\n", asleep, CALLS);
	fflush(stdout);
	pause();
	return 0;
}

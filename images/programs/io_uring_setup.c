// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * Sets up an io_uring in each of N processes, which then end:  io_uring_setup [N]
 *
 * On Linux 6.1.y before the fix of io_wq_create's error and exit paths (Debian's 6.1.0-47), every such process leaks one
 * CPU mask, an object of kmalloc-8.
 */
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int processes = argc > 1 ? atoi(argv[1]) : 1;

	for (int i = 0; i < processes; i++) {
		int status;
		pid_t child = fork();

		if (child == 0) {
			struct io_uring_params params;

			memset(&params, 0, sizeof(params));
			_exit(syscall(SYS_io_uring_setup, 8, &params) < 0);
		}
		if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
			perror("io_uring_setup");
			return 1;
		}
	}
	printf("%d processes set up an io_uring\n", processes);
	return 0;
}

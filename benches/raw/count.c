/*
 * Counts what a stretch of another process' thread costs in user space: instructions, system calls,
 * and calls of the functions that allocate. No clock is in it and no CPU counter, so that it counts
 * the same on an emulated CPU as on another one, whatever else runs.
 *
 *     count THREAD STRETCHES [ADDRESS...]
 *
 * It attaches to THREAD, says "ready", and single-steps it through STRETCHES stretches, each between
 * two calls of getppid(2). Of each it prints a line: instructions, system calls, and arrivals at one
 * of the ADDRESSes. The calls of getppid are not among them. Other threads run on and are not seen.
 *
 * x86-64 only: it looks for the instruction `syscall`. An instruction with a repeat prefix counts once.
 */
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>

#define ADDRESSES_MAX 16
/* What is known of addresses that were seen: one in each slot. */
#define SEEN_SLOTS 65536

static uint64_t seen[SEEN_SLOTS];
static char seen_is_syscall[SEEN_SLOTS];

static void die(const char *what)
{
	fprintf(stderr, "error: count.c: cannot %s: %s\n", what, strerror(errno));
	exit(1);
}

/* Lets it run on in a way, and waits until it stops; gives the signal that stopped it. */
static int resume(pid_t thread, int how, int signal)
{
	int status;

	if (ptrace(how, thread, NULL, (void *)(intptr_t)signal) < 0)
		die("let the thread run on");
	if (waitpid(thread, &status, __WALL) < 0)
		die("wait for the thread");
	if (!WIFSTOPPED(status)) {
		fprintf(stderr, "error: count.c: the thread ended within what was to be counted\n");
		exit(1);
	}
	return WSTOPSIG(status);
}

static struct user_regs_struct registers(pid_t thread)
{
	struct user_regs_struct registers;

	if (ptrace(PTRACE_GETREGS, thread, NULL, &registers) < 0)
		die("read registers");
	return registers;
}

/* A signal that stopped it and is its own to take; 0 for what tracing sends. */
static int own_signal(int signal)
{
	return (signal & 0x7f) == SIGTRAP ? 0 : signal;
}

/* Runs it through its next call of getppid. */
static void pass_mark(pid_t thread)
{
	int signal = 0, is_inside = 0;

	for (;;) {
		signal = resume(thread, PTRACE_SYSCALL, own_signal(signal));
		if (signal != (SIGTRAP | 0x80))
			continue;
		if (is_inside)
			return;
		/* At the beginning of a call the answer is still ENOSYS. */
		is_inside = registers(thread).orig_rax == SYS_getppid &&
			    (long)registers(thread).rax == -ENOSYS;
	}
}

static int is_syscall(pid_t thread, uint64_t at)
{
	uint64_t slot = at % SEEN_SLOTS;
	long word;

	if (seen[slot] == at)
		return seen_is_syscall[slot];
	errno = 0;
	word = ptrace(PTRACE_PEEKTEXT, thread, (void *)at, NULL);
	if (errno)
		die("read an instruction");
	seen[slot] = at;
	seen_is_syscall[slot] = (word & 0xffff) == 0x050f;
	return seen_is_syscall[slot];
}

static void count(pid_t thread, const uint64_t *addresses, int address_count)
{
	unsigned long instructions = 0, calls = 0, arrivals = 0;
	uint64_t before = 0;
	int signal = 0, i;

	for (;;) {
		struct user_regs_struct now = registers(thread);

		if (is_syscall(thread, now.rip)) {
			if (now.rax == SYS_getppid)
				break;
			calls++;
		}
		if (now.rip != before) {
			instructions++;
			for (i = 0; i < address_count; i++)
				arrivals += addresses[i] == now.rip;
		}
		before = now.rip;
		signal = resume(thread, PTRACE_SINGLESTEP, own_signal(signal));
	}
	printf("%lu %lu %lu\n", instructions, calls, arrivals);
	fflush(stdout);
	pass_mark(thread);
}

int main(int argument_count, char **arguments)
{
	uint64_t addresses[ADDRESSES_MAX];
	int address_count = argument_count - 3, status, i;
	long stretches;
	pid_t thread;

	if (address_count < 0 || address_count > ADDRESSES_MAX) {
		fprintf(stderr, "usage: count THREAD STRETCHES [ADDRESS...]\n");
		return 2;
	}
	thread = atoi(arguments[1]);
	stretches = atol(arguments[2]);
	for (i = 0; i < address_count; i++)
		addresses[i] = strtoull(arguments[3 + i], NULL, 0);
	if (ptrace(PTRACE_SEIZE, thread, NULL, (void *)PTRACE_O_TRACESYSGOOD) < 0)
		die("attach to the thread");
	if (ptrace(PTRACE_INTERRUPT, thread, NULL, NULL) < 0)
		die("stop the thread");
	if (waitpid(thread, &status, __WALL) < 0)
		die("wait for the thread");
	printf("ready\n");
	fflush(stdout);
	while (stretches--) {
		pass_mark(thread);
		count(thread, addresses, address_count);
	}
	if (ptrace(PTRACE_DETACH, thread, NULL, NULL) < 0)
		die("let the thread go");
	return 0;
}

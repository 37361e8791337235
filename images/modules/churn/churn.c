// SPDX-License-Identifier: GPL-2.0-only
/*
 * churn: allocates and frees one small object over and over, on as many CPUs as is said, and says how long that took.
 *
 *	insmod churn.ko pairs=20000 cpus=2
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/completion.h>
#include <linux/cpumask.h>
#include <linux/err.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/sched.h>
#include <linux/slab.h>

static unsigned int pairs = 20000;
module_param(pairs, uint, 0444);
MODULE_PARM_DESC(pairs, "how often, on each CPU");

static unsigned int cpus = 1;
module_param(cpus, uint, 0444);
MODULE_PARM_DESC(cpus, "on how many CPUs at once");

static struct task_struct *churn_tasks[8];
static DECLARE_COMPLETION(churn_done);
static atomic_t churn_left;

static int churn_thread(void *unused)
{
	unsigned int i;

	for (i = 0; i < pairs; i++) {
		void *object = kmalloc(64, GFP_KERNEL);

		barrier_data(object);
		kfree(object);
		if (i % 256 == 0)
			cond_resched();
	}
	if (atomic_dec_and_test(&churn_left))
		complete(&churn_done);
	while (!kthread_should_stop())
		schedule_timeout_interruptible(HZ / 100);
	return 0;
}

static void churn_stop(unsigned int count)
{
	while (count)
		kthread_stop(churn_tasks[--count]);
}

static int churn_init(void)
{
	unsigned int i, ready;
	u64 begin, end;

	if (!cpus || cpus > ARRAY_SIZE(churn_tasks) || cpus > num_online_cpus())
		return -EINVAL;
	for (ready = 0; ready < cpus; ready++) {
		struct task_struct *task = kthread_create(churn_thread, NULL, "churn/%u", ready);

		if (IS_ERR(task))
			break;
		kthread_bind(task, ready);
		churn_tasks[ready] = task;
	}
	if (ready < cpus) {
		churn_stop(ready);
		return -ENOMEM;
	}
	atomic_set(&churn_left, cpus);
	begin = ktime_get_ns();
	for (i = 0; i < cpus; i++)
		wake_up_process(churn_tasks[i]);
	wait_for_completion(&churn_done);
	end = ktime_get_ns();
	churn_stop(cpus);
	pr_info("%u pairs in %llu ns\n", pairs, end - begin);
	return 0;
}

static void churn_exit(void)
{
}

module_init(churn_init);
module_exit(churn_exit);
MODULE_DESCRIPTION("Measures kmalloc and kfree");
MODULE_AUTHOR("The kleak-vmm authors");
MODULE_LICENSE("GPL");

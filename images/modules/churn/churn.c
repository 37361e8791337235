// SPDX-License-Identifier: GPL-2.0-only
/*
 * churn: allocates and frees one small object over and over, on as many CPUs as is said, and says how long that took.
 *
 *	insmod churn.ko pairs=20000 cpus=2
 *
 * Or the first CPU allocates and frees in many ways, in an order that is the same whenever it does so; it allocates nothing
 * else, and all of it is freed at the end:
 *
 *	insmod churn.ko pairs=0 steps=2000
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/completion.h>
#include <linux/cpumask.h>
#include <linux/err.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/percpu.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/string.h>

static unsigned int pairs = 20000;
module_param(pairs, uint, 0444);
MODULE_PARM_DESC(pairs, "how often, on each CPU");

static unsigned int cpus = 1;
module_param(cpus, uint, 0444);
MODULE_PARM_DESC(cpus, "on how many CPUs at once");

static unsigned int steps;
module_param(steps, uint, 0444);
MODULE_PARM_DESC(steps, "in many ways, on the first CPU");

#define CHURN_PLACES 24
#define CHURN_BULK 5
/* One more than a detector may want to look at without stopping the kernel. */
#define CHURN_MOST_BULK 4097

enum churn_kind { CHURN_NONE, CHURN_KMALLOC, CHURN_CACHED, CHURN_PERCPU };

struct churn_place {
	void *object;
	enum churn_kind kind;
};

static struct churn_place churn_places[CHURN_PLACES];
static struct kmem_cache *churn_cache;
static void *churn_objects[CHURN_MOST_BULK];
static struct task_struct *churn_tasks[8];
static DECLARE_COMPLETION(churn_done);
static atomic_t churn_left;

/* Marsaglia's xorshift. */
static unsigned int churn_below(unsigned int end)
{
	static u64 random = 0x9e3779b97f4a7c15;

	random ^= random << 13;
	random ^= random >> 7;
	random ^= random << 17;
	return (random >> 11) % end;
}

static noinline __noclone void churn_fill(struct churn_place *place)
{
	size_t size = 1 + churn_below(8192 >> churn_below(12));

	place->kind = CHURN_KMALLOC;
	switch (churn_below(9)) {
	case 0:
		place->object = kmalloc(size, GFP_KERNEL);
		break;
	case 1:
		place->object = kzalloc(96, GFP_KERNEL);
		break;
	case 2:
		place->object = kmalloc_node(size, GFP_ATOMIC, 0);
		break;
	case 3:
		place->object = kmemdup("churn", 6, GFP_KERNEL);
		break;
	case 4:
		place->object = krealloc(kmalloc(size, GFP_KERNEL), 2 * size, GFP_KERNEL);
		break;
	case 5:
		place->object = kmalloc(12000 + size, GFP_KERNEL);
		break;
	case 6:
		place->object = (__force void *)__alloc_percpu(8 + size % 64, 8);
		place->kind = CHURN_PERCPU;
		break;
	default:
		place->object = kmem_cache_alloc(churn_cache, GFP_KERNEL);
		place->kind = CHURN_CACHED;
	}
	if (!place->object)
		place->kind = CHURN_NONE;
}

static noinline __noclone void churn_empty(struct churn_place *place)
{
	switch (place->kind) {
	case CHURN_NONE:
		break;
	case CHURN_KMALLOC:
		kfree(place->object);
		break;
	case CHURN_CACHED:
		kmem_cache_free(churn_cache, place->object);
		break;
	case CHURN_PERCPU:
		free_percpu((__force void __percpu *)place->object);
		break;
	}
	place->kind = CHURN_NONE;
}

static noinline __noclone void churn_bulk(unsigned int count)
{
	if (kmem_cache_alloc_bulk(churn_cache, GFP_KERNEL, count, churn_objects) == count)
		kmem_cache_free_bulk(churn_cache, count, churn_objects);
}

/* Mostly few at a time, now and then about as many as one record of a detector's has, or several. */
static unsigned int churn_bulk_count(void)
{
	static const unsigned int counts[] = { 1, 111, 112, 113, 300 };

	return churn_below(8) ? CHURN_BULK : counts[churn_below(ARRAY_SIZE(counts))];
}

static void churn_mix(void)
{
	unsigned int i;

	if (steps)
		churn_bulk(CHURN_MOST_BULK);
	for (i = 0; i < steps; i++) {
		struct churn_place *place = &churn_places[churn_below(CHURN_PLACES)];

		if (churn_below(16) == 0)
			churn_bulk(churn_bulk_count());
		else if (place->kind == CHURN_NONE)
			churn_fill(place);
		else
			churn_empty(place);
		cond_resched();
	}
	for (i = 0; i < CHURN_PLACES; i++)
		churn_empty(&churn_places[i]);
}

static int churn_thread(void *first)
{
	unsigned int i;

	if (first)
		churn_mix();
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
	churn_cache = kmem_cache_create("churn", 200, 0, 0, NULL);
	if (!churn_cache)
		return -ENOMEM;
	for (ready = 0; ready < cpus; ready++) {
		struct task_struct *task = kthread_create(churn_thread, ready ? NULL : churn_tasks, "churn/%u", ready);

		if (IS_ERR(task))
			break;
		kthread_bind(task, ready);
		churn_tasks[ready] = task;
	}
	if (ready < cpus) {
		churn_stop(ready);
		kmem_cache_destroy(churn_cache);
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
	kmem_cache_destroy(churn_cache);
}

module_init(churn_init);
module_exit(churn_exit);
MODULE_DESCRIPTION("Measures kmalloc and kfree");
MODULE_AUTHOR("The kleak-vmm authors");
MODULE_LICENSE("GPL");

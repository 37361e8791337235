// SPDX-License-Identifier: GPL-2.0-only
/*
 * storm: allocates and frees at random, from everywhere at once, forgets some of it on purpose, and tells the truth.
 *
 *	insmod storm.ko seed=1; cat /proc/storm
 *
 * Seven actors do so: three threads, a timer, a high-resolution timer, a tasklet and an RCU callback. Each has its own
 * random numbers, made from the seed, and its own places, of which a step fills an empty one or empties a full one. What
 * fills it: kmalloc in all its forms and sizes, caches that the threads create and destroy meanwhile (ordinary ones and
 * SLAB_TYPESAFE_BY_RCU), bulk calls, vmalloc, kvmalloc, per-CPU memory. What empties it: the matching functions, kfree_rcu
 * and call_rcu among them. Loading ends when all actors have done their steps.
 *
 * /proc/storm has a line for each object that is still there: "live" when the module has a plain pointer to it; "lost" when
 * it has an encoded one only, which no detector takes for one. Then its address (of per-CPU memory the cookie that
 * alloc_percpu returned), its size as kmemleak counts, and its kind:
 *
 *	live ffff8881023f4a00 192 slab
 *
 * A detector must report exactly what is lost. rmmod frees what lives; lost objects stay, and their caches.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/hrtimer.h>
#include <linux/interrupt.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/percpu.h>
#include <linux/preempt.h>
#include <linux/proc_fs.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/timer.h>
#include <linux/version.h>
#include <linux/vmalloc.h>

#define STORM_THREADS 3
#define STORM_ACTORS (STORM_THREADS + 4)
#define STORM_SLOTS 24
#define STORM_CACHES 2
#define STORM_BULK 6
/* Steps of an interrupt or a callback at a time. */
#define STORM_BURST 4
#define STORM_PERIOD_NS (700 * NSEC_PER_USEC)
#define STORM_LARGEST_SLAB 8192
#define STORM_LARGEST (48 << 10)
/* No detector takes an address with this in it for one. */
#define STORM_KEY 0x5a5aa5a5c3c33c3cUL

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)
#define storm_timer_stop(timer) del_timer_sync(timer)
#else
#define storm_timer_stop(timer) timer_delete_sync(timer)
#endif

#ifndef kvfree_rcu_mightsleep
#define kvfree_rcu_mightsleep(object) kvfree_rcu(object)
#endif

static unsigned long seed = 1;
module_param(seed, ulong, 0444);
MODULE_PARM_DESC(seed, "of all random numbers");

static unsigned int steps = 400;
module_param(steps, uint, 0444);
MODULE_PARM_DESC(steps, "of each actor");

static unsigned int lose = 6;
module_param(lose, uint, 0444);
MODULE_PARM_DESC(lose, "at most so many objects of each actor are lost");

enum storm_kind { STORM_NONE, STORM_SLAB, STORM_CACHE, STORM_LARGE, STORM_VMALLOC, STORM_PERCPU };

static const char *const storm_kinds[] = { "none", "slab", "slab", "large", "vmalloc", "percpu" };

/* What is first in every object that is freed late. */
struct storm_object {
	struct rcu_head rcu;
};

struct storm_cache {
	struct kmem_cache *cache;
	unsigned int size;
	unsigned int objects;
	bool lost;
};

/**
 * struct storm_slot - the place of one object
 * @hidden: its address, encoded
 * @size: as kmemleak counts
 * @cache: number of the actor's cache that it is from, if it is
 * @lost: nobody has a plain pointer to it any more
 */
struct storm_slot {
	unsigned long hidden;
	unsigned int size;
	enum storm_kind kind;
	unsigned char cache;
	bool lost;
};

/**
 * struct storm_actor - who allocates
 * @kept: plain pointers, where @slots has encoded ones
 * @left: steps still to be done
 * @losses: objects lost so far
 * @sleeps: it may
 */
struct storm_actor {
	void *kept[STORM_SLOTS];
	struct storm_slot slots[STORM_SLOTS];
	struct storm_cache caches[STORM_CACHES];
	u64 random;
	unsigned int left;
	unsigned int losses;
	bool sleeps;
	struct completion done;
};

static struct storm_actor storm_actors[STORM_ACTORS];

/* Marsaglia's xorshift. */
static u64 storm_random(struct storm_actor *actor)
{
	actor->random ^= actor->random << 13;
	actor->random ^= actor->random >> 7;
	actor->random ^= actor->random << 17;
	return actor->random >> 11;
}

static unsigned int storm_below(struct storm_actor *actor, unsigned int end)
{
	return storm_random(actor) % end;
}

/* Small sizes are as frequent as large ones. */
static size_t storm_size(struct storm_actor *actor, size_t end)
{
	size_t most = end >> storm_below(actor, ilog2(end));

	return 1 + storm_below(actor, most);
}

/* What the cache has in which kmalloc of so many bytes ends. */
static unsigned int storm_bucket(size_t size)
{
	if (size <= 8)
		return 8;
	if (size > 64 && size <= 96)
		return 96;
	if (size > 128 && size <= 192)
		return 192;
	return roundup_pow_of_two(size);
}

static gfp_t storm_gfp(struct storm_actor *actor)
{
	return (actor->sleeps ? GFP_KERNEL : GFP_ATOMIC) | __GFP_NOWARN | __GFP_NORETRY;
}

/* Bulk calls want interrupts enabled. */
static bool storm_bulk_allowed(void)
{
	return !in_hardirq();
}

/* Overwrites the part of the stack below the caller. */
static noinline __noclone void storm_scrub(unsigned int depth)
{
	unsigned long waste[64];

	memset(waste, 0, sizeof(waste));
	barrier_data(waste);
	if (depth)
		storm_scrub(depth - 1);
	/* No tail call: every level is to have its own frame. */
	barrier_data(waste);
}

/* --- filling a place --- */

static void storm_keep(struct storm_actor *actor, unsigned int at, const void *object, enum storm_kind kind,
		       size_t size)
{
	struct storm_slot *slot = &actor->slots[at];

	if (!object)
		return;
	slot->hidden = (unsigned long)object ^ STORM_KEY;
	slot->kind = kind;
	slot->size = size;
	slot->lost = false;
	WRITE_ONCE(actor->kept[at], (void *)object);
}

static noinline __noclone void storm_kmalloc(struct storm_actor *actor, unsigned int at, size_t end)
{
	static const char text[64] = "storm";
	size_t size = storm_size(actor, end), more = size + storm_below(actor, 128);
	gfp_t gfp = storm_gfp(actor);
	void *object, *grown;

	if (size > STORM_LARGEST_SLAB) {
		object = storm_below(actor, 2) ? kmalloc(size, gfp) : kmalloc_node(size, gfp | __GFP_ZERO, 0);
		storm_keep(actor, at, object, STORM_LARGE, size);
		return;
	}
	switch (storm_below(actor, 6)) {
	case 0:
		object = kzalloc(size, gfp);
		break;
	case 1:
		object = kmalloc_node(size, gfp, 0);
		break;
	case 2:
		size = min(size, sizeof(text));
		object = kmemdup(text, size, gfp);
		break;
	case 3:
		size = 72;
		object = kzalloc(72, gfp);
		break;
	case 4:
		object = kmalloc(size, gfp);
		if (!object || more > STORM_LARGEST_SLAB)
			break;
		grown = krealloc(object, more, gfp);
		if (grown) {
			/* It grows where it is as long as its cache's objects are large enough. */
			size = max_t(size_t, storm_bucket(size), more);
			object = grown;
		}
		break;
	default:
		object = kmalloc_array(1, size, gfp);
	}
	storm_keep(actor, at, object, STORM_SLAB, storm_bucket(size));
}

static noinline __noclone void storm_vmalloc(struct storm_actor *actor, unsigned int at)
{
	size_t size = storm_size(actor, STORM_LARGEST);
	void *object;

	if (storm_below(actor, 2)) {
		object = storm_below(actor, 2) ? vmalloc(size) : vzalloc(size);
		storm_keep(actor, at, object, STORM_VMALLOC, PAGE_ALIGN(size));
		return;
	}
	object = kvmalloc(size, GFP_KERNEL);
	if (is_vmalloc_addr(object))
		storm_keep(actor, at, object, STORM_VMALLOC, PAGE_ALIGN(size));
	else if (size > STORM_LARGEST_SLAB)
		storm_keep(actor, at, object, STORM_LARGE, size);
	else
		storm_keep(actor, at, object, STORM_SLAB, storm_bucket(size));
}

static noinline __noclone void storm_percpu(struct storm_actor *actor, unsigned int at)
{
	size_t size = 8 * (1 + storm_below(actor, 16));

	storm_keep(actor, at, (__force void *)__alloc_percpu_gfp(size, 8, storm_gfp(actor)), STORM_PERCPU, size);
}

static void storm_keep_cached(struct storm_actor *actor, unsigned int at, unsigned int number, void *object)
{
	actor->slots[at].cache = number;
	storm_keep(actor, at, object, STORM_CACHE, actor->caches[number].size);
	actor->caches[number].objects += object != NULL;
}

static noinline __noclone void storm_cached(struct storm_actor *actor, unsigned int at)
{
	unsigned int number = storm_below(actor, STORM_CACHES), i, got;
	struct kmem_cache *cache = actor->caches[number].cache;
	gfp_t gfp = storm_gfp(actor);
	void *objects[STORM_BULK];

	if (!cache)
		return;
	switch (storm_below(actor, storm_bulk_allowed() ? 4 : 3)) {
	case 0:
		storm_keep_cached(actor, at, number, kmem_cache_alloc(cache, gfp));
		break;
	case 1:
		storm_keep_cached(actor, at, number, kmem_cache_alloc_node(cache, gfp, 0));
		break;
	case 2:
		storm_keep_cached(actor, at, number, kmem_cache_alloc_lru(cache, NULL, gfp));
		break;
	default:
		got = kmem_cache_alloc_bulk(cache, gfp, STORM_BULK, objects);
		for (i = 0; i < STORM_SLOTS && got; i++)
			if (!actor->slots[i].hidden)
				storm_keep_cached(actor, i, number, objects[--got]);
		if (got)
			kmem_cache_free_bulk(cache, got, objects);
	}
	memzero_explicit(objects, sizeof(objects));
}

static void storm_fill(struct storm_actor *actor, unsigned int at)
{
	switch (storm_below(actor, actor->sleeps ? 10 : 8)) {
	case 0 ... 2:
		storm_kmalloc(actor, at, STORM_LARGEST_SLAB);
		break;
	case 3:
		storm_kmalloc(actor, at, STORM_LARGEST);
		break;
	case 4 ... 6:
		storm_cached(actor, at);
		break;
	case 7:
		storm_percpu(actor, at);
		break;
	default:
		storm_vmalloc(actor, at);
	}
}

/* --- emptying it --- */

static void *storm_take(struct storm_actor *actor, unsigned int at)
{
	void *object = (void *)(actor->slots[at].hidden ^ STORM_KEY);

	actor->slots[at].hidden = 0;
	WRITE_ONCE(actor->kept[at], NULL);
	return object;
}

static void storm_free_late(struct rcu_head *head)
{
	kfree(container_of(head, struct storm_object, rcu));
}

static noinline __noclone void storm_free_bulk(struct storm_actor *actor)
{
	void *objects[STORM_BULK];
	unsigned int i, got = 0;

	for (i = 0; i < STORM_SLOTS && got < STORM_BULK; i++)
		if (actor->slots[i].hidden && !actor->slots[i].lost && actor->slots[i].kind == STORM_SLAB)
			objects[got++] = storm_take(actor, i);
	if (got)
		kfree_bulk(got, objects);
	memzero_explicit(objects, sizeof(objects));
}

static noinline __noclone void storm_kfree(struct storm_actor *actor, unsigned int at)
{
	bool late = actor->slots[at].size >= sizeof(struct storm_object);
	struct storm_object *object;

	switch (storm_below(actor, storm_bulk_allowed() ? 8 : 7)) {
	case 7:
		storm_free_bulk(actor);
		break;
	case 1:
		kfree_sensitive(storm_take(actor, at));
		break;
	case 2:
		kvfree(storm_take(actor, at));
		break;
	case 3:
		object = storm_take(actor, at);
		if (late)
			call_rcu(&object->rcu, storm_free_late);
		else
			kfree(object);
		break;
	case 4:
		object = storm_take(actor, at);
		if (late)
			kfree_rcu(object, rcu);
		else
			kfree(object);
		break;
	case 5:
		object = storm_take(actor, at);
		if (actor->sleeps)
			kvfree_rcu_mightsleep(object);
		else
			kfree(object);
		break;
	default:
		kfree(storm_take(actor, at));
	}
}

static noinline __noclone void storm_free_cached(struct storm_actor *actor, unsigned int at)
{
	unsigned int number = actor->slots[at].cache, i, got = 0;
	struct storm_cache *cache = &actor->caches[number];
	void *objects[STORM_BULK];

	if (storm_below(actor, 3) || !storm_bulk_allowed()) {
		cache->objects--;
		kmem_cache_free(cache->cache, storm_take(actor, at));
		return;
	}
	for (i = 0; i < STORM_SLOTS && got < STORM_BULK; i++)
		if (actor->slots[i].hidden && !actor->slots[i].lost && actor->slots[i].kind == STORM_CACHE &&
		    actor->slots[i].cache == number)
			objects[got++] = storm_take(actor, i);
	cache->objects -= got;
	kmem_cache_free_bulk(cache->cache, got, objects);
	memzero_explicit(objects, sizeof(objects));
}

static void storm_empty(struct storm_actor *actor, unsigned int at)
{
	struct storm_object *object;

	switch (actor->slots[at].kind) {
	case STORM_NONE:
		break;
	case STORM_SLAB:
	case STORM_LARGE:
		storm_kfree(actor, at);
		break;
	case STORM_CACHE:
		storm_free_cached(actor, at);
		break;
	case STORM_VMALLOC:
		if (storm_below(actor, 2)) {
			vfree(storm_take(actor, at));
			break;
		}
		object = storm_take(actor, at);
		kvfree_rcu(object, rcu);
		break;
	case STORM_PERCPU:
		free_percpu((__force void __percpu *)storm_take(actor, at));
		break;
	}
}

static void storm_forget(struct storm_actor *actor, unsigned int at)
{
	struct storm_slot *slot = &actor->slots[at];

	if (slot->kind == STORM_CACHE)
		actor->caches[slot->cache].lost = true;
	slot->lost = true;
	actor->losses++;
	WRITE_ONCE(actor->kept[at], NULL);
}

/* --- actors --- */

/* A usercopy region keeps a cache from being merged with another. */
static void storm_create(struct storm_actor *actor, unsigned int number)
{
	struct storm_cache *cache = &actor->caches[number];
	char name[48];

	snprintf(name, sizeof(name), "storm-%llx-%u", ktime_get_ns(), (unsigned int)(actor - storm_actors));
	cache->size = 8 * (3 + storm_below(actor, 120));
	cache->cache = kmem_cache_create_usercopy(name, cache->size, 0, number ? SLAB_TYPESAFE_BY_RCU : 0, 0,
						  cache->size, NULL);
}

static void storm_change_cache(struct storm_actor *actor, unsigned int number)
{
	struct storm_cache *cache = &actor->caches[number];

	if (!cache->cache) {
		storm_create(actor, number);
	} else if (!cache->objects && !cache->lost) {
		kmem_cache_destroy(cache->cache);
		cache->cache = NULL;
	}
}

static void storm_step(struct storm_actor *actor)
{
	unsigned int at = storm_below(actor, STORM_SLOTS);

	if (!actor->slots[at].hidden)
		storm_fill(actor, at);
	else if (actor->slots[at].lost)
		return;
	else if (actor->losses < lose && !storm_below(actor, 12))
		storm_forget(actor, at);
	else
		storm_empty(actor, at);
}

/* Some steps; true when more are left. */
static bool storm_burst(struct storm_actor *actor)
{
	unsigned int i;

	if (!actor->left)
		return false;
	for (i = 0; i < STORM_BURST && actor->left; i++, actor->left--)
		storm_step(actor);
	storm_scrub(3);
	if (actor->left)
		return true;
	complete(&actor->done);
	return false;
}

static int storm_thread(void *data)
{
	struct storm_actor *actor = data;

	while (actor->left) {
		storm_step(actor);
		actor->left--;
		if (!storm_below(actor, 32))
			storm_change_cache(actor, storm_below(actor, STORM_CACHES));
		if (storm_below(actor, 64))
			cond_resched();
		else
			usleep_range(100, 3000);
	}
	storm_scrub(13);
	complete(&actor->done);
	for (;;) {
		set_current_state(TASK_INTERRUPTIBLE);
		if (kthread_should_stop())
			break;
		schedule();
	}
	__set_current_state(TASK_RUNNING);
	return 0;
}

#define STORM_TIMER (&storm_actors[STORM_THREADS])
#define STORM_HRTIMER (&storm_actors[STORM_THREADS + 1])
#define STORM_TASKLET (&storm_actors[STORM_THREADS + 2])
#define STORM_RCU (&storm_actors[STORM_THREADS + 3])

static void storm_tasklet(struct tasklet_struct *unused)
{
	storm_burst(STORM_TASKLET);
}

static DECLARE_TASKLET(storm_tasklet_struct, storm_tasklet);

static void storm_timer(struct timer_list *timer)
{
	bool more = storm_burst(STORM_TIMER);

	if (STORM_TASKLET->left) {
		tasklet_schedule(&storm_tasklet_struct);
		more = true;
	}
	if (more)
		mod_timer(timer, jiffies + 1);
}

static DEFINE_TIMER(storm_timer_struct, storm_timer);

static enum hrtimer_restart storm_hrtimer(struct hrtimer *timer)
{
	if (!storm_burst(STORM_HRTIMER))
		return HRTIMER_NORESTART;
	hrtimer_forward_now(timer, ns_to_ktime(STORM_PERIOD_NS));
	return HRTIMER_RESTART;
}

static struct hrtimer storm_hrtimer_struct;

static void storm_callback(struct rcu_head *head)
{
	if (storm_burst(STORM_RCU))
		call_rcu(head, storm_callback);
}

static struct rcu_head storm_rcu;
static struct task_struct *storm_tasks[STORM_THREADS];

static void storm_run(void)
{
	unsigned int i;

	for (i = 0; i < STORM_THREADS; i++) {
		storm_tasks[i] = kthread_run(storm_thread, &storm_actors[i], "storm/%u", i);
		if (IS_ERR(storm_tasks[i])) {
			storm_tasks[i] = NULL;
			complete(&storm_actors[i].done);
		}
	}
	mod_timer(&storm_timer_struct, jiffies + 1);
	hrtimer_start(&storm_hrtimer_struct, ns_to_ktime(STORM_PERIOD_NS), HRTIMER_MODE_REL);
	call_rcu(&storm_rcu, storm_callback);
	for (i = 0; i < STORM_ACTORS; i++)
		wait_for_completion(&storm_actors[i].done);
	for (i = 0; i < STORM_THREADS; i++)
		if (storm_tasks[i])
			kthread_stop(storm_tasks[i]);
	memset(storm_tasks, 0, sizeof(storm_tasks));
	hrtimer_cancel(&storm_hrtimer_struct);
	storm_timer_stop(&storm_timer_struct);
	tasklet_kill(&storm_tasklet_struct);
	rcu_barrier();
}

/* --- the truth --- */

static int storm_show(struct seq_file *file, void *unused)
{
	unsigned int a, i;

	for (a = 0; a < STORM_ACTORS; a++) {
		for (i = 0; i < STORM_SLOTS; i++) {
			struct storm_slot *slot = &storm_actors[a].slots[i];

			if (slot->hidden)
				seq_printf(file, "%s %lx %u %s\n", slot->lost ? "lost" : "live",
					   slot->hidden ^ STORM_KEY, slot->size, storm_kinds[slot->kind]);
		}
	}
	return 0;
}

static int storm_init(void)
{
	unsigned int i, number;

	if (!proc_create_single("storm", 0400, NULL, storm_show))
		return -ENOMEM;
	hrtimer_init(&storm_hrtimer_struct, CLOCK_MONOTONIC, HRTIMER_MODE_REL);
	storm_hrtimer_struct.function = storm_hrtimer;
	for (i = 0; i < STORM_ACTORS; i++) {
		struct storm_actor *actor = &storm_actors[i];

		/* Odd numbers: a state of zero would stay zero. */
		actor->random = (seed * STORM_ACTORS + i) * 0x9e3779b97f4a7c15UL | 1;
		actor->left = steps;
		actor->sleeps = i < STORM_THREADS;
		init_completion(&actor->done);
		for (number = 0; number < STORM_CACHES; number++)
			storm_create(actor, number);
	}
	storm_run();
	return 0;
}

static void storm_exit(void)
{
	unsigned int a, i;

	remove_proc_entry("storm", NULL);
	for (a = 0; a < STORM_ACTORS; a++) {
		struct storm_actor *actor = &storm_actors[a];

		actor->sleeps = true;
		for (i = 0; i < STORM_SLOTS; i++)
			if (actor->slots[i].hidden && !actor->slots[i].lost)
				storm_empty(actor, i);
		/* One that chose others to free did not free its own. */
		for (i = 0; i < STORM_SLOTS; i++)
			while (actor->slots[i].hidden && !actor->slots[i].lost)
				storm_empty(actor, i);
		for (i = 0; i < STORM_CACHES; i++)
			if (actor->caches[i].cache && !actor->caches[i].lost)
				kmem_cache_destroy(actor->caches[i].cache);
	}
	rcu_barrier();
}

module_init(storm_init);
module_exit(storm_exit);
MODULE_DESCRIPTION("Allocates and frees at random, and says what is lost");
MODULE_AUTHOR("The kleak-vmm authors");
MODULE_LICENSE("GPL");

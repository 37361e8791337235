// SPDX-License-Identifier: GPL-2.0-only
/*
 * leaky: plants known memory leaks, and things that look like leaks and are none.
 *
 *	insmod leaky.ko case=list,stack		(also repeated: case=list case=stack; case=all; case=demo)
 *
 * Every case runs in a short-lived thread named leaky/CASE, which overwrites its stack before it ends, so that no
 * forgotten copy of a pointer keeps a lost object alive. The kernel keeps some itself: each of its threads has the address of
 * the note (64 bytes) that told it what to run on its stack for ever, and the next object of that size takes its
 * place. kmemleak misses that object; a detector that knows which saved registers are dead does not. The objects of a case are allocated in the function
 * leaky_CASE: that name is in their backtraces. They begin with the case's name, for the reader of a hex dump.
 * Lost objects outlive rmmod; everything else is freed by it.
 *
 * What a leak detector must report. Sizes are those of the slab object, as kmemleak counts them. "direct": nothing
 * lost points to it; "indirect": only reachable from another lost object; "cycle": lost objects that reach
 * one another. images/src/leaky.rs has the same table for tests, and a test that the two agree.
 *
 *   case          reported                                          what it is
 *   kmalloc       8, 64, 1024, 4096, 65536 direct                   kmalloc of 8, 64, 1000, 4096 bytes and 64 KiB
 *   forms         16, 32, 96, 128, 64, 512, 256, 2048, 12288, 200, 200 direct
 *                                                                   each other way in: sizes only known at run time,
 *                                                                   kmalloc_node, kmemdup, kstrdup, krealloc,
 *                                                                   kcalloc, kvmalloc, kmem_cache_alloc_node, _lru
 *   vmalloc       1048576 direct                                    vmalloc of 1 MiB
 *   cache         200, 200 direct                                   objects of a cache of its own
 *   bulk          200, 200, 200, 200 direct                         eight allocated in bulk, four freed in bulk
 *   softirq       192 direct                                        allocated in a timer's softirq
 *   hidden        512 direct                                        the only pointer is stored XORed
 *   stale         256 direct                                        the only pointer is in a freed object
 *   typed         192 direct                                        a number in a live object looks like the only pointer
 *   list          64, 96, 96, 96, 96 cycle                          a list_head list, its head lost
 *   cycle         128, 128 cycle                                    two that point to each other
 *   tree          96 direct, 96, 96, 96, 96, 96, 96 indirect        a tree of seven, its root lost
 *   chain         64 direct, 64, 64, 64 indirect                    a singly linked list, its head lost
 *   indirect      192 direct, 655360 indirect                       a vmalloc area only a lost object points to
 *   vmap_lost     327680 direct                                     a further address of pages, by vmap
 *   map_ram_lost  8192, 327680 direct                               the same by vm_map_ram, of few pages and of many
 *   percpu_lost   96 direct                                         a per-CPU allocation, 96 bytes for each CPU
 *   pages_lost    4096, 16384, 32768, 12288, 4096, 4096, 4096, 4096 direct with --track pages
 *                                                                   one page, four, eight as one compound, three
 *                                                                   exactly, four of six allocated in bulk
 *   pages_listed  64, 4096, 4096, 4096 cycle with --track pages     pages on a list through their struct pages, its
 *                                                                   head lost
 *   pages_inside  4096 direct, 96 indirect with --track pages       a lost page has the only pointer
 *   device_lost   327680 direct with --track ioremap                device memory, mapped
 *   unload        32, 32, 32 direct after rmmod                     three in an array of the module
 *   register      nothing                                           a spinning thread has it in a CPU register
 *   stack         nothing                                           a sleeping thread has it on its stack
 *   percpu        nothing                                           in per-CPU variables
 *   percpu_alloc  nothing                                           in a per-CPU allocation
 *   interior      nothing                                           the only pointer is to its middle
 *   timer         nothing                                           it contains a pending timer
 *   rcu           nothing                                           freed late, by kfree_rcu and call_rcu
 *   page          nothing                                           in a page from alloc_page
 *   pages         nothing                                           pages kept by address, by struct page, in a list,
 *                                                                   and by what is in the middle of several
 *   freed         nothing                                           freed properly, whichever way it came
 *
 * kmemleak disagrees on "page", which it cannot look into, on "typed", as it takes every word for a pointer, and before 6.12
 * on "percpu_lost", which it does not report.
 * Lost pages and device memory it does not know, nor what vmap and vm_map_ram return.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/completion.h>
#include <linux/cpumask.h>
#include <linux/fs.h>
#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/net.h>
#include <linux/percpu.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/timer.h>
#include <linux/version.h>
#include <linux/vmalloc.h>
#include <net/sock.h>

/* Kept as functions of their own, with the very name the table promises. */
#define LEAKY static noinline __noclone

#define LEAKY_CACHE_SIZE 200
#define LEAKY_BULK 8
/*
 * Large, so that they do not take the address of an area that was there before, such as a thread's stack: a forgotten
 * pointer to that would be one to this.
 */
#define LEAKY_AREA (1024 << 10)
#define LEAKY_SMALLER_AREA (640 << 10)

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)
#define leaky_timer_stop(timer) del_timer_sync(timer)
#else
#define leaky_timer_stop(timer) timer_delete_sync(timer)
#endif

/**
 * struct leaky_case - one line of the table above
 * @name: as in case=NAME
 * @expect: how many objects are to be reported while the module is loaded, by a detector that knows neither pages nor
 *	device memory
 * @demo: part of case=demo
 * @run: plants it; 0 or a negative errno
 * @undo: frees what is not a leak, at rmmod; may be NULL
 */
struct leaky_case {
	const char *name;
	unsigned int expect;
	bool demo;
	int (*run)(void);
	void (*undo)(void);
};

/* A pointer that no detector takes for one: for what the module itself must find again. */
static inline unsigned long leaky_hide(const void *object)
{
	return ~(unsigned long)object;
}

static inline void *leaky_show(unsigned long hidden)
{
	return (void *)~hidden;
}

/* Labels the object and makes the compiler believe that it is needed. */
static __always_inline int leaky_mark(void *object, size_t size, const char *name)
{
	if (!object)
		return -ENOMEM;
	strscpy(object, name, size);
	barrier_data(object);
	return 0;
}

/* Overwrites the part of the stack below the caller that allocators used. */
static noinline __noclone void leaky_scrub(unsigned int depth)
{
	unsigned long waste[64];

	memset(waste, 0, sizeof(waste));
	barrier_data(waste);
	if (depth)
		leaky_scrub(depth - 1);
	/* No tail call: every level is to have its own frame. */
	barrier_data(waste);
}

#define LEAKY_SCRUB_DEPTH 13

/* Sizes the compiler cannot know take other functions of the allocator. */
static noinline __noclone size_t leaky_size(size_t size)
{
	OPTIMIZER_HIDE_VAR(size);
	return size;
}

/*
 * A cache of our own. It is never destroyed, as it has lost objects in it; so each load of the module needs a
 * fresh name. A usercopy region keeps it from being merged with another cache of the kernel.
 */
static struct kmem_cache *leaky_cache_get(void)
{
	static struct kmem_cache *cache;
	char name[32];

	if (!cache) {
		snprintf(name, sizeof(name), "leaky-%llx", ktime_get_ns());
		cache = kmem_cache_create_usercopy(name, LEAKY_CACHE_SIZE, 0, 0, 0, LEAKY_CACHE_SIZE, NULL);
	}
	return cache;
}

/* --- must be reported --- */

LEAKY int leaky_kmalloc(void)
{
	int error = 0;

	error |= leaky_mark(kzalloc(8, GFP_KERNEL), 8, "kmalloc");
	error |= leaky_mark(kzalloc(64, GFP_KERNEL), 64, "kmalloc of 64 bytes");
	error |= leaky_mark(kzalloc(1000, GFP_KERNEL), 1000, "kmalloc of 1000 bytes");
	error |= leaky_mark(kzalloc(4096, GFP_KERNEL), 4096, "kmalloc of 4096 bytes");
	error |= leaky_mark(kzalloc(65536, GFP_KERNEL), 65536, "kmalloc of 64 KiB");
	return error ? -ENOMEM : 0;
}

LEAKY int leaky_forms(void)
{
	static const char text[128] = "kmemdup";
	struct kmem_cache *cache = leaky_cache_get();
	void *grown;
	int error = 0;

	if (!cache)
		return -ENOMEM;
	error |= leaky_mark(kzalloc(leaky_size(16), GFP_KERNEL), 16, "kmalloc");
	error |= leaky_mark(kzalloc_node(32, GFP_KERNEL, 0), 32, "kmalloc_node");
	error |= leaky_mark(kzalloc_node(leaky_size(96), GFP_KERNEL, 0), 96, "kmalloc_node");
	error |= leaky_mark(kmemdup(text, sizeof(text), GFP_KERNEL), 128, "kmemdup");
	error |= leaky_mark(kstrdup("kstrdup of a text that has its forty bytes", GFP_KERNEL), 40, "kstrdup");
	grown = kzalloc(192, GFP_KERNEL);
	error |= leaky_mark(grown, 192, "krealloc");
	error |= leaky_mark(krealloc(grown, 512, GFP_KERNEL | __GFP_ZERO), 512, "krealloc");
	error |= leaky_mark(kcalloc(3, 80, GFP_KERNEL), 240, "kcalloc");
	error |= leaky_mark(kvzalloc(2048, GFP_KERNEL), 2048, "kvmalloc");
	error |= leaky_mark(kzalloc_node(leaky_size(12288), GFP_KERNEL, 0), 12288, "large kmalloc_node");
	error |= leaky_mark(kmem_cache_alloc_node(cache, GFP_KERNEL | __GFP_ZERO, 0), LEAKY_CACHE_SIZE,
			    "kmem_cache_alloc_node");
	error |= leaky_mark(kmem_cache_alloc_lru(cache, NULL, GFP_KERNEL | __GFP_ZERO), LEAKY_CACHE_SIZE,
			    "kmem_cache_alloc_lru");
	return error ? -ENOMEM : 0;
}

LEAKY int leaky_vmalloc(void)
{
	return leaky_mark(vzalloc(LEAKY_AREA), LEAKY_AREA, "vmalloc");
}

LEAKY int leaky_cache(void)
{
	struct kmem_cache *cache = leaky_cache_get();
	int error = 0;

	if (!cache)
		return -ENOMEM;
	error |= leaky_mark(kmem_cache_zalloc(cache, GFP_KERNEL), LEAKY_CACHE_SIZE, "cache");
	error |= leaky_mark(kmem_cache_zalloc(cache, GFP_KERNEL), LEAKY_CACHE_SIZE, "cache");
	return error ? -ENOMEM : 0;
}

LEAKY int leaky_bulk(void)
{
	struct kmem_cache *cache = leaky_cache_get();
	void *objects[LEAKY_BULK];
	unsigned int i;

	if (!cache || kmem_cache_alloc_bulk(cache, GFP_KERNEL | __GFP_ZERO, LEAKY_BULK, objects) != LEAKY_BULK)
		return -ENOMEM;
	for (i = 0; i < LEAKY_BULK; i++)
		leaky_mark(objects[i], LEAKY_CACHE_SIZE, "bulk");
	kmem_cache_free_bulk(cache, LEAKY_BULK / 2, objects);
	return 0;
}

static DECLARE_COMPLETION(leaky_softirq_done);
static int leaky_softirq_error;

/* The timer's function, not the case's own: it is the one in the backtrace. */
LEAKY void leaky_softirq(struct timer_list *unused)
{
	leaky_softirq_error = leaky_mark(kzalloc(160, GFP_ATOMIC), 160, "softirq");
	/* Interrupt stacks are small, but never reused as deep as a thread's. */
	leaky_scrub(LEAKY_SCRUB_DEPTH / 2);
	complete(&leaky_softirq_done);
}

static DEFINE_TIMER(leaky_softirq_timer, leaky_softirq);

static int leaky_softirq_start(void)
{
	mod_timer(&leaky_softirq_timer, jiffies + 1);
	wait_for_completion(&leaky_softirq_done);
	leaky_timer_stop(&leaky_softirq_timer);
	return leaky_softirq_error;
}

static unsigned long leaky_hidden_word;

LEAKY int leaky_hidden(void)
{
	void *object = kzalloc(400, GFP_KERNEL);

	WRITE_ONCE(leaky_hidden_word, leaky_hide(object));
	return leaky_mark(object, 400, "hidden");
}

struct leaky_holder {
	char name[16];
	void *other;
};

LEAKY int leaky_stale(void)
{
	struct leaky_holder *holder = kzalloc(1500, GFP_KERNEL);
	void *lost = kzalloc(256, GFP_KERNEL);

	if (!holder || !lost)
		return -ENOMEM;
	leaky_mark(lost, 256, "stale");
	leaky_mark(holder, sizeof(holder->name), "stale");
	WRITE_ONCE(holder->other, lost);
	kfree(holder);
	return 0;
}

static struct socket *leaky_typed_socket;

/* The size of the file that a socket is: a number, whatever it looks like. */
LEAKY int leaky_typed(void)
{
	char *lost = kzalloc(150, GFP_KERNEL);

	leaky_typed_socket = sock_alloc();
	if (!leaky_typed_socket || leaky_mark(lost, 150, "typed"))
		return -ENOMEM;
	i_size_write(SOCK_INODE(leaky_typed_socket), (loff_t)(unsigned long)lost);
	return 0;
}

static void leaky_typed_undo(void)
{
	if (!leaky_typed_socket)
		return;
	i_size_write(SOCK_INODE(leaky_typed_socket), 0);
	sock_release(leaky_typed_socket);
}

struct leaky_node {
	char name[16];
	struct list_head list;
	char padding[48];
};

LEAKY int leaky_list(void)
{
	struct leaky_head {
		char name[40];
		struct list_head list;
	} *head = kzalloc(sizeof(*head), GFP_KERNEL);
	struct leaky_node *node;
	unsigned int i;

	if (leaky_mark(head, sizeof(head->name), "list, its head"))
		return -ENOMEM;
	INIT_LIST_HEAD(&head->list);
	for (i = 0; i < 4; i++) {
		node = kzalloc(sizeof(*node), GFP_KERNEL);
		if (leaky_mark(node, sizeof(node->name), "list"))
			return -ENOMEM;
		list_add_tail(&node->list, &head->list);
	}
	return 0;
}

struct leaky_pair {
	char name[112];
	struct leaky_pair *other;
};

LEAKY int leaky_cycle(void)
{
	struct leaky_pair *one = kzalloc(sizeof(*one), GFP_KERNEL);
	struct leaky_pair *two = kzalloc(sizeof(*two), GFP_KERNEL);

	if (leaky_mark(one, sizeof(one->name), "cycle") || leaky_mark(two, sizeof(two->name), "cycle"))
		return -ENOMEM;
	WRITE_ONCE(one->other, two);
	WRITE_ONCE(two->other, one);
	return 0;
}

struct leaky_branch {
	char name[72];
	struct leaky_branch *child[2];
};

LEAKY int leaky_tree(void)
{
	struct leaky_branch *node[7];
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(node); i++) {
		node[i] = kzalloc(sizeof(*node[i]), GFP_KERNEL);
		if (leaky_mark(node[i], sizeof(node[i]->name), i ? "tree" : "tree, its root"))
			return -ENOMEM;
		/* As in a heap: the parent of i is (i - 1) / 2. */
		if (i)
			WRITE_ONCE(node[(i - 1) / 2]->child[(i - 1) % 2], node[i]);
	}
	return 0;
}

struct leaky_link {
	char name[48];
	struct leaky_link *next;
};

LEAKY int leaky_chain(void)
{
	struct leaky_link *head = NULL, *link;
	unsigned int i;

	for (i = 0; i < 4; i++) {
		link = kzalloc(sizeof(*link), GFP_KERNEL);
		if (leaky_mark(link, sizeof(link->name), i < 3 ? "chain" : "chain, its head"))
			return -ENOMEM;
		WRITE_ONCE(link->next, head);
		head = link;
	}
	return 0;
}

LEAKY int leaky_indirect(void)
{
	struct leaky_holder *holder = kzalloc(180, GFP_KERNEL);
	void *area = vzalloc(LEAKY_SMALLER_AREA);

	if (leaky_mark(holder, sizeof(holder->name), "indirect") || leaky_mark(area, 64, "indirect"))
		return -ENOMEM;
	WRITE_ONCE(holder->other, area);
	return 0;
}

LEAKY int leaky_percpu_lost(void)
{
	char __percpu *area = __alloc_percpu(96, sizeof(void *));
	int cpu;

	if (!area)
		return -ENOMEM;
	for_each_possible_cpu(cpu)
		leaky_mark(per_cpu_ptr(area, cpu), 96, "percpu_lost");
	return 0;
}

/*
 * The module keeps the page: only its further addresses are lost. vm_map_ram has a way of its own for up to 64 pages. Many, for
 * the reason of LEAKY_AREA.
 */
#define LEAKY_MAPPED 2
#define LEAKY_MAPPED_MANY 80

static struct page *leaky_mapped_page;

/* As many as there are places. */
static int leaky_mapped_get(struct page **pages, unsigned int count)
{
	unsigned int i;

	if (!leaky_mapped_page)
		leaky_mapped_page = alloc_page(GFP_KERNEL | __GFP_ZERO);
	for (i = 0; i < count; i++)
		pages[i] = leaky_mapped_page;
	return leaky_mapped_page ? 0 : -ENOMEM;
}

static void leaky_mapped_undo(void)
{
	if (leaky_mapped_page)
		__free_page(leaky_mapped_page);
	leaky_mapped_page = NULL;
}

LEAKY int leaky_vmap_lost(void)
{
	struct page *pages[LEAKY_MAPPED_MANY];

	if (leaky_mapped_get(pages, LEAKY_MAPPED_MANY))
		return -ENOMEM;
	return leaky_mark(vmap(pages, LEAKY_MAPPED_MANY, VM_MAP, PAGE_KERNEL), 64, "vmap_lost");
}

LEAKY int leaky_map_ram_lost(void)
{
	struct page *pages[LEAKY_MAPPED_MANY];

	if (leaky_mapped_get(pages, LEAKY_MAPPED_MANY) ||
	    leaky_mark(vm_map_ram(pages, LEAKY_MAPPED, 0), 64, "map_ram_lost"))
		return -ENOMEM;
	return leaky_mark(vm_map_ram(pages, LEAKY_MAPPED_MANY, 0), 64, "map_ram_lost");
}

/* Blocks of every form; the contents say whose they are. */
static int leaky_label_page(struct page *page, const char *name)
{
	return page ? leaky_mark(page_address(page), 64, name) : -ENOMEM;
}

#define LEAKY_PAGES 6

LEAKY int leaky_pages_lost(void)
{
	struct page *bulk[LEAKY_PAGES] = {};
	void *exact = alloc_pages_exact(3 * PAGE_SIZE, GFP_KERNEL | __GFP_ZERO);
	unsigned int i;

	if (leaky_label_page(alloc_page(GFP_KERNEL), "pages_lost") ||
	    leaky_mark((void *)__get_free_pages(GFP_KERNEL, 2), 64, "pages_lost, four") ||
	    leaky_label_page(alloc_pages(GFP_KERNEL | __GFP_COMP, 3), "pages_lost, compound") ||
	    leaky_mark(exact, 64, "pages_lost, exactly three"))
		return -ENOMEM;
	if (alloc_pages_bulk_array(GFP_KERNEL, LEAKY_PAGES, bulk) != LEAKY_PAGES)
		return -ENOMEM;
	for (i = 0; i < LEAKY_PAGES; i++)
		leaky_label_page(bulk[i], "pages_lost, in bulk");
	__free_page(bulk[1]);
	__free_page(bulk[4]);
	memset(bulk, 0, sizeof(bulk));
	barrier_data(bulk);
	return 0;
}

struct leaky_pile {
	char name[48];
	struct list_head pages;
};

LEAKY int leaky_pages_listed(void)
{
	struct leaky_pile *pile = kzalloc(sizeof(*pile), GFP_KERNEL);
	unsigned int i;

	if (leaky_mark(pile, sizeof(pile->name), "pages_listed"))
		return -ENOMEM;
	INIT_LIST_HEAD(&pile->pages);
	for (i = 0; i < 3; i++) {
		struct page *page = alloc_page(GFP_KERNEL | __GFP_ZERO);

		if (leaky_label_page(page, "pages_listed"))
			return -ENOMEM;
		list_add(&page->lru, &pile->pages);
	}
	return 0;
}

LEAKY int leaky_pages_inside(void)
{
	struct leaky_holder *page = (void *)get_zeroed_page(GFP_KERNEL);
	void *object = kzalloc(90, GFP_KERNEL);

	if (leaky_mark(page, sizeof(page->name), "pages_inside") || leaky_mark(object, 90, "pages_inside"))
		return -ENOMEM;
	WRITE_ONCE(page->other, object);
	return 0;
}

/* In the hole below the firmware, where no machine of a test has memory; large for the reason of LEAKY_AREA. */
#define LEAKY_DEVICE 0xf0000000
#define LEAKY_DEVICE_SIZE (320 << 10)

static void __iomem *leaky_device_held;

LEAKY int leaky_device_lost(void)
{
	void __iomem *lost = ioremap(LEAKY_DEVICE, LEAKY_DEVICE_SIZE);

	leaky_device_held = ioremap(LEAKY_DEVICE + LEAKY_DEVICE_SIZE + 16, 32);
	return lost && leaky_device_held ? 0 : -ENOMEM;
}

static void leaky_device_lost_undo(void)
{
	if (leaky_device_held)
		iounmap(leaky_device_held);
}

/* Volatile: it is never read, but what it holds is referenced. */
static void *volatile leaky_unload_objects[3];

LEAKY int leaky_unload(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(leaky_unload_objects); i++) {
		leaky_unload_objects[i] = kzalloc(32, GFP_KERNEL);
		if (leaky_mark(leaky_unload_objects[i], 32, "unload"))
			return -ENOMEM;
	}
	/* Nobody reads the array: without this the compiler leaves it out. */
	barrier_data(leaky_unload_objects);
	return 0;
}

/* --- must not be reported --- */

static DECLARE_COMPLETION(leaky_holder_ready);
static struct task_struct *leaky_register_task;
static struct task_struct *leaky_stack_task;

/* Starts a thread that keeps an object until it is told to stop. */
static int leaky_hold(struct task_struct **task, int (*hold)(void *), const char *name)
{
	struct task_struct *thread = kthread_create(hold, NULL, "leaky/%s", name);

	if (IS_ERR(thread))
		return PTR_ERR(thread);
	/* Away from the first CPU, which has the most to do. */
	kthread_bind(thread, cpumask_last(cpu_online_mask));
	WRITE_ONCE(*task, thread);
	wake_up_process(thread);
	wait_for_completion(&leaky_holder_ready);
	return 0;
}

LEAKY int leaky_register(void *unused)
{
	void *object = kzalloc(384, GFP_KERNEL);
	unsigned int spin;

	leaky_mark(object, 384, "register");
	set_user_nice(current, MAX_NICE);
	leaky_scrub(LEAKY_SCRUB_DEPTH);
	complete(&leaky_holder_ready);
	while (!kthread_should_stop()) {
		/* Not for long: a hypervisor may stop the machine at each pause instruction. */
		for (spin = 0; spin < 1000; spin++) {
			/* Read and written back: it stays in the register it is in. */
			asm volatile("" : "+r" (object));
			cpu_relax();
		}
		cond_resched();
	}
	kfree(object);
	return 0;
}

static int leaky_register_start(void)
{
	return leaky_hold(&leaky_register_task, leaky_register, "register");
}

static void leaky_register_undo(void)
{
	kthread_stop(leaky_register_task);
}

LEAKY int leaky_stack(void *unused)
{
	void *volatile object = kzalloc(320, GFP_KERNEL);

	leaky_mark(object, 320, "stack");
	leaky_scrub(LEAKY_SCRUB_DEPTH);
	complete(&leaky_holder_ready);
	for (;;) {
		set_current_state(TASK_INTERRUPTIBLE);
		if (kthread_should_stop())
			break;
		schedule();
	}
	__set_current_state(TASK_RUNNING);
	kfree(object);
	return 0;
}

static int leaky_stack_start(void)
{
	return leaky_hold(&leaky_stack_task, leaky_stack, "stack");
}

static void leaky_stack_undo(void)
{
	kthread_stop(leaky_stack_task);
}

static DEFINE_PER_CPU(void *, leaky_percpu_object);

LEAKY int leaky_percpu(void)
{
	int cpu;

	for_each_possible_cpu(cpu) {
		per_cpu(leaky_percpu_object, cpu) = kzalloc(129, GFP_KERNEL);
		if (leaky_mark(per_cpu(leaky_percpu_object, cpu), 129, "percpu"))
			return -ENOMEM;
	}
	return 0;
}

static void leaky_percpu_undo(void)
{
	int cpu;

	for_each_possible_cpu(cpu)
		kfree(per_cpu(leaky_percpu_object, cpu));
}

static void *__percpu *leaky_percpu_area;

LEAKY int leaky_percpu_alloc(void)
{
	int cpu;

	leaky_percpu_area = alloc_percpu(void *);
	if (!leaky_percpu_area)
		return -ENOMEM;
	for_each_possible_cpu(cpu) {
		*per_cpu_ptr(leaky_percpu_area, cpu) = kzalloc(130, GFP_KERNEL);
		if (leaky_mark(*per_cpu_ptr(leaky_percpu_area, cpu), 130, "percpu_alloc"))
			return -ENOMEM;
	}
	return 0;
}

static void leaky_percpu_alloc_undo(void)
{
	int cpu;

	if (!leaky_percpu_area)
		return;
	for_each_possible_cpu(cpu)
		kfree(*per_cpu_ptr(leaky_percpu_area, cpu));
	free_percpu(leaky_percpu_area);
}

static char *leaky_interior_pointer;

LEAKY int leaky_interior(void)
{
	char *object = kzalloc(300, GFP_KERNEL);

	if (leaky_mark(object, 300, "interior"))
		return -ENOMEM;
	leaky_interior_pointer = object + 40;
	/* For tests, which ask a detector about an object that it does not report. */
	pr_info("interior is at %px\n", object);
	return 0;
}

static void leaky_interior_undo(void)
{
	if (leaky_interior_pointer)
		kfree(leaky_interior_pointer - 40);
}

struct leaky_alarm {
	char name[64];
	struct timer_list timer;
};

static unsigned long leaky_timer_hidden = ~0UL;

static void leaky_timer_fired(struct timer_list *timer)
{
	mod_timer(timer, jiffies + 3600 * HZ);
}

LEAKY int leaky_timer(void)
{
	struct leaky_alarm *alarm = kzalloc(sizeof(*alarm), GFP_KERNEL);

	if (leaky_mark(alarm, sizeof(alarm->name), "timer"))
		return -ENOMEM;
	leaky_timer_hidden = leaky_hide(alarm);
	timer_setup(&alarm->timer, leaky_timer_fired, 0);
	mod_timer(&alarm->timer, jiffies + 3600 * HZ);
	return 0;
}

static void leaky_timer_undo(void)
{
	struct leaky_alarm *alarm = leaky_show(leaky_timer_hidden);

	if (!alarm)
		return;
	leaky_timer_stop(&alarm->timer);
	kfree(alarm);
}

struct leaky_deferred {
	char name[88];
	struct rcu_head rcu;
};

static void leaky_rcu_free(struct rcu_head *rcu)
{
	kfree(container_of(rcu, struct leaky_deferred, rcu));
}

LEAKY int leaky_rcu(void)
{
	struct leaky_deferred *object;
	unsigned int i;

	for (i = 0; i < 4; i++) {
		object = kzalloc(sizeof(*object), GFP_KERNEL);
		if (leaky_mark(object, sizeof(object->name), "rcu"))
			return -ENOMEM;
		if (i < 3)
			kfree_rcu(object, rcu);
		else
			call_rcu(&object->rcu, leaky_rcu_free);
	}
	return 0;
}

static void leaky_rcu_undo(void)
{
	/* The callback is in this module. */
	rcu_barrier();
}

static struct page *leaky_page_of_pointers;

LEAKY int leaky_page(void)
{
	struct page *page = alloc_page(GFP_KERNEL | __GFP_ZERO);
	void *object;

	if (!page)
		return -ENOMEM;
	object = kzalloc(440, GFP_KERNEL);
	*(void **)page_address(page) = object;
	leaky_page_of_pointers = page;
	return leaky_mark(object, 440, "page");
}

static void leaky_page_undo(void)
{
	if (!leaky_page_of_pointers)
		return;
	kfree(*(void **)page_address(leaky_page_of_pointers));
	__free_page(leaky_page_of_pointers);
}

static void *leaky_pages_by_address;
static struct page *leaky_pages_by_struct;
static char *leaky_pages_in_the_middle;
static LIST_HEAD(leaky_pages_list);

LEAKY int leaky_pages(void)
{
	unsigned int i;

	leaky_pages_by_address = (void *)__get_free_page(GFP_KERNEL);
	leaky_pages_by_struct = alloc_pages(GFP_KERNEL | __GFP_COMP, 1);
	leaky_pages_in_the_middle = alloc_pages_exact(5 * PAGE_SIZE, GFP_KERNEL);
	if (leaky_mark(leaky_pages_by_address, 64, "pages, by address") ||
	    leaky_label_page(leaky_pages_by_struct, "pages, by struct page") ||
	    leaky_mark(leaky_pages_in_the_middle, 64, "pages, exactly five"))
		return -ENOMEM;
	leaky_pages_in_the_middle += 3 * PAGE_SIZE + 8;
	for (i = 0; i < 3; i++) {
		struct page *page = alloc_page(GFP_KERNEL);

		if (leaky_label_page(page, "pages, in a list"))
			return -ENOMEM;
		list_add(&page->lru, &leaky_pages_list);
	}
	return 0;
}

static void leaky_pages_undo(void)
{
	struct page *page, *next;

	free_page((unsigned long)leaky_pages_by_address);
	if (leaky_pages_by_struct)
		__free_pages(leaky_pages_by_struct, 1);
	if (leaky_pages_in_the_middle)
		free_pages_exact(leaky_pages_in_the_middle - 3 * PAGE_SIZE - 8, 5 * PAGE_SIZE);
	list_for_each_entry_safe(page, next, &leaky_pages_list, lru)
		__free_page(page);
}

/* Maps and unmaps a page several times over, few times at once and many times. */
static int leaky_map_freed(void)
{
	struct page *pages[LEAKY_MAPPED_MANY];
	unsigned int count;
	void *mapped;

	if (leaky_mapped_get(pages, LEAKY_MAPPED_MANY))
		return -ENOMEM;
	for (count = 1; count <= LEAKY_MAPPED_MANY; count += 13) {
		mapped = vmap(pages, count, VM_MAP, PAGE_KERNEL);
		if (mapped)
			vunmap(mapped);
		mapped = vm_map_ram(pages, count, 0);
		if (mapped)
			vm_unmap_ram(mapped, count);
	}
	return 0;
}

LEAKY int leaky_freed(void)
{
	struct kmem_cache *cache = kmem_cache_create_usercopy("leaky-freed", 136, 0, 0, 0, 136, NULL);
	void *bulk[LEAKY_BULK];
	void *object;
	unsigned int i;

	if (!cache || leaky_map_freed())
		return -ENOMEM;
	for (i = 0; i < 100; i++) {
		free_pages(__get_free_pages(GFP_KERNEL, i % 5), i % 5);
		object = alloc_pages_exact(3 * PAGE_SIZE, GFP_KERNEL);
		if (object)
			free_pages_exact(object, 3 * PAGE_SIZE);
		kfree(kzalloc(leaky_size(8 << (i % 12)), GFP_KERNEL));
		kfree(kmemdup("freed", 6, GFP_KERNEL));
		kvfree(kvzalloc(leaky_size(1000 << (i % 12)), GFP_KERNEL));
		kfree(krealloc(kzalloc(24, GFP_KERNEL), leaky_size(24 << (i % 12)), GFP_KERNEL));
		kfree_sensitive(kzalloc(100, GFP_KERNEL));
		vfree(vzalloc(leaky_size(4096 * (i % 7 + 1))));
		object = kmem_cache_zalloc(cache, GFP_KERNEL);
		if (object)
			kmem_cache_free(cache, object);
		if (kmem_cache_alloc_bulk(cache, GFP_KERNEL, LEAKY_BULK, bulk))
			kmem_cache_free_bulk(cache, LEAKY_BULK, bulk);
	}
	kmem_cache_destroy(cache);
	return 0;
}

/* --- which, and when --- */

static const struct leaky_case leaky_cases[] = {
	{ "kmalloc", 5, true, leaky_kmalloc },
	{ "forms", 11, false, leaky_forms },
	{ "vmalloc", 1, true, leaky_vmalloc },
	{ "cache", 2, true, leaky_cache },
	{ "bulk", 4, false, leaky_bulk },
	{ "softirq", 1, false, leaky_softirq_start },
	{ "hidden", 1, true, leaky_hidden },
	{ "stale", 1, false, leaky_stale },
	{ "typed", 1, false, leaky_typed, leaky_typed_undo },
	{ "list", 5, true, leaky_list },
	{ "cycle", 2, false, leaky_cycle },
	{ "tree", 7, true, leaky_tree },
	{ "chain", 4, false, leaky_chain },
	{ "indirect", 2, false, leaky_indirect },
	{ "vmap_lost", 1, false, leaky_vmap_lost, leaky_mapped_undo },
	{ "map_ram_lost", 2, false, leaky_map_ram_lost, leaky_mapped_undo },
	{ "percpu_lost", 1, false, leaky_percpu_lost },
	{ "pages_lost", 0, false, leaky_pages_lost },
	{ "pages_listed", 0, false, leaky_pages_listed },
	{ "pages_inside", 0, false, leaky_pages_inside },
	{ "device_lost", 0, false, leaky_device_lost, leaky_device_lost_undo },
	{ "unload", 0, false, leaky_unload },
	{ "register", 0, false, leaky_register_start, leaky_register_undo },
	{ "stack", 0, true, leaky_stack_start, leaky_stack_undo },
	{ "percpu", 0, true, leaky_percpu, leaky_percpu_undo },
	{ "percpu_alloc", 0, false, leaky_percpu_alloc, leaky_percpu_alloc_undo },
	{ "interior", 0, false, leaky_interior, leaky_interior_undo },
	{ "timer", 0, true, leaky_timer, leaky_timer_undo },
	{ "rcu", 0, true, leaky_rcu, leaky_rcu_undo },
	{ "page", 0, false, leaky_page, leaky_page_undo },
	{ "pages", 0, false, leaky_pages, leaky_pages_undo },
	{ "freed", 0, true, leaky_freed, leaky_mapped_undo },
};

static bool leaky_selected[ARRAY_SIZE(leaky_cases)];

static bool leaky_select(const char *name)
{
	bool found = false;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(leaky_cases); i++) {
		if (!strcmp(name, "all") || !strcmp(name, leaky_cases[i].name) ||
		    (leaky_cases[i].demo && !strcmp(name, "demo"))) {
			leaky_selected[i] = true;
			found = true;
		}
	}
	return found;
}

static int leaky_param_set(const char *value, const struct kernel_param *param)
{
	char names[256], *rest = names, *name;

	if (!value || strscpy(names, value, sizeof(names)) < 0)
		return -EINVAL;
	while ((name = strsep(&rest, ","))) {
		if (!leaky_select(strim(name))) {
			pr_err("there is no case %s\n", name);
			return -EINVAL;
		}
	}
	return 0;
}

static const struct kernel_param_ops leaky_param_ops = { .set = leaky_param_set };

module_param_cb(case, &leaky_param_ops, NULL, 0);
MODULE_PARM_DESC(case, "what to plant: a case's name, or several with commas, or all, or demo");

struct leaky_job {
	const struct leaky_case *plan;
	struct completion done;
	int error;
};

static int leaky_thread(void *data)
{
	struct leaky_job *job = data;

	job->error = job->plan->run();
	leaky_scrub(LEAKY_SCRUB_DEPTH);
	complete(&job->done);
	for (;;) {
		set_current_state(TASK_INTERRUPTIBLE);
		if (kthread_should_stop())
			break;
		schedule();
	}
	__set_current_state(TASK_RUNNING);
	return 0;
}

static int leaky_run(const struct leaky_case *plan)
{
	struct leaky_job job = { .plan = plan };
	struct task_struct *thread;

	init_completion(&job.done);
	thread = kthread_run(leaky_thread, &job, "leaky/%s", plan->name);
	if (IS_ERR(thread))
		return PTR_ERR(thread);
	wait_for_completion(&job.done);
	kthread_stop(thread);
	if (job.error)
		pr_err("case=%s failed: %d\n", plan->name, job.error);
	else
		pr_info("case=%s expect=%u\n", plan->name, plan->expect);
	return job.error;
}

static void leaky_undo_until(unsigned int end)
{
	unsigned int i;

	for (i = 0; i < end; i++)
		if (leaky_selected[i] && leaky_cases[i].undo)
			leaky_cases[i].undo();
}

static int leaky_init(void)
{
	unsigned int i, expect = 0;
	int error;

	for (i = 0; i < ARRAY_SIZE(leaky_cases); i++) {
		if (!leaky_selected[i])
			continue;
		error = leaky_run(&leaky_cases[i]);
		if (error) {
			leaky_undo_until(i);
			return error;
		}
		expect += leaky_cases[i].expect;
	}
	pr_info("planted, expect=%u\n", expect);
	return 0;
}

static void leaky_exit(void)
{
	leaky_undo_until(ARRAY_SIZE(leaky_cases));
	pr_info("unloaded\n");
}

module_init(leaky_init);
module_exit(leaky_exit);
MODULE_DESCRIPTION("Plants known memory leaks to test leak detectors with");
MODULE_AUTHOR("The kleak-vmm authors");
MODULE_LICENSE("GPL");

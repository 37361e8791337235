// SPDX-License-Identifier: GPL-2.0-only
/*
 * breaking: damages one of the kernel's own structures for some seconds, for debuggers that read it from outside meanwhile.
 *
 *	insmod breaking.ko what=tasks how=loop seconds=5; rmmod breaking
 *
 *   what       tasks: the list of processes; threads: that of a process's threads; freelist: the free objects of a slab
 *              cache of its own; slab: a member of the description of that cache's slab; tables: the page tables of a
 *              process; list: a list with its head at an address; pointer: a pointer at an address
 *   how        what the entry, pointer or free object leads to. loop: itself; null: nothing; wild: an address where nothing
 *              is mapped; user: one of user space; scribble (freelist): the free object has other contents
 *   at         list and pointer: the address, of the head or the pointer. through=1: of a pointer to where that is
 *   offset     behind it; slab: of the member in the page's description
 *   heads      list: so many heads are one behind the other, and the first list that is not empty is taken (1)
 *
 * The CPU spins with interrupts off while it is broken, so that the kernel does not run into it: for guests with one CPU.
 * It says "broken" and "mended" on the console.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/delay.h>
#include <linux/gfp.h>
#include <linux/irqflags.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/string.h>

#define BREAKING_SIZE 240
#define BREAKING_WILD 0xffffdead00000100UL
#define BREAKING_USER 0x7ffd00001000UL
/* An entry of the top level for addresses that no process uses. */
#define BREAKING_ENTRY 100

static char *what = "tasks";
module_param(what, charp, 0);
MODULE_PARM_DESC(what, "tasks, threads, freelist, slab, tables, list or pointer");

static char *how = "loop";
module_param(how, charp, 0);
MODULE_PARM_DESC(how, "loop, null, wild, user or scribble");

static unsigned long at;
module_param(at, ulong, 0);
MODULE_PARM_DESC(at, "address of the list's head or of the pointer");

static bool through;
module_param(through, bool, 0);
MODULE_PARM_DESC(through, "the address is that of a pointer to it");

static unsigned long offset;
module_param(offset, ulong, 0);
MODULE_PARM_DESC(offset, "bytes behind it");

static unsigned int heads = 1;
module_param(heads, uint, 0);
MODULE_PARM_DESC(heads, "heads of lists, one behind the other");

static unsigned int seconds = 5;
module_param(seconds, uint, 0);
MODULE_PARM_DESC(seconds, "how long");

/* What a word that leads somewhere is made to be; self is where it is. */
static unsigned long breaking_target(unsigned long self)
{
	if (!strcmp(how, "loop"))
		return self;
	if (!strcmp(how, "null"))
		return 0;
	return strcmp(how, "user") ? BREAKING_WILD : BREAKING_USER;
}

static void breaking_word(unsigned long *word, unsigned long wrong)
{
	unsigned long flags, right;
	unsigned int i;

	local_irq_save(flags);
	right = READ_ONCE(*word);
	WRITE_ONCE(*word, wrong);
	pr_warn("broken\n");
	for (i = 0; i < seconds * 1000; i++)
		mdelay(1);
	WRITE_ONCE(*word, right);
	pr_warn("mended\n");
	local_irq_restore(flags);
}

static int breaking_list(struct list_head *head)
{
	while (list_empty(head)) {
		if (!--heads)
			return -ENOENT;
		head++;
	}
	breaking_word((unsigned long *)&head->next->next, breaking_target((unsigned long)head->next));
	return 0;
}

/*
 * The pointer to the next free object is in the middle of a free one (calculate_sizes, mm/slub.c), and may be exclusive-ored
 * with what is the same for all pointers at one address: what it leads to now tells how to make it lead elsewhere.
 */
static void breaking_freelist(void *item, void *next)
{
	unsigned long *word = item + BREAKING_SIZE / 2;
	unsigned long wrong = 0x5a5a5a5a5a5a5a5aUL;

	if (strcmp(how, "scribble"))
		wrong = READ_ONCE(*word) ^ (unsigned long)next ^ breaking_target((unsigned long)item);
	breaking_word(word, wrong);
}

static int breaking_cache(void)
{
	struct kmem_cache *cache = kmem_cache_create_usercopy("breaking-item", BREAKING_SIZE, 0, 0, 0, BREAKING_SIZE, NULL);
	void *used, *item, *next;

	if (!cache)
		return -ENOMEM;
	used = kmem_cache_alloc(cache, GFP_KERNEL);
	item = kmem_cache_alloc(cache, GFP_KERNEL);
	next = kmem_cache_alloc(cache, GFP_KERNEL);
	if (used && item && next) {
		if (!strcmp(what, "slab")) {
			breaking_word((void *)virt_to_head_page(item) + offset, breaking_target(0));
		} else {
			preempt_disable();
			kmem_cache_free(cache, next);
			kmem_cache_free(cache, item);
			breaking_freelist(item, next);
			preempt_enable();
			item = next = NULL;
		}
	}
	if (used)
		kmem_cache_free(cache, used);
	if (item)
		kmem_cache_free(cache, item);
	if (next)
		kmem_cache_free(cache, next);
	kmem_cache_destroy(cache);
	return 0;
}

/* A table all of whose entries lead back to it: on each level, and to the last one's pages. */
static int breaking_tables(void)
{
	unsigned long *table = (unsigned long *)get_zeroed_page(GFP_KERNEL);
	unsigned int i;

	if (!table)
		return -ENOMEM;
	for (i = 0; i < PTRS_PER_PTE; i++)
		table[i] = __pa(table) | _PAGE_TABLE_NOENC;
	breaking_word((unsigned long *)&current->mm->pgd[BREAKING_ENTRY], table[0]);
	free_page((unsigned long)table);
	return 0;
}

static int breaking_init(void)
{
	unsigned long place = at;

	if (num_online_cpus() > 1)
		return -EINVAL;
	if (!strcmp(what, "tasks"))
		return breaking_list(current->group_leader->tasks.prev);
	if (!strcmp(what, "threads"))
		return breaking_list(current->thread_node.prev);
	if (!strcmp(what, "freelist") || !strcmp(what, "slab"))
		return breaking_cache();
	if (!strcmp(what, "tables"))
		return breaking_tables();
	if (!at)
		return -EINVAL;
	if (through)
		place = *(unsigned long *)place;
	place += offset;
	if (!strcmp(what, "list"))
		return breaking_list((struct list_head *)place);
	if (strcmp(what, "pointer"))
		return -EINVAL;
	breaking_word((unsigned long *)place, breaking_target(place));
	return 0;
}

static void breaking_exit(void)
{
}

module_init(breaking_init);
module_exit(breaking_exit);
MODULE_DESCRIPTION("Damages kernel structures for a while, to test debuggers with");
MODULE_AUTHOR("The kleak-vmm authors");
MODULE_LICENSE("GPL");

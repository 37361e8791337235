// SPDX-License-Identifier: GPL-2.0-only
/*
 * breaking: damages one of the kernel's own lists for some seconds, for debuggers that read it from outside meanwhile.
 *
 *	insmod breaking.ko list=tasks how=loop seconds=5; rmmod breaking
 *
 *   list       tasks: the list of processes; modules: that of loaded modules; slab: the free objects of a slab cache of its
 *              own, whatever how says
 *   how        loop: an entry that leads back to itself; null: to nothing; wild: to an address where nothing is mapped;
 *              user: to one of user space
 *
 * The CPU spins with interrupts off while the list is broken, so that the kernel does not run into it: for guests with
 * one CPU. It says "broken" and "mended" on the console.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/delay.h>
#include <linux/irqflags.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/string.h>

#define BREAKING_SIZE 240

static char *list = "tasks";
module_param(list, charp, 0);
MODULE_PARM_DESC(list, "tasks, modules or slab");

static char *how = "loop";
module_param(how, charp, 0);
MODULE_PARM_DESC(how, "loop, null, wild or user");

static unsigned int seconds = 5;
module_param(seconds, uint, 0);
MODULE_PARM_DESC(seconds, "how long");

static void breaking_wait(void)
{
	unsigned int i;

	for (i = 0; i < seconds * 1000; i++)
		mdelay(1);
}

/* The contents of a freed object, where the pointer to the next free one is. */
static void breaking_slab(void)
{
	struct kmem_cache *cache = kmem_cache_create_usercopy("breaking-item", BREAKING_SIZE, 0, 0, 0, BREAKING_SIZE, NULL);
	unsigned char saved[BREAKING_SIZE];
	unsigned char *item, *used;
	unsigned long flags;

	if (!cache)
		return;
	used = kmem_cache_alloc(cache, GFP_KERNEL);
	item = kmem_cache_alloc(cache, GFP_KERNEL);
	if (used && item) {
		local_irq_save(flags);
		kmem_cache_free(cache, item);
		memcpy(saved, item, sizeof(saved));
		memset(item, 0x5a, sizeof(saved));
		pr_warn("broken\n");
		breaking_wait();
		memcpy(item, saved, sizeof(saved));
		pr_warn("mended\n");
		local_irq_restore(flags);
		item = NULL;
	}
	if (item)
		kmem_cache_free(cache, item);
	if (used)
		kmem_cache_free(cache, used);
	kmem_cache_destroy(cache);
}

static struct list_head *breaking_victim(void)
{
	if (!strcmp(list, "tasks"))
		return &current->group_leader->tasks;
	if (!strcmp(list, "modules"))
		return &THIS_MODULE->list;
	return NULL;
}

static int breaking_init(void)
{
	struct list_head *victim = breaking_victim();
	struct list_head *wrong, *right;
	unsigned long flags;

	if (num_online_cpus() > 1)
		return -EINVAL;
	if (!strcmp(list, "slab")) {
		breaking_slab();
		return 0;
	}
	if (!strcmp(how, "loop"))
		wrong = victim;
	else if (!strcmp(how, "null"))
		wrong = NULL;
	else if (!strcmp(how, "wild"))
		wrong = (struct list_head *)0xffffdead00000100UL;
	else
		wrong = (struct list_head *)0x7ffd00001000UL;
	if (!victim)
		return -EINVAL;
	local_irq_save(flags);
	right = victim->next;
	WRITE_ONCE(victim->next, wrong);
	pr_warn("broken\n");
	breaking_wait();
	WRITE_ONCE(victim->next, right);
	pr_warn("mended\n");
	local_irq_restore(flags);
	return 0;
}

static void breaking_exit(void)
{
}

module_init(breaking_init);
module_exit(breaking_exit);
MODULE_DESCRIPTION("Damages kernel lists for a while, to test debuggers with");
MODULE_AUTHOR("The kleak-vmm authors");
MODULE_LICENSE("GPL");

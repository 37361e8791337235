// SPDX-License-Identifier: GPL-2.0-only
/*
 * clean: a well-behaved module, for the runs in which nothing must be reported.
 *
 * While it is loaded it has objects of several kinds, all referenced; a worker allocates and frees in the background;
 * rmmod frees everything.
 *
 *	insmod clean.ko rounds=1000	(how often to allocate and free everything at load)
 *	insmod clean.ko linger=500	(how many milliseconds to stay half loaded: before its initialisation begins)
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/delay.h>
#include <linux/hashtable.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/rbtree.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>

#define CLEAN_ITEMS 64

static unsigned int rounds = 10;
module_param(rounds, uint, 0);
MODULE_PARM_DESC(rounds, "how often to allocate and free everything at load");

static int linger_set(const char *text, const struct kernel_param *param)
{
	unsigned int milliseconds;
	int error = kstrtouint(text, 0, &milliseconds);

	if (!error)
		msleep(milliseconds);
	return error;
}

static const struct kernel_param_ops linger_ops = { .set = linger_set };
module_param_cb(linger, &linger_ops, NULL, 0);
MODULE_PARM_DESC(linger, "milliseconds to stay half loaded");

/**
 * struct clean_item - found by list, by hash and by tree
 * @list: in clean_items
 * @hash: in clean_table, by @number
 * @node: in clean_tree, by @number
 * @number: key
 * @text: a string of its own
 */
struct clean_item {
	struct list_head list;
	struct hlist_node hash;
	struct rb_node node;
	unsigned int number;
	char *text;
};

static LIST_HEAD(clean_items);
static DEFINE_HASHTABLE(clean_table, 4);
static struct rb_root clean_tree = RB_ROOT;
static struct kmem_cache *clean_cache;
static void *clean_area;
static struct delayed_work clean_work;

static void clean_insert(struct clean_item *item)
{
	struct rb_node **link = &clean_tree.rb_node, *parent = NULL;

	while (*link) {
		parent = *link;
		link = item->number < rb_entry(parent, struct clean_item, node)->number ? &parent->rb_left :
											   &parent->rb_right;
	}
	rb_link_node(&item->node, parent, link);
	rb_insert_color(&item->node, &clean_tree);
	hash_add(clean_table, &item->hash, item->number);
	list_add_tail(&item->list, &clean_items);
}

static void clean_empty(void)
{
	struct clean_item *item, *next;

	list_for_each_entry_safe(item, next, &clean_items, list) {
		list_del(&item->list);
		hash_del(&item->hash);
		rb_erase(&item->node, &clean_tree);
		kfree(item->text);
		kmem_cache_free(clean_cache, item);
	}
	vfree(clean_area);
	clean_area = NULL;
}

static int clean_fill(void)
{
	struct clean_item *item;
	unsigned int i;

	clean_area = vzalloc(CLEAN_ITEMS * PAGE_SIZE);
	if (!clean_area)
		return -ENOMEM;
	for (i = 0; i < CLEAN_ITEMS; i++) {
		item = kmem_cache_zalloc(clean_cache, GFP_KERNEL);
		if (!item)
			return -ENOMEM;
		item->number = i * 2654435761U;
		item->text = kasprintf(GFP_KERNEL, "clean item %u of %u", i, CLEAN_ITEMS);
		clean_insert(item);
		if (!item->text)
			return -ENOMEM;
	}
	return 0;
}

static void clean_work_run(struct work_struct *work)
{
	unsigned int i;

	for (i = 0; i < CLEAN_ITEMS; i++)
		kfree(kmalloc(16 << (i % 10), GFP_KERNEL));
	schedule_delayed_work(&clean_work, HZ / 10);
}

static int clean_init(void)
{
	unsigned int i;
	int error = 0;

	clean_cache = KMEM_CACHE(clean_item, 0);
	if (!clean_cache)
		return -ENOMEM;
	INIT_DELAYED_WORK(&clean_work, clean_work_run);
	for (i = 0; i < rounds && !error; i++) {
		clean_empty();
		error = clean_fill();
	}
	if (error) {
		clean_empty();
		kmem_cache_destroy(clean_cache);
		return error;
	}
	schedule_delayed_work(&clean_work, HZ / 10);
	pr_info("loaded\n");
	return 0;
}

static void clean_exit(void)
{
	cancel_delayed_work_sync(&clean_work);
	clean_empty();
	kmem_cache_destroy(clean_cache);
	pr_info("unloaded\n");
}

module_init(clean_init);
module_exit(clean_exit);
MODULE_DESCRIPTION("Allocates and frees properly, to test leak detectors with");
MODULE_AUTHOR("The kleak-vmm authors");
MODULE_LICENSE("GPL");

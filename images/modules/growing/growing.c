// SPDX-License-Identifier: GPL-2.0-only
/*
 * growing: memory that is always referenced, in three shapes over time. Each write to the parameter "step" is one step:
 *
 *	insmod growing.ko; echo 1 > /sys/module/growing/parameters/step
 *
 *   function           what it allocates at each step                                  what it is
 *   growing_lookup     ten objects of a cache of its own, kept in a hash table; three  a leak: their reference count
 *                      of them are released again, as all should be                    is never dropped
 *   growing_pool       five objects, after it freed its five oldest                    steady
 *   growing_batch      twenty objects; at every fourth step all are freed              a sawtooth
 *
 * A detector of growth must name the first, and neither of the others. rmmod frees everything.
 *
 * A path written to the parameter "hold" is looked up, and eight references to its directory entry are taken and
 * forgotten: for an audit of reference counts. They stay.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/dcache.h>
#include <linux/hashtable.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/namei.h>
#include <linux/path.h>
#include <linux/refcount.h>
#include <linux/slab.h>
#include <linux/string.h>

#define GROWING_LOOKUPS 10
#define GROWING_RELEASED 3
#define GROWING_POOL 5
#define GROWING_BATCH 20
#define GROWING_PERIOD 4
#define GROWING_HELD 8

/**
 * struct growing_entry - something looked up by its number, as a dentry is by its name
 * @hash: in growing_table
 * @count: users; the last frees it
 * @number: key
 */
struct growing_entry {
	struct hlist_node hash;
	refcount_t count;
	unsigned int number;
	char name[80];
};

struct growing_item {
	struct list_head list;
	char text[112];
};

static DEFINE_MUTEX(growing_lock);
static DEFINE_HASHTABLE(growing_table, 6);
static LIST_HEAD(growing_items);
static LIST_HEAD(growing_batch_items);
static struct kmem_cache *growing_cache;
static unsigned int growing_steps;
static unsigned int growing_number;

static noinline struct growing_entry *growing_lookup(void)
{
	struct growing_entry *entry = kmem_cache_zalloc(growing_cache, GFP_KERNEL);

	if (!entry)
		return NULL;
	entry->number = growing_number++;
	refcount_set(&entry->count, 1);
	hash_add(growing_table, &entry->hash, entry->number);
	return entry;
}

static noinline void growing_put(struct growing_entry *entry)
{
	if (!refcount_dec_and_test(&entry->count))
		return;
	hash_del(&entry->hash);
	kmem_cache_free(growing_cache, entry);
	/* No tail call: this function is to be the caller of the one that frees. */
	barrier();
}

static void growing_drop(struct list_head *list, unsigned int most)
{
	struct growing_item *item, *next;

	list_for_each_entry_safe(item, next, list, list) {
		if (!most--)
			break;
		list_del(&item->list);
		kfree(item);
	}
}

static void growing_add(struct list_head *list, struct growing_item *item)
{
	if (item)
		list_add_tail(&item->list, list);
}

static noinline void growing_pool(void)
{
	unsigned int i;

	growing_drop(&growing_items, GROWING_POOL);
	for (i = 0; i < GROWING_POOL; i++)
		growing_add(&growing_items, kzalloc(sizeof(struct growing_item), GFP_KERNEL));
}

static noinline void growing_batch(void)
{
	unsigned int i;

	if (growing_steps % GROWING_PERIOD == 0)
		growing_drop(&growing_batch_items, UINT_MAX);
	for (i = 0; i < GROWING_BATCH; i++)
		growing_add(&growing_batch_items, kzalloc(sizeof(struct growing_item), GFP_KERNEL));
}

static int growing_step(const char *value, const struct kernel_param *param)
{
	struct growing_entry *entry;
	unsigned int i;

	mutex_lock(&growing_lock);
	for (i = 0; i < GROWING_LOOKUPS; i++) {
		entry = growing_lookup();
		if (entry && i < GROWING_RELEASED)
			growing_put(entry);
	}
	growing_pool();
	growing_batch();
	growing_steps++;
	mutex_unlock(&growing_lock);
	return 0;
}

static const struct kernel_param_ops growing_step_ops = { .set = growing_step };

module_param_cb(step, &growing_step_ops, NULL, 0200);
MODULE_PARM_DESC(step, "does one step, whatever is written");

static int growing_hold(const char *value, const struct kernel_param *param)
{
	char *name = kstrdup(value, GFP_KERNEL);
	struct path path;
	unsigned int i;
	int error = -ENOMEM;

	if (name)
		error = kern_path(strim(name), 0, &path);
	kfree(name);
	if (error)
		return error;
	for (i = 0; i < GROWING_HELD; i++)
		dget(path.dentry);
	path_put(&path);
	return 0;
}

static const struct kernel_param_ops growing_hold_ops = { .set = growing_hold };

module_param_cb(hold, &growing_hold_ops, NULL, 0200);
MODULE_PARM_DESC(hold, "path whose directory entry is held eight times and forgotten");

static int __init growing_init(void)
{
	growing_cache = kmem_cache_create_usercopy("growing-entry", sizeof(struct growing_entry), 0, 0, 0,
						   sizeof(struct growing_entry), NULL);
	return growing_cache ? 0 : -ENOMEM;
}

static void growing_exit(void)
{
	struct growing_entry *entry;
	struct hlist_node *next;
	int bucket;

	hash_for_each_safe(growing_table, bucket, next, entry, hash)
		growing_put(entry);
	growing_drop(&growing_items, UINT_MAX);
	growing_drop(&growing_batch_items, UINT_MAX);
	kmem_cache_destroy(growing_cache);
}

module_init(growing_init);
module_exit(growing_exit);
MODULE_DESCRIPTION("Memory that grows, stays and comes in waves, to test detectors of growth with");
MODULE_AUTHOR("The kleak-vmm authors");
MODULE_LICENSE("GPL");

// SPDX-License-Identifier: GPL-2.0-only
/*
 * annotated: says of its objects what <linux/kmemleak.h> can say of objects, for kernels with CONFIG_DEBUG_KMEMLEAK.
 *
 * Loaded on one, it has lost exactly what annotated_lost() allocated: three objects. On other kernels the annotations are
 * nothing, and a detector that knows nothing of them comes to other results.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/kmemleak.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/string.h>

/**
 * struct annotated_object - what all of them are
 * @first: inside of the area that is read, where an object has one
 * @second: outside
 */
struct annotated_object {
	unsigned long filler[4];
	void *first;
	void *second;
	unsigned long more[8];
};

/* What has a reference for all times. */
static struct annotated_object *annotated_unread, *annotated_partly;

/* Overwrites the part of the stack below the caller. */
static noinline __noclone void annotated_scrub(unsigned int depth)
{
	unsigned long waste[64];

	memset(waste, 0, sizeof(waste));
	barrier_data(waste);
	if (depth)
		annotated_scrub(depth - 1);
	/* No tail call: every level is to have its own frame. */
	barrier_data(waste);
}

/* To be reported. */
static noinline __noclone void *annotated_lost(void)
{
	void *object = kzalloc(sizeof(struct annotated_object), GFP_KERNEL);

	/* No tail call: it is to be found in the backtrace. */
	barrier();
	return object;
}

/* Not to be reported. */
static noinline __noclone void *annotated_held(void)
{
	void *object = kzalloc(sizeof(struct annotated_object), GFP_KERNEL);

	barrier();
	return object;
}

static noinline __noclone bool annotated_plant(void)
{
	struct annotated_object *gray = annotated_held(), *black = annotated_held();

	annotated_unread = annotated_held();
	annotated_partly = annotated_held();
	if (!gray || !black || !annotated_unread || !annotated_partly)
		return false;
	/* Nobody refers to it, and what it refers to is in use. */
	gray->first = annotated_held();
	kmemleak_not_leak(gray);
	/* Nobody refers to it, and what it refers to is lost. */
	black->first = annotated_lost();
	kmemleak_ignore(black);
	annotated_unread->first = annotated_lost();
	kmemleak_no_scan(annotated_unread);
	annotated_partly->first = annotated_held();
	annotated_partly->second = annotated_lost();
	kmemleak_scan_area(&annotated_partly->first, sizeof(annotated_partly->first), GFP_KERNEL);
	return gray->first && black->first && annotated_unread->first && annotated_partly->first &&
	       annotated_partly->second;
}

static int annotated_init(void)
{
	bool planted = annotated_plant();

	annotated_scrub(12);
	return planted ? 0 : -ENOMEM;
}

/* What is lost stays lost. */
static void annotated_exit(void)
{
	kfree(annotated_unread);
	kfree(annotated_partly->first);
	kfree(annotated_partly);
}

module_init(annotated_init);
module_exit(annotated_exit);
MODULE_DESCRIPTION("Annotates its objects for kmemleak");
MODULE_AUTHOR("The kleak-vmm authors");
MODULE_LICENSE("GPL");

// SPDX-License-Identifier: GPL-2.0-only
/*
 * patch: writes bytes over the kernel's code as no kernel should, and allocates and frees behind that:
 *
 *	insmod patch.ko at=0xffffffff8130a0b5 bytes=0x5541 length=2
 *
 * A tracer whose breakpoint was there misses what follows: two dozen objects of 192 bytes and a large one are freed, all of
 * which were allocated before, and as many small ones are allocated and kept until rmmod.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/vmalloc.h>

#define PATCH_OBJECTS 24

static unsigned long at;
module_param(at, ulong, 0444);
MODULE_PARM_DESC(at, "address");

static unsigned long bytes;
module_param(bytes, ulong, 0444);
MODULE_PARM_DESC(bytes, "what to write, lowest byte first");

static unsigned int length;
module_param(length, uint, 0444);
MODULE_PARM_DESC(length, "how many bytes, at most 8");

static void *patch_objects[PATCH_OBJECTS];

/* Through a second mapping: the kernel's own is read-only. */
static int patch_write(void)
{
	struct page *page = pfn_to_page(__pa(at) >> PAGE_SHIFT);
	char *mapped;

	if (length > sizeof(bytes) || offset_in_page(at) + length > PAGE_SIZE)
		return -EINVAL;
	mapped = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	if (!mapped)
		return -ENOMEM;
	memcpy(mapped + offset_in_page(at), &bytes, length);
	vunmap(mapped);
	return 0;
}

static void patch_fill(void)
{
	unsigned int i;

	for (i = 0; i < PATCH_OBJECTS; i++)
		patch_objects[i] = kzalloc(192, GFP_KERNEL);
}

static void patch_empty(void)
{
	unsigned int i;

	for (i = 0; i < PATCH_OBJECTS; i++)
		kfree(patch_objects[i]);
}

static int patch_init(void)
{
	void *large = kzalloc(100000, GFP_KERNEL);
	int error;

	patch_fill();
	error = patch_write();
	patch_empty();
	kfree(large);
	patch_fill();
	return error;
}

static void patch_exit(void)
{
	patch_empty();
}

module_init(patch_init);
module_exit(patch_exit);
MODULE_DESCRIPTION("Overwrites a breakpoint");
MODULE_AUTHOR("The kleak-vmm authors");
MODULE_LICENSE("GPL");

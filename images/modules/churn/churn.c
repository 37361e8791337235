// SPDX-License-Identifier: GPL-2.0-only
/*
 * churn: allocates and frees one small object over and over, and says how long that took.
 *
 *	insmod churn.ko pairs=20000
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/sched.h>
#include <linux/slab.h>

static unsigned int pairs = 20000;
module_param(pairs, uint, 0444);
MODULE_PARM_DESC(pairs, "how often");

static int churn_init(void)
{
	u64 begin = ktime_get_ns();
	unsigned int i;

	for (i = 0; i < pairs; i++) {
		void *object = kmalloc(64, GFP_KERNEL);

		if (!object)
			return -ENOMEM;
		barrier_data(object);
		kfree(object);
		if (i % 256 == 0)
			cond_resched();
	}
	pr_info("%u pairs in %llu ns\n", pairs, ktime_get_ns() - begin);
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

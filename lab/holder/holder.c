// SPDX-License-Identifier: GPL-2.0-only
/*
 * The holder: a peer-to-peer importer of dma-bufs that does as it is told.
 *
 * It attaches to a dma-buf on behalf of any PCI function, whatever drives that
 * function, and maps it. So user space learns what the kernel says about a pair
 * of exporter and importer: an errno, or the DMA addresses. When the exporter
 * takes the memory back the holder unmaps at once, late, or not until told: a
 * well-behaved importer, a slow one and a broken one.
 *
 * No DMA is ever started, so a mapping that is kept too long harms nothing but
 * the patience of whoever waits for it.
 *
 * Every open of /dev/peervram-holder is one hold. A write is one command, its
 * errno is the kernel's answer:
 *
 *	attach DDDD:BB:DD.F FD	attach the dma-buf FD as that function
 *	map			map it for both directions
 *	mode now		on invalidation unmap before returning
 *	mode late MS		on invalidation unmap MS milliseconds later
 *	mode until-told		on invalidation do nothing
 *	unmap			unmap it
 *	release			unmap and detach
 *	take DDDD:BB:DD.F VVVV:DDDD	have the kernel take that function for
 *				another one; it does nothing else for this hold
 *
 * A read from the start gives the state, one "key value" per line. Closing the
 * file releases, always: whoever dies with a hold lets go of it.
 *
 * Addresses are those of the function's default IOMMU domain. A function that
 * VFIO drives translates by another one once it is opened.
 *
 * Locks: hold->lock serialises commands. The reservation lock of the dma-buf
 * guards @table, @mode, @delay_ms and @invalidations, since invalidations come
 * with it held. hold->lock is taken first.
 */
#include <linux/dma-buf.h>
#include <linux/dma-mapping.h>
#include <linux/dma-resv.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/scatterlist.h>
#include <linux/seq_buf.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>

#define COMMAND_MAX_BYTES	64
#define STATE_MAX_BYTES		PAGE_SIZE
#define DELAY_MAX_MS		(10 * 60 * 1000)

enum mode {
	MODE_NOW,
	MODE_LATE,
	MODE_UNTIL_TOLD,
};

static const char * const mode_names[] = {
	[MODE_NOW] = "now",
	[MODE_LATE] = "late",
	[MODE_UNTIL_TOLD] = "until-told",
};

struct hold {
	struct mutex lock;			/* serialises commands */
	struct pci_dev *function;
	struct dma_buf *buffer;
	struct dma_buf_attachment *attachment;	/* NULL: not attached */
	struct sg_table *table;			/* NULL: not mapped */
	enum mode mode;
	unsigned int delay_ms;
	unsigned long invalidations;
	struct delayed_work late_unmap;
};

static void unmap_locked(struct hold *hold)
{
	dma_resv_assert_held(hold->buffer->resv);

	if (!hold->table)
		return;
	dma_buf_unmap_attachment(hold->attachment, hold->table,
				 DMA_BIDIRECTIONAL);
	hold->table = NULL;
}

static void invalidate_mappings(struct dma_buf_attachment *attachment)
{
	struct hold *hold = attachment->importer_priv;

	dma_resv_assert_held(attachment->dmabuf->resv);

	hold->invalidations++;
	if (!hold->table)
		return;
	switch (hold->mode) {
	case MODE_NOW:
		unmap_locked(hold);
		break;
	case MODE_LATE:
		queue_delayed_work(system_dfl_wq, &hold->late_unmap,
				   msecs_to_jiffies(hold->delay_ms));
		break;
	case MODE_UNTIL_TOLD:
		break;
	}
}

static const struct dma_buf_attach_ops attach_ops = {
	.allow_peer2peer = true,
	.invalidate_mappings = invalidate_mappings,
};

/*
 * The dma-buf outlives this: whoever lets go of it cancels this first, and it
 * touches the attachment only while there is a mapping.
 */
static void late_unmap(struct work_struct *work)
{
	struct hold *hold = container_of(to_delayed_work(work), struct hold,
					 late_unmap);

	dma_resv_lock(hold->buffer->resv, NULL);
	unmap_locked(hold);
	dma_resv_unlock(hold->buffer->resv);
}

/* A function without a driver has nobody who said which addresses it reaches. */
static void let_reach_everything(struct pci_dev *function)
{
	device_lock(&function->dev);
	if (!function->dev.driver)
		dma_set_mask(&function->dev, DMA_BIT_MASK(64));
	device_unlock(&function->dev);
}

static int attach(struct hold *hold, const char *arguments)
{
	unsigned int domain, bus, slot, func;
	struct dma_buf_attachment *attachment;
	struct pci_dev *function;
	struct dma_buf *buffer;
	int fd, ret;

	if (sscanf(arguments, "%x:%x:%x.%x %d", &domain, &bus, &slot, &func,
		   &fd) != 5 || bus > 0xff || slot > 0x1f || func > 7)
		return -EINVAL;
	if (hold->attachment)
		return -EBUSY;

	function = pci_get_domain_bus_and_slot(domain, bus,
					       PCI_DEVFN(slot, func));
	if (!function)
		return -ENXIO;
	let_reach_everything(function);

	buffer = dma_buf_get(fd);
	if (IS_ERR(buffer)) {
		ret = PTR_ERR(buffer);
		goto err_function;
	}

	/* Set first: an invalidation may come before the attachment returns. */
	hold->buffer = buffer;
	hold->invalidations = 0;
	attachment = dma_buf_dynamic_attach(buffer, &function->dev, &attach_ops,
					    hold);
	if (IS_ERR(attachment)) {
		ret = PTR_ERR(attachment);
		goto err_buffer;
	}

	hold->function = function;
	hold->attachment = attachment;
	return 0;

err_buffer:
	hold->buffer = NULL;
	dma_buf_put(buffer);
err_function:
	pci_dev_put(function);
	return ret;
}

static int map(struct hold *hold)
{
	struct sg_table *table;
	int ret = 0;

	if (!hold->attachment)
		return -ENOTCONN;

	dma_resv_lock(hold->buffer->resv, NULL);
	if (hold->table) {
		ret = -EBUSY;
		goto unlock;
	}
	table = dma_buf_map_attachment(hold->attachment, DMA_BIDIRECTIONAL);
	if (IS_ERR(table))
		ret = PTR_ERR(table);
	else
		hold->table = table;
unlock:
	dma_resv_unlock(hold->buffer->resv);
	return ret;
}

static int unmap(struct hold *hold)
{
	if (!hold->attachment)
		return -ENOTCONN;

	dma_resv_lock(hold->buffer->resv, NULL);
	unmap_locked(hold);
	dma_resv_unlock(hold->buffer->resv);
	/* Or it would unmap what is mapped next. */
	cancel_delayed_work_sync(&hold->late_unmap);
	return 0;
}

static int release(struct hold *hold)
{
	if (!hold->attachment)
		return -ENOTCONN;

	unmap(hold);
	dma_buf_detach(hold->buffer, hold->attachment);
	hold->attachment = NULL;
	dma_buf_put(hold->buffer);
	hold->buffer = NULL;
	pci_dev_put(hold->function);
	hold->function = NULL;
	return 0;
}

/*
 * The kernel knows a host bridge by the ids of the first device on its root
 * bus. This is what its own quirks do to ids that are wrong; the device itself
 * and its driver notice nothing.
 */
static int take_for(const char *arguments)
{
	unsigned int domain, bus, slot, func, vendor, device;
	struct pci_dev *function;

	if (sscanf(arguments, "%x:%x:%x.%x %x:%x", &domain, &bus, &slot, &func,
		   &vendor, &device) != 6 || bus > 0xff || slot > 0x1f ||
	    func > 7 || vendor > 0xffff || device > 0xffff)
		return -EINVAL;

	function = pci_get_domain_bus_and_slot(domain, bus,
					       PCI_DEVFN(slot, func));
	if (!function)
		return -ENXIO;
	function->vendor = vendor;
	function->device = device;
	pci_dev_put(function);
	return 0;
}

static int set_mode(struct hold *hold, const char *arguments)
{
	unsigned int delay_ms = 0;
	enum mode mode;

	if (!strcmp(arguments, "now"))
		mode = MODE_NOW;
	else if (!strcmp(arguments, "until-told"))
		mode = MODE_UNTIL_TOLD;
	else if (sscanf(arguments, "late %u", &delay_ms) == 1 &&
		 delay_ms <= DELAY_MAX_MS)
		mode = MODE_LATE;
	else
		return -EINVAL;

	if (hold->buffer)
		dma_resv_lock(hold->buffer->resv, NULL);
	hold->mode = mode;
	hold->delay_ms = delay_ms;
	if (hold->buffer)
		dma_resv_unlock(hold->buffer->resv);
	return 0;
}

static int obey(struct hold *hold, char *command)
{
	const char *verb = strsep(&command, " ");
	const char *arguments = command ?: "";

	if (!strcmp(verb, "attach"))
		return attach(hold, arguments);
	if (!strcmp(verb, "map"))
		return map(hold);
	if (!strcmp(verb, "mode"))
		return set_mode(hold, arguments);
	if (!strcmp(verb, "unmap"))
		return unmap(hold);
	if (!strcmp(verb, "release"))
		return release(hold);
	if (!strcmp(verb, "take"))
		return take_for(arguments);
	return -EINVAL;
}

static void describe(struct hold *hold, struct seq_buf *text)
{
	struct scatterlist *entry;
	unsigned int i;

	seq_buf_printf(text, "mode %s\n", mode_names[hold->mode]);
	if (hold->mode == MODE_LATE)
		seq_buf_printf(text, "delay_ms %u\n", hold->delay_ms);
	if (!hold->attachment)
		return;

	seq_buf_printf(text, "function %s\n", pci_name(hold->function));
	seq_buf_printf(text, "size_bytes %zu\n", hold->buffer->size);

	dma_resv_lock(hold->buffer->resv, NULL);
	seq_buf_printf(text, "invalidations %lu\n", hold->invalidations);
	seq_buf_printf(text, "mapped %s\n", hold->table ? "yes" : "no");
	if (hold->table) {
		for_each_sgtable_dma_sg(hold->table, entry, i) {
			dma_addr_t address = sg_dma_address(entry);

			seq_buf_printf(text, "range %pad %u\n", &address,
				       sg_dma_len(entry));
		}
	}
	dma_resv_unlock(hold->buffer->resv);
}

static int hold_open(struct inode *inode, struct file *file)
{
	struct hold *hold = kzalloc_obj(*hold);

	if (!hold)
		return -ENOMEM;
	mutex_init(&hold->lock);
	INIT_DELAYED_WORK(&hold->late_unmap, late_unmap);
	file->private_data = hold;
	return 0;
}

static int hold_close(struct inode *inode, struct file *file)
{
	struct hold *hold = file->private_data;

	release(hold);
	mutex_destroy(&hold->lock);
	kfree(hold);
	return 0;
}

static ssize_t hold_write(struct file *file, const char __user *from,
			  size_t count, loff_t *position)
{
	struct hold *hold = file->private_data;
	char *command;
	int ret;

	if (count > COMMAND_MAX_BYTES)
		return -E2BIG;
	command = memdup_user_nul(from, count);
	if (IS_ERR(command))
		return PTR_ERR(command);

	mutex_lock(&hold->lock);
	ret = obey(hold, strim(command));
	mutex_unlock(&hold->lock);
	kfree(command);
	return ret ?: count;
}

static ssize_t hold_read(struct file *file, char __user *to, size_t count,
			 loff_t *position)
{
	struct hold *hold = file->private_data;
	struct seq_buf text;
	char *buffer;
	ssize_t ret;

	buffer = kmalloc(STATE_MAX_BYTES, GFP_KERNEL);
	if (!buffer)
		return -ENOMEM;
	seq_buf_init(&text, buffer, STATE_MAX_BYTES);

	mutex_lock(&hold->lock);
	describe(hold, &text);
	mutex_unlock(&hold->lock);

	/* A list of ranges that was cut short must not look whole. */
	if (seq_buf_has_overflowed(&text))
		ret = -EOVERFLOW;
	else
		ret = simple_read_from_buffer(to, count, position, buffer,
					      seq_buf_used(&text));
	kfree(buffer);
	return ret;
}

static const struct file_operations hold_operations = {
	.owner = THIS_MODULE,
	.open = hold_open,
	.release = hold_close,
	.write = hold_write,
	.read = hold_read,
	.llseek = default_llseek,
};

static struct miscdevice holder = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "peervram-holder",
	.fops = &hold_operations,
	.mode = 0600,
};
module_misc_device(holder);

MODULE_DESCRIPTION("Peer-to-peer dma-buf importer that does as it is told");
MODULE_LICENSE("GPL");
MODULE_IMPORT_NS("DMA_BUF");

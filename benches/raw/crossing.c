/*
 * The crossing, raw: a range of a VFIO device's memory becomes a dma-buf, the dma-buf becomes a GEM
 * handle of another device, and both are closed again. Four system calls a crossing and nothing
 * else, for peervram's own crossings to be compared with.
 *
 *     crossing DEVICE NODE REGION SIZE_BYTES COUNT
 *     echo | crossing 0000:01:00.0 /dev/dri/card0 2 4096 300
 *
 * DEVICE is a PCI address, or the number of a descriptor of an open VFIO device that was inherited.
 * For each line of standard input it crosses COUNT times and prints how many nanoseconds each took,
 * on one line. Needs the headers of Linux 6.19 or later.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include <drm/drm.h>
#include <linux/iommufd.h>
#include <linux/vfio.h>

/* A request of VFIO_DEVICE_FEATURE_DMA_BUF for one range. */
struct export_request {
	struct vfio_device_feature feature;
	struct vfio_device_feature_dma_buf dma_buf;
	struct vfio_region_dma_range range;
};
_Static_assert(sizeof(struct export_request) == 40, "the kernel reads it without gaps");

static void die(const char *what)
{
	fprintf(stderr, "error: crossing.c: cannot %s: %s\n", what, strerror(errno));
	exit(1);
}

/* For calls that answer -1 on failure and something else on success. */
static int check(int answer, const char *what)
{
	if (answer < 0)
		die(what);
	return answer;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* By /dev/vfio/GROUP and a container; -1 where the kernel has no such file. */
static int open_by_group(const char *address)
{
	char path[PATH_MAX], target[PATH_MAX] = "";
	int group, container;

	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/iommu_group", address);
	check(readlink(path, target, sizeof(target) - 1), "find the device's IOMMU group");
	snprintf(path, sizeof(path), "/dev/vfio/%.64s", basename(target));
	group = open(path, O_RDWR | O_CLOEXEC);
	if (group < 0 && errno == ENOENT)
		return -1;
	check(group, "open the device's VFIO group");
	container = check(open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC), "open /dev/vfio/vfio");
	check(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container), "put the group into a container");
	check(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "set the container's IOMMU");
	return check(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, address), "open the device of the group");
}

/* By /dev/vfio/devices/vfioN and an iommufd. */
static int open_by_cdev(const char *address)
{
	struct vfio_device_bind_iommufd bind = { .argsz = sizeof(bind) };
	struct iommu_ioas_alloc space = { .size = sizeof(space) };
	struct vfio_device_attach_iommufd_pt attach = { .argsz = sizeof(attach) };
	char path[PATH_MAX];
	struct dirent *entry;
	DIR *folder;
	int device;

	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/vfio-dev", address);
	folder = opendir(path);
	if (!folder)
		die("find the device's VFIO folder; is it bound to vfio-pci?");
	while ((entry = readdir(folder)) && entry->d_name[0] == '.')
		;
	if (!entry)
		die("find the device's VFIO name");
	snprintf(path, sizeof(path), "/dev/vfio/devices/%.64s", entry->d_name);
	closedir(folder);
	device = check(open(path, O_RDWR | O_CLOEXEC), "open the VFIO character device");
	bind.iommufd = check(open("/dev/iommu", O_RDWR | O_CLOEXEC), "open /dev/iommu");
	check(ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, &bind), "bind the device to the iommufd");
	check(ioctl(bind.iommufd, IOMMU_IOAS_ALLOC, &space), "make an IO address space");
	attach.pt_id = space.out_ioas_id;
	check(ioctl(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach), "attach the address space");
	return device;
}

/* The device, opened here or before. */
static int take_device(const char *word)
{
	int device;

	if (!strchr(word, ':'))
		return atoi(word);
	device = open_by_group(word);
	return device < 0 ? open_by_cdev(word) : device;
}

static void cross(int device, int node, struct export_request *request)
{
	struct drm_prime_handle prime = { 0 };
	struct drm_gem_close gem = { 0 };

	prime.fd = check(ioctl(device, VFIO_DEVICE_FEATURE, request), "export a dma-buf");
	check(ioctl(node, DRM_IOCTL_PRIME_FD_TO_HANDLE, &prime), "import the dma-buf");
	gem.handle = prime.handle;
	check(ioctl(node, DRM_IOCTL_GEM_CLOSE, &gem), "close the GEM handle");
	check(close(prime.fd), "close the dma-buf");
}

int main(int count, char **arguments)
{
	struct export_request request = {
		.feature.argsz = sizeof(request),
		.feature.flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_BUF,
		.dma_buf.open_flags = O_RDWR | O_CLOEXEC,
		.dma_buf.nr_ranges = 1,
	};
	unsigned long crossings, i;
	uint64_t *times_ns;
	int device, node, order;

	if (count != 6) {
		fprintf(stderr, "usage: crossing DEVICE NODE REGION SIZE_BYTES COUNT\n");
		return 2;
	}
	device = take_device(arguments[1]);
	node = check(open(arguments[2], O_RDWR | O_CLOEXEC), "open the DRM node");
	request.dma_buf.region_index = strtoul(arguments[3], NULL, 0);
	request.range.length = strtoull(arguments[4], NULL, 0);
	crossings = strtoul(arguments[5], NULL, 0);
	times_ns = calloc(crossings, sizeof(*times_ns));
	if (!times_ns)
		die("remember that many times");

	while ((order = getchar()) != EOF) {
		if (order != '\n')
			continue;
		for (i = 0; i < crossings; i++) {
			uint64_t start_ns = now_ns();

			cross(device, node, &request);
			times_ns[i] = now_ns() - start_ns;
		}
		for (i = 0; i < crossings; i++)
			printf("%llu ", (unsigned long long)times_ns[i]);
		puts("");
		fflush(stdout);
	}
	return 0;
}

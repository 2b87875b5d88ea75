/* Preloaded: what is written is with the other end for a while before the writer goes on. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>

ssize_t write(int descriptor, const void *buffer, size_t length)
{
	static ssize_t (*real)(int, const void *, size_t);
	ssize_t written;

	if (!real)
		real = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
	written = real(descriptor, buffer, length);
	if (written > 0)
		usleep(200000);
	return written;
}

#include "base/copy.h"

#include <string.h>

void km_copy(void *to, const void *from, size_t bytes, int threads)
{
	size_t lines = (bytes + 63) / 64, each = (lines + (size_t)threads - 1) / (size_t)threads * 64;

#pragma omp parallel for num_threads(threads) schedule(static, 1)
	for (int i = 0; i < threads; i++) {
		size_t at = (size_t)i * each;

		if (at < bytes)
			memcpy((char *)to + at, (const char *)from + at, bytes - at < each ? bytes - at : each);
	}
}

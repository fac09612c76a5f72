/* memcpy by several threads. */
#ifndef KM_BASE_COPY_H
#define KM_BASE_COPY_H

#include <stddef.h>

/* `threads` parts, each of whole 64 bytes but the last. */
void km_copy(void *to, const void *from, size_t bytes, int threads);

#endif

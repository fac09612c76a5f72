#include "device/cuda_upload.h"

#include <stdlib.h>

#include "base/copy.h"
#include "base/mem.h"
#include "device/cuda_state.h"

/* From here on all threads copy: one copies 6.4 GB/s, 16 53 (an H100's host, from a file's map).
 * Loading 8.4 GB of int4 experts: 31 GB/s with this, 18 with 256 kB, one load each. */
enum { SHARED_COPY_BYTES = 4 << 20 };

struct km_upload {
	km_cuda *cuda;
	int threads, slot;
	size_t used; /* of the slot */
	char *buffer[KM_UPLOAD_SLOTS];
	cudaEvent_t fetched[KM_UPLOAD_SLOTS]; /* the GPU has read all of the slot */
};

static int open_slot(km_upload *u, int i, km_err *err)
{
	KM_TRY(km_cuda_pin(u->cuda, (void **)&u->buffer[i], KM_UPLOAD_SLOT_BYTES, err));
	KM_CUDA_TRY(cudaEventCreateWithFlags(&u->fetched[i], cudaEventDisableTiming), err);
	return 0;
}

int km_upload_open(km_upload **upload, km_cuda *cuda, int threads, km_err *err)
{
	km_upload *u = km_xcalloc(1, sizeof(*u));

	u->cuda = cuda;
	u->threads = threads;
	for (int i = 0; i < KM_UPLOAD_SLOTS; i++) {
		int rc = open_slot(u, i, err);

		if (rc < 0) {
			km_upload_close(u);
			return rc;
		}
	}
	*upload = u;
	return 0;
}

void km_upload_close(km_upload *u)
{
	if (!u)
		return;
	cudaStreamSynchronize(u->cuda->stream);
	for (int i = 0; i < KM_UPLOAD_SLOTS; i++) {
		if (u->fetched[i])
			cudaEventDestroy(u->fetched[i]);
		km_cuda_unpin(u->cuda, u->buffer[i]);
	}
	free(u);
}

static int next_slot(km_upload *u, km_err *err)
{
	KM_CUDA_TRY(cudaEventRecord(u->fetched[u->slot], u->cuda->stream), err);
	u->slot = (u->slot + 1) % KM_UPLOAD_SLOTS;
	u->used = 0;
	KM_CUDA_TRY(cudaEventSynchronize(u->fetched[u->slot]), err);
	return 0;
}

int km_upload_borrow(km_upload *u, void **buffer, size_t bytes, km_err *err)
{
	KM_ASSERT(bytes <= KM_UPLOAD_SLOT_BYTES);
	if (u->used + bytes > KM_UPLOAD_SLOT_BYTES)
		KM_TRY(next_slot(u, err));
	*buffer = u->buffer[u->slot] + u->used;
	return 0;
}

int km_upload_send(km_upload *u, void *to, size_t bytes, km_err *err)
{
	KM_TRY(km_cuda_send(u->cuda, to, u->buffer[u->slot] + u->used, bytes, err));
	u->used += (bytes + 63) / 64 * 64;
	if (u->used > KM_UPLOAD_SLOT_BYTES)
		u->used = KM_UPLOAD_SLOT_BYTES;
	return 0;
}

int km_upload_put(km_upload *u, void *to, const void *from, size_t bytes, km_err *err)
{
	while (bytes) {
		size_t n = bytes < KM_UPLOAD_SLOT_BYTES ? bytes : KM_UPLOAD_SLOT_BYTES;
		size_t left = KM_UPLOAD_SLOT_BYTES - u->used;
		void *buffer;

		if (left >= SHARED_COPY_BYTES && n > left)
			n = left;
		KM_TRY(km_upload_borrow(u, &buffer, n, err));
		km_copy(buffer, from, n, n < SHARED_COPY_BYTES ? 1 : u->threads);
		KM_TRY(km_upload_send(u, to, n, err));
		to = (char *)to + n;
		from = (const char *)from + n;
		bytes -= n;
	}
	return 0;
}

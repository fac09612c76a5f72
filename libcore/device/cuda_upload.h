/*
 * Many pieces of host memory to the GPU, at the speed of the slower of memory and bus.
 *
 * A ring of KM_UPLOAD_SLOTS pinned buffers of KM_UPLOAD_SLOT_BYTES: several threads copy pieces
 * into one while the GPU fetches the others. That is all the host memory it takes, whatever is
 * loaded: pages of a memory map that were read are page cache. Pieces arrive in order, on the GPU's
 * stream: what is enqueued after a put sees its bytes.
 */
#ifndef KM_DEVICE_CUDA_UPLOAD_H
#define KM_DEVICE_CUDA_UPLOAD_H

#include "device/cuda.h"

enum { KM_UPLOAD_SLOTS = 4, KM_UPLOAD_SLOT_BYTES = 32 << 20 };

typedef struct km_upload km_upload;

/* Copies with up to `threads` threads. The cuda is kept. */
int km_upload_open(km_upload **upload, km_cuda *cuda, int threads, km_err *err);
void km_upload_close(km_upload *upload); /* waits for what was put */

/* `from` is borrowed for the call. */
int km_upload_put(km_upload *upload, void *to, const void *from, size_t bytes, km_err *err);

/* A buffer of `bytes` (at most KM_UPLOAD_SLOT_BYTES) to be filled by the caller, and then sent. */
int km_upload_borrow(km_upload *upload, void **buffer, size_t bytes, km_err *err);
int km_upload_send(km_upload *upload, void *to, size_t bytes, km_err *err);

#endif

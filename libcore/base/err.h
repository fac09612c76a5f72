/*
 * Errors: a negative code and one full sentence.
 *
 * The sentence names the file, tensor or option, what was expected and what was found. A function
 * that may fail returns 0 (or a count) on success and a negative km_code on failure, takes `km_err
 * *` as its last parameter, and fills it exactly once; callers pass failures up with KM_TRY. `err`
 * may be NULL when only the code matters. The library never exits; KM_ASSERT is for our own
 * mistakes alone.
 */
#ifndef KM_BASE_ERR_H
#define KM_BASE_ERR_H

#include <stdarg.h>
#include <stddef.h>

enum km_code {
	KM_OK = 0,
	KM_EIO = -1,          /* the operating system said no */
	KM_EFORMAT = -2,      /* bytes that are not what their format says */
	KM_EINVAL = -3,       /* a request or option that makes no sense */
	KM_ENOMEM = -4,       /* planned memory does not fit */
	KM_EUNSUPPORTED = -5, /* makes sense, is not built */
	KM_ENOTFOUND = -6,    /* a file, tensor or name that is not there */
	KM_ECANCELED = -7,    /* somebody asked us to stop */
	KM_EDEVICE = -8,      /* the accelerator failed; sticky */
	KM_ELIMIT = -9,       /* a stated limit was passed */
};

typedef struct km_err {
	int code;
	char msg[1024]; /* one sentence, UTF-8, no newline */
} km_err;

/* Fills `err` (cutting a long sentence) and returns `code`. */
int km_fail(km_err *err, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* vsnprintf, with '?' for control characters and what is not UTF-8: what km_fail makes of its
 * arguments. */
void km_err_sentence(char *to, size_t cap, const char *fmt, va_list ap);

/* Puts "context: " before the sentence already in `err`; returns its code. */
int km_fail_within(km_err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define KM_TRY(call)                                                                               \
	do {                                                                                       \
		int km_try_rc_ = (call);                                                           \
		if (km_try_rc_ < 0)                                                                \
			return km_try_rc_;                                                         \
	} while (0)

_Noreturn void km_assert_failed(const char *file, int line, const char *what);

#define KM_ASSERT(cond) ((cond) ? (void)0 : km_assert_failed(__FILE__, __LINE__, #cond))

#endif

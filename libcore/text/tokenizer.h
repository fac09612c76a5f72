/*
 * The tokenizer: tiktoken's vocabulary file, Kimi's pre-tokenisation pattern, special tokens.
 *
 * Opened from a checkpoint folder: `tiktoken.model` (ranks 0..n-1) and `tokenizer_config.json`. The
 * ids behind the ranks, n..n+255, are the reserved block: `added_tokens_decoder` names some of
 * them, the others are `<|reserved_token_ID|>`, as upstream has it. A vocabulary too small for a
 * block of 256 says so with the key `num_reserved_special_tokens` (km_vocab_synthesize writes
 * such). Immutable after opening; any number of threads may encode at once.
 */
#ifndef KM_TEXT_TOKENIZER_H
#define KM_TEXT_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"

typedef struct km_tokenizer km_tokenizer;

typedef struct km_ids {
	int32_t *data; /* owned */
	size_t len, cap;
} km_ids;

void km_ids_append(km_ids *ids, const int32_t *data, size_t len);
void km_ids_release(km_ids *ids);

/* KM_ENOTFOUND, KM_EIO: a file that is not there or cannot be read; KM_EFORMAT: one that is not
 * what it should be, with file, line and what was expected. */
int km_tokenizer_open(km_tokenizer **tokenizer, const char *dir, km_err *err);
void km_tokenizer_close(km_tokenizer *tokenizer);

/* Appends the ids of text[0..len) (UTF-8; ill-formed bytes are U+FFFD). With `parse_special` the
 * names of special tokens become their ids, otherwise they are ordinary text. Time is n log n at
 * worst. */
int km_tokenizer_encode(const km_tokenizer *tokenizer, const char *text, size_t len,
                        bool parse_special, km_ids *ids, km_err *err);

/*
 * The same for a text that comes in pieces, each encoded apart. Upstream cuts long texts (every
 * 400,000 characters, and wherever 25,000 characters in a row are all white space or all not) and
 * so must we, to give the same ids; the state carries the count from piece to piece. Zero it first.
 * Where upstream's cut would fall inside a special token's name, the token stays whole here.
 */
typedef struct km_tokenizer_cuts {
	uint32_t in_slice, in_run; /* characters so far */
	bool space;                /* what the run consists of */
} km_tokenizer_cuts;

int km_tokenizer_encode_piece(const km_tokenizer *tokenizer, km_tokenizer_cuts *cuts,
			      const char *text, size_t len, bool parse_special, km_ids *ids);

/* A token's bytes (not NUL-terminated; special tokens give their name); NULL: no such id. */
const char *km_tokenizer_bytes(const km_tokenizer *tokenizer, int32_t id, size_t *len);
/* Marked special in tokenizer_config.json: what skip_special_tokens leaves out of decoded text.
 * False for the tool-call and think markers, as upstream. */
bool km_tokenizer_is_special(const km_tokenizer *tokenizer, int32_t id);
int32_t km_tokenizer_special(const km_tokenizer *tokenizer, const char *name); /* -1: none */
int32_t km_tokenizer_vocab_size(const km_tokenizer *tokenizer); /* one past the highest id */
/* where the reserved block starts */
int32_t km_tokenizer_base_size(const km_tokenizer *tokenizer);

/* Streaming decode: bytes in, whole characters out. At most 3 bytes are held. Zero it first. */
typedef struct km_utf8_stream {
	char tail[4];
	int held;
} km_utf8_stream;

void km_utf8_stream_push(km_utf8_stream *stream, const char *bytes, size_t len, km_buf *out);
void km_utf8_stream_flush(km_utf8_stream *stream, km_buf *out); /* what is held becomes U+FFFD */

#endif

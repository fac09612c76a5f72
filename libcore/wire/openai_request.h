/*
 * OpenAI request bodies: from untrusted bytes to a plain struct, or to one error that names the
 * field.
 *
 * Both generation endpoints share everything but the prompt. What is known and built is read; what
 * is known and not built (images, forced tools, JSON schemas, best_of...) is refused with a 400
 * whose sentence says so; what is unknown is ignored, as every server of this API does. Nothing
 * here needs the model: limits that do (context length, vocabulary) are the caller's, see
 * km_openai_limits.
 *
 * Memory: the request owns the parsed body and borrows from it; km_openai_request_release drops
 * all. Any thread, no shared state.
 */
#ifndef KM_WIRE_OPENAI_REQUEST_H
#define KM_WIRE_OPENAI_REQUEST_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/engine.h"
#include "text/tokenizer.h"
#include "wire/openai_error.h"

enum km_endpoint { KM_ENDPOINT_CHAT, KM_ENDPOINT_COMPLETIONS };

enum {
	KM_MAX_SAMPLES = 128,  /* n, and n times prompts */
	KM_MAX_STOPS = 16,     /* stop strings of a request */
	KM_MAX_STOP_IDS = 64,
	KM_MAX_BIAS = 1024,    /* logit_bias entries */
	KM_MAX_JSON_DEPTH = 128,
	KM_MAX_JSON_VALUES = 2000000, /* 600 MB when they are objects in objects */
};

typedef struct km_openai_limits {
	int32_t vocab_size;
	const char *const *models; /* [model_count] names that `model` may say */
	int model_count;
	km_sampling sampling;      /* what a request that says nothing gets */
} km_openai_limits;

typedef struct km_openai_prompt {
	const char *text; /* borrowed from the body, or NULL: ids */
	size_t len;
	km_ids ids;       /* owned */
} km_openai_prompt;

typedef struct km_openai_request {
	enum km_endpoint endpoint;
	json_t *body; /* owned */

	/* chat */
	const json_t *messages, *tools; /* borrowed; tools NULL when there are none to render */
	bool parse_tools;               /* tools given and tool_choice is not none */
	bool parallel_tool_calls;
	int history_tool_calls;
	int thinking;                   /* -1: not said */
	bool preserve_thinking, continue_final_message, add_generation_prompt;
	bool separate_reasoning, stream_reasoning;

	/* completions */
	km_openai_prompt *prompts; /* owned [prompt_count] */
	int prompt_count;
	bool echo;

	/* both */
	bool stream, include_usage, continuous_usage;
	int n;
	int max_tokens;   /* -1: not said */
	int logprobs;     /* -1: none, else how many alternatives */
	bool ignore_eos, skip_special_tokens;
	km_sampling sampling; /* bias is owned here */
	km_logit_bias *bias;
	const char *stop[KM_MAX_STOPS];
	int stop_count;
	int32_t stop_ids[KM_MAX_STOP_IDS];
	int stop_id_count;
} km_openai_request;

/* Parses one body. On failure (negative) `error` is filled and there is nothing to release. */
int km_openai_request_parse(km_openai_request *request, enum km_endpoint endpoint, const char *body,
                            size_t len, const km_openai_limits *limits, km_openai_error *error);
void km_openai_request_release(km_openai_request *request);

/* The same for a body that is already JSON (a batch line): takes over the reference to `body`. */
int km_openai_request_from_json(km_openai_request *request, enum km_endpoint endpoint, json_t *body,
                                const km_openai_limits *limits, km_openai_error *error);

/* JSON of any endpoint: UTF-8, depth, count of values and syntax checked, an object or an error.
 * NULL on failure. */
json_t *km_openai_load(const char *body, size_t len, km_openai_error *error);

/* The sampling defaults that a checkpoint's generation_config.json states, over those in
 * `sampling`. A missing file changes nothing. */
int km_openai_sampling_defaults(km_sampling *sampling, const char *model_dir, km_err *err);

#endif

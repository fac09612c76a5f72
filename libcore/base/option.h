/*
 * One option table for parser, --help and the man page's test.
 *
 * A tool declares a const table; each row says where its value goes (an offset into the tool's
 * options struct). Values are checked against their range or choices while parsing. `--help` and
 * `--version` are added to every table. A refused row names an option that users know from other
 * engines and that is not built here: using it is an error whose sentence is the row's help.
 */
#ifndef KM_BASE_OPTION_H
#define KM_BASE_OPTION_H

#include <stddef.h>

#include "base/err.h"

enum km_option_kind {
	KM_OPT_HEADING, /* `help` is a heading for --help; nothing else is used */
	KM_OPT_FLAG,    /* bool: set to true */
	KM_OPT_INT,     /* int64_t in [min, max] */
	KM_OPT_BYTES,   /* int64_t in [min, max]; suffixes K M G T are powers of 1024 */
	KM_OPT_NUMBER,  /* double in [min, max] */
	KM_OPT_STRING,  /* const char *, borrowed from argv */
	KM_OPT_CHOICE,  /* const char *, one of `choices` ("a|b|c") */
	KM_OPT_ACCEPTED, /* takes `arg` if there is one; means nothing here, `help` says why */
	KM_OPT_REFUSED, /* takes `arg` if there is one; using it fails with `help` as the reason */
};

typedef struct km_option {
	enum km_option_kind kind;
	/* "model-path,model": the first is the one shown first; one letter makes -x */
	const char *names;
	const char *arg;   /* what --help calls the value, or NULL for none */
	size_t offset;     /* offsetof(struct, field) */
	const char *help;
	double min, max; /* of numbers; both 0: no range */
	const char *choices;
} km_option;

typedef struct km_usage {
	const char *tool;     /* "kimi-convert" */
	const char *synopsis; /* "[OPTION]... --inspect DIR": more forms after a newline */
	const char *summary;  /* one line: what it does */
	const km_option *options;
	int count;
	int max_operands; /* operands beyond it are a usage error */
} km_usage;

enum km_option_result { KM_OPTION_RUN = 0, KM_OPTION_DONE = 1 };

/*
 * Parses argv into `values` (kept: strings point into argv). Operands (what is not an option, and
 * all after "--") are moved to argv[1..*operands]. Returns KM_OPTION_DONE after printing --help or
 * --version on stdout, KM_EINVAL with a sentence otherwise wrong; tools exit with 2 then.
 */
int km_option_parse(const km_usage *usage, void *values, int argc, char **argv, int *operands,
                    km_err *err);

/* "12", "1.5G", "64K" to bytes; KM_EINVAL names `what`. */
int km_parse_bytes(const char *s, const char *what, double *bytes, km_err *err);

#define KM_VERSION "0.1.0"

#endif

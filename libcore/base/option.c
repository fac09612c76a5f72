#include "base/option.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

enum { HELP_VALUE = 1 << 20, VERSION_VALUE };

static const char *next_name(const char **names, size_t *len)
{
	const char *s = *names, *comma;

	if (!s || !*s)
		return NULL;
	comma = strchr(s, ',');
	*len = comma ? (size_t)(comma - s) : strlen(s);
	*names = comma ? comma + 1 : s + *len;
	return s;
}

static void print_option(const km_option *opt)
{
	const char *names = opt->names, *name;
	char left[256] = "";
	size_t len, at = 0;
	bool first = true;

	while ((name = next_name(&names, &len))) {
		at += (size_t)snprintf(left + at, sizeof(left) - at, "%s%s%.*s",
		                       first ? "  " : ", ", len == 1 ? "-" : "--", (int)len, name);
		first = false;
	}
	if (opt->arg)
		at += (size_t)snprintf(left + at, sizeof(left) - at, " %s", opt->arg);
	if (at > 30)
		printf("%s\n%32s%s", left, "", opt->help);
	else
		printf("%-32s%s", left, opt->help);
	if (opt->choices)
		printf(" (%s)", opt->choices);
	putchar('\n');
}

static void print_help(const km_usage *usage)
{
	const char *line = usage->synopsis;
	const char *lead = "usage:";

	while (line && *line) {
		size_t n = strcspn(line, "\n");

		printf("%s %s %.*s\n", lead, usage->tool, (int)n, line);
		lead = "      ";
		line += n + (line[n] == '\n');
	}
	printf("%s\n\n", usage->summary);
	for (int i = 0; i < usage->count; i++) {
		const km_option *opt = &usage->options[i];

		if (opt->kind == KM_OPT_HEADING)
			printf("%s%s:\n", i ? "\n" : "", opt->help);
		else if (opt->kind != KM_OPT_REFUSED)
			print_option(opt);
	}
	printf("\n  --help                        print this and exit\n"
	       "  --version                     print the version and exit\n");
}

int km_parse_bytes(const char *s, const char *what, double *bytes, km_err *err)
{
	static const char suffixes[] = "KMGT";
	const char *suffix;
	char *end;
	double value;

	errno = 0;
	value = strtod(s, &end);
	if (end == s || errno || !isfinite(value))
		return km_fail(err, KM_EINVAL, "%s takes a number of bytes such as 64M, not '%s'",
		               what, s);
	suffix = *end ? strchr(suffixes, *end >= 'a' ? *end - 32 : *end) : NULL;
	if (suffix && *suffix) {
		value *= (double)(INT64_C(1) << (10 * (suffix - suffixes + 1)));
		end++;
		end += *end == 'i';
		end += *end == 'B';
	}
	if (*end)
		return km_fail(err, KM_EINVAL, "%s takes a number of bytes such as 64M, not '%s'",
		               what, s);
	*bytes = value;
	return 0;
}

static int parse_number(const km_option *opt, const char *name, const char *s, double *value,
                        km_err *err)
{
	char *end;

	if (opt->kind == KM_OPT_BYTES) {
		KM_TRY(km_parse_bytes(s, name, value, err));
	} else {
		errno = 0;
		*value = opt->kind == KM_OPT_INT ? (double)strtoll(s, &end, 10) : strtod(s, &end);
		if (end == s || *end || errno || !isfinite(*value))
			return km_fail(err, KM_EINVAL, "%s takes %s, not '%s'", name,
			               opt->kind == KM_OPT_INT ? "a whole number" : "a number", s);
	}
	if ((opt->min != 0 || opt->max != 0) && (*value < opt->min || *value > opt->max))
		return km_fail(err, KM_EINVAL, "%s takes a value from %.15g to %.15g, not '%s'",
		               name, opt->min, opt->max, s);
	return 0;
}

static bool is_choice(const char *choices, const char *s)
{
	size_t len = strlen(s);

	for (const char *c = choices; *c;) {
		size_t n = strcspn(c, "|");

		if (n == len && !memcmp(c, s, n))
			return true;
		c += n + (c[n] == '|');
	}
	return false;
}

static int store(const km_option *opt, const char *name, const char *arg, char *values, km_err *err)
{
	void *to = values + opt->offset;
	double number = 0;

	switch (opt->kind) {
	case KM_OPT_FLAG:
		*(bool *)to = true;
		return 0;
	case KM_OPT_INT:
	case KM_OPT_BYTES:
		KM_TRY(parse_number(opt, name, arg, &number, err));
		*(int64_t *)to = (int64_t)number;
		return 0;
	case KM_OPT_NUMBER:
		KM_TRY(parse_number(opt, name, arg, &number, err));
		*(double *)to = number;
		return 0;
	case KM_OPT_CHOICE:
		if (!is_choice(opt->choices, arg))
			return km_fail(err, KM_EINVAL, "%s takes one of %s, not '%s'", name,
			               opt->choices, arg);
		*(const char **)to = arg;
		return 0;
	case KM_OPT_STRING:
		*(const char **)to = arg;
		return 0;
	case KM_OPT_REFUSED:
		return km_fail(err, KM_EUNSUPPORTED, "%s: %s", name, opt->help);
	case KM_OPT_ACCEPTED:
	case KM_OPT_HEADING:
		return 0;
	}
	return 0;
}

struct spellings {
	struct option *longs;
	char **owned; /* the long names, NUL-terminated */
	int count;
	char shorts[128];
	int short_row[128];
};

static void add_spelling(struct spellings *sp, const km_option *opt, int row, const char *name,
                         size_t len)
{
	size_t at = strlen(sp->shorts);

	if (len == 1) {
		snprintf(sp->shorts + at, sizeof(sp->shorts) - at, "%c%s", *name,
		         opt->arg ? ":" : "");
		sp->short_row[(unsigned char)*name & 127] = row;
		return;
	}
	sp->owned = km_xreallocarray(sp->owned, (size_t)sp->count + 1, sizeof(*sp->owned));
	sp->longs = km_xreallocarray(sp->longs, (size_t)sp->count + 2, sizeof(*sp->longs));
	sp->owned[sp->count] = km_xstrndup(name, len);
	sp->longs[sp->count] = (struct option){ sp->owned[sp->count],
	                                        opt->arg ? required_argument : no_argument, NULL,
	                                        256 + row };
	sp->longs[++sp->count] = (struct option){ 0 };
}

static void spellings_init(struct spellings *sp, const km_usage *usage)
{
	static const km_option no_arg = { .kind = KM_OPT_FLAG };

	memset(sp, 0, sizeof(*sp));
	sp->shorts[0] = ':';
	for (int i = 0; i < usage->count; i++) {
		const char *names = usage->options[i].names, *name;
		size_t len;

		while ((name = next_name(&names, &len)))
			add_spelling(sp, &usage->options[i], i, name, len);
	}
	add_spelling(sp, &no_arg, HELP_VALUE - 256, "help", 4);
	add_spelling(sp, &no_arg, VERSION_VALUE - 256, "version", 7);
}

static void spellings_release(struct spellings *sp)
{
	for (int i = 0; i < sp->count; i++)
		free(sp->owned[i]);
	free(sp->owned);
	free(sp->longs);
}

static int complain(const km_usage *usage, int c, char **argv, km_err *err)
{
	const char *word = argv[optind - 1];

	if (c == ':')
		return km_fail(err, KM_EINVAL, "%s needs a value; see '%s --help'", word,
		               usage->tool);
	if (optopt && optopt < 128)
		return km_fail(err, KM_EINVAL, "unknown option -%c; see '%s --help'", optopt,
		               usage->tool);
	if (optopt)
		return km_fail(err, KM_EINVAL, "%s takes no value", word);
	return km_fail(err, KM_EINVAL, "unknown or ambiguous option %s; see '%s --help'", word,
	               usage->tool);
}

static int parse_all(const km_usage *usage, struct spellings *sp, void *values, int argc,
                     char **argv, km_err *err)
{
	int c, at = 0;

	optind = 0; /* restart: a test parses more than once */
	opterr = 0;
	while ((c = getopt_long(argc, argv, sp->shorts, sp->longs, &at)) != -1) {
		char name[80];
		int row;

		if (c == '?' || c == ':')
			return complain(usage, c, argv, err);
		if (c == HELP_VALUE) {
			print_help(usage);
			return KM_OPTION_DONE;
		}
		if (c == VERSION_VALUE) {
			printf("%s %s\n", usage->tool, KM_VERSION);
			return KM_OPTION_DONE;
		}
		row = c >= 256 ? c - 256 : sp->short_row[c & 127];
		if (c >= 256)
			snprintf(name, sizeof(name), "--%s", sp->longs[at].name);
		else
			snprintf(name, sizeof(name), "-%c", c);
		KM_TRY(store(&usage->options[row], name, optarg, values, err));
	}
	return KM_OPTION_RUN;
}

int km_option_parse(const km_usage *usage, void *values, int argc, char **argv, int *operands,
                    km_err *err)
{
	struct spellings sp;
	int rc;

	spellings_init(&sp, usage);
	rc = parse_all(usage, &sp, values, argc, argv, err);
	spellings_release(&sp);
	if (rc != KM_OPTION_RUN)
		return rc;
	*operands = argc - optind; /* getopt_long has permuted the operands to the end */
	if (*operands > usage->max_operands)
		return km_fail(err, KM_EINVAL, "unexpected operand '%s'; see '%s --help'",
		               argv[optind + usage->max_operands], usage->tool);
	memmove(argv + 1, argv + optind, (size_t)*operands * sizeof(*argv));
	return KM_OPTION_RUN;
}

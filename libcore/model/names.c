#include "model/names.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

static bool take(const char **s, const char *prefix)
{
	size_t n = strlen(prefix);

	if (strncmp(*s, prefix, n) != 0)
		return false;
	*s += n;
	return true;
}

static bool begins(const char *s, const char *prefix)
{
	return take(&s, prefix);
}

enum km_name_scope km_name_key(const char *name, const char **key)
{
	const char *s = name;
	bool wrapped, inner;

	*key = name;
	if (begins(name, "vision_tower.") || begins(name, "mm_projector."))
		return KM_NAME_VISION;
	wrapped = take(&s, "language_model.");
	inner = take(&s, "model.");
	if (inner ? begins(s, "layers.") || begins(s, "embed_tokens.") || begins(s, "norm.")
	          : begins(s, "lm_head.") || (wrapped && begins(s, "layers."))) {
		*key = s;
		return KM_NAME_TEXT;
	}
	return KM_NAME_UNKNOWN;
}

int km_name_layer(const char *key)
{
	int layer = 0, digits = 0;

	if (!take(&key, "layers."))
		return -1;
	for (; *key >= '0' && *key <= '9' && digits < 6; key++, digits++)
		layer = layer * 10 + (*key - '0');
	return digits && *key == '.' ? layer : -1;
}

void km_name_on_disk(char *out, size_t cap, enum km_model_kind kind, const char *key)
{
	const char *wrapper = kind == KM_KIND_KIMI_K25 ? "language_model." : "";

	if (begins(key, "vision_tower.") || begins(key, "mm_projector."))
		snprintf(out, cap, "%s", key);
	else
		snprintf(out, cap, "%s%s%s", wrapper, begins(key, "lm_head.") ? "" : "model.", key);
}

/* ---- ignore rules --------------------------------------------------------------------------- */

struct rule {
	const char *literal; /* borrowed from the config, NULL for a pattern */
	pcre2_code *code;
};

struct km_ignore_rules {
	bool wrapped, components;
	int count;
	struct rule *rules;
	pcre2_match_data *match;
	pcre2_match_context *limits;
};

enum { MAX_STEPS = 100000 }; /* a pattern of the published configs takes under 200 on one name */

static int compile(struct rule *rule, const char *pattern, km_err *err)
{
	int code;
	PCRE2_SIZE at;

	rule->code = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
	                           PCRE2_ANCHORED | PCRE2_UTF, &code, &at, NULL);
	if (!rule->code) {
		PCRE2_UCHAR why[128];

		pcre2_get_error_message(code, why, sizeof(why));
		return km_fail(err, KM_EFORMAT,
		               "quantization_config.ignore: \"re:%.200s\" is not a regular "
		               "expression: %s at %zu",
		               pattern, (const char *)why, (size_t)at);
	}
	pcre2_jit_compile(rule->code,
	                  PCRE2_JIT_COMPLETE); /* where it cannot, the interpreter runs */
	return 0;
}

int km_ignore_rules_open(km_ignore_rules **out, const km_config *config, km_err *err)
{
	const km_quant_config *quant = &config->quant;
	km_ignore_rules *r = km_xcalloc(1, sizeof(*r));

	r->wrapped = config->kind == KM_KIND_KIMI_K25;
	r->components = quant->method == KM_QUANT_FP8_BLOCK;
	r->rules = km_xcalloc((size_t)quant->ignore_count, sizeof(*r->rules));
	r->match = pcre2_match_data_create(1, NULL);
	r->limits = pcre2_match_context_create(NULL);
	pcre2_set_match_limit(r->limits, MAX_STEPS);
	for (int i = 0; i < quant->ignore_count; i++) {
		const char *entry = quant->ignore[i];
		int rc = 0;

		r->count = i + 1;
		if (take(&entry, "re:"))
			rc = compile(&r->rules[i], entry, err);
		else
			r->rules[i].literal = entry;
		if (rc < 0) {
			km_ignore_rules_close(r);
			return rc;
		}
	}
	*out = r;
	return 0;
}

void km_ignore_rules_close(km_ignore_rules *r)
{
	if (!r)
		return;
	for (int i = 0; i < r->count; i++)
		pcre2_code_free(r->rules[i].code);
	pcre2_match_data_free(r->match);
	pcre2_match_context_free(r->limits);
	free(r->rules);
	free(r);
}

static bool has_components(const char *name, const char *run)
{
	size_t n = strlen(run);

	for (const char *at = strstr(name, run); n && at; at = strstr(at + 1, run))
		if ((at == name || at[-1] == '.') && (!at[n] || at[n] == '.'))
			return true;
	return false;
}

static int rule_matches(const km_ignore_rules *r, const struct rule *rule, const char *name,
                        km_err *err)
{
	int rc;

	if (rule->literal)
		return r->components ? has_components(name, rule->literal)
		                     : !strcmp(name, rule->literal);
	rc = pcre2_match(rule->code, (PCRE2_SPTR)name, strlen(name), 0, 0, r->match, r->limits);
	if (rc >= 0 || rc == PCRE2_ERROR_NOMATCH)
		return rc >= 0;
	return km_fail(err, KM_ELIMIT,
	               "quantization_config.ignore: pattern %d takes too many steps on \"%s\"",
	               (int)(rule - r->rules), name);
}

static int any_rule(const km_ignore_rules *r, const char *name, km_err *err)
{
	for (int i = 0; i < r->count; i++) {
		int rc = rule_matches(r, &r->rules[i], name, err);

		if (rc)
			return rc;
	}
	return 0;
}

int km_ignore_rules_match(km_ignore_rules *r, const char *key, km_err *err)
{
	bool head = !strcmp(key, "lm_head");
	char name[512];
	int rc;

	if (!r->count)
		return 0;
	snprintf(name, sizeof(name), "%s%s%s", "language_model.", head ? "" : "model.", key);
	rc = any_rule(r, name + strlen("language_model."), err);
	if (rc || !r->wrapped)
		return rc;
	rc = any_rule(r, name, err);
	if (rc || head)
		return rc;
	snprintf(name, sizeof(name), "language_model.%s", key);
	return any_rule(r, name, err);
}

bool km_name_ends(const char *name, const char *end)
{
	size_t n = strlen(name), m = strlen(end);

	return n >= m && !strcmp(name + n - m, end);
}

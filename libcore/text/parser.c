/*
 * Two layers. The front end turns bytes into text and markers: '<' opens every marker and occurs
 * nowhere else in one, so a held prefix that fails is text as a whole and the search goes on at the
 * byte that failed. The state machine below it sees text and markers only; what it does depends on
 * their sequence and never on where a run of text was cut.
 *
 *                 section begin  section end  call begin  argument begin  call end  think  /think
 *   CONTENT       SECTION        drop         HEADER      drop            drop      REASON drop
 *   REASONING     SECTION        drop         HEADER      drop            drop      drop   CONTENT
 *   SECTION       drop           CONTENT      HEADER      drop            drop      drop   drop
 *   HEADER        x SECTION      x CONTENT    x HEADER    ARGUMENTS       x after   drop   drop
 *   ARGUMENTS     end, SECTION   end, CONTENT end, HEADER text            end       text   text
 *
 * "x" drops the header, "end" ends the call, "after" is SECTION or, for a call outside of any,
 * CONTENT. ARGUMENTS has three forms: streamed out as they come (the name is known), collected (the
 * name must be inferred from them), dropped (no name can be found).
 *
 * White space is held where only what follows tells whether it is layout: at the start of a segment
 * of content (a segment ends where a section or a call begins), and at the end of arguments. Text
 * otherwise goes out at once, so that nothing is held longer than it is uncertain.
 */
#include "text/parser.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/mem.h"
#include "base/utf8.h"
#include "text/tool_name.h"

const char *const km_marker_text[KM_MARK_COUNT] = {
	[KM_MARK_SECTION_BEGIN] = "<|tool_calls_section_begin|>",
	[KM_MARK_SECTION_END] = "<|tool_calls_section_end|>",
	[KM_MARK_CALL_BEGIN] = "<|tool_call_begin|>",
	[KM_MARK_ARGUMENT_BEGIN] = "<|tool_call_argument_begin|>",
	[KM_MARK_CALL_END] = "<|tool_call_end|>",
	[KM_MARK_THINK] = "<think>",
	[KM_MARK_THINK_END] = "</think>",
};

/* What the byte front end looks for: the markers and the singular spellings of the section's. */
enum { SPELLINGS = KM_MARK_COUNT + 2, LONGEST = 28 };

static const struct spelling {
	const char *text;
	enum km_marker marker;
} spellings[SPELLINGS] = {
	{ "<|tool_calls_section_begin|>", KM_MARK_SECTION_BEGIN },
	{ "<|tool_calls_section_end|>", KM_MARK_SECTION_END },
	{ "<|tool_call_begin|>", KM_MARK_CALL_BEGIN },
	{ "<|tool_call_argument_begin|>", KM_MARK_ARGUMENT_BEGIN },
	{ "<|tool_call_end|>", KM_MARK_CALL_END },
	{ "<think>", KM_MARK_THINK },
	{ "</think>", KM_MARK_THINK_END },
	{ "<|tool_call_section_begin|>", KM_MARK_SECTION_BEGIN },
	{ "<|tool_call_section_end|>", KM_MARK_SECTION_END },
};

enum state {
	CONTENT, REASONING, SECTION, HEADER, ARGUMENTS, ARGUMENTS_COLLECTED, ARGUMENTS_DROPPED,
};

struct km_parser {
	km_parser_options options;
	enum state state;
	bool in_section;      /* a section is open: calls return to it */
	bool segment_started; /* this segment of content has had more than white space */
	bool first_segment;   /* no section and no bare call yet */
	bool arguments_started;
	bool long_run;        /* a run of white space passed the limit and goes out as it comes */
	bool too_long;        /* the header or the collected arguments passed theirs */
	km_buf space;         /* held white space: of the segment, or at the end of arguments */
	size_t first_space;   /* how much of it lies before the first section */
	km_buf header;        /* of the open call */
	km_buf arguments;     /* collected */
	km_buf id, name;
	int calls;
	int open_call;        /* index of the call whose arguments come */
	size_t format_bytes;

	/* the byte front end */
	char held[LONGEST];   /* a prefix of at least one spelling */
	size_t held_len;
	unsigned candidates;  /* a bit for each spelling that `held` begins */
	char tail[4];         /* a character that the input has cut */
	size_t tail_len;
};

/* ---- what goes out ---- */

static void emit(km_parser *p, enum km_parser_event_kind kind, const char *s, size_t n)
{
	km_parser_event event = { .kind = kind, .text = s, .len = n, .call_index = -1 };

	if (!n)
		return;
	if (kind == KM_PARSED_ARGUMENTS)
		event.call_index = p->open_call;
	p->options.on_event(p->options.ctx, &event);
}

static void repair(km_parser *p, const char *what, const char *s, size_t n)
{
	if (p->options.on_repair)
		p->options.on_repair(p->options.ctx, what, s, n);
}

static void drop(km_parser *p, const char *what, const char *s, size_t n)
{
	if (n)
		repair(p, what, s, n);
}

static void mend(km_parser *p, const char *what)
{
	repair(p, what, NULL, 0);
}

/* ---- white space ---- */

static bool is_space(char c)
{
	return c == ' ' || (c >= '\t' && c <= '\r');
}

static size_t leading_space(const char *s, size_t n)
{
	size_t i = 0;

	while (i < n && is_space(s[i]))
		i++;
	return i;
}

static size_t trailing_space(const char *s, size_t n)
{
	size_t i = n;

	while (i && is_space(s[i - 1]))
		i--;
	return n - i;
}

static void forget_space(km_parser *p, size_t keep)
{
	if (keep > p->space.len)
		keep = p->space.len;
	p->format_bytes += p->space.len - keep;
	p->space.len = p->first_space = keep;
}

static void emit_space(km_parser *p, enum km_parser_event_kind kind)
{
	emit(p, kind, p->space.data, p->space.len);
	km_buf_clear(&p->space);
	p->first_space = 0;
}

/* ---- segments of content ---- */

static void segment_text(km_parser *p, const char *s, size_t n)
{
	if (!p->segment_started && p->options.tools) {
		size_t lead = leading_space(s, n);

		if (lead == n && p->space.len + n <= KM_PARSER_HOLD_MAX) {
			km_buf_append(&p->space, s, n);
			return;
		}
		emit_space(p, KM_PARSED_CONTENT);
		p->segment_started = true;
	}
	emit(p, KM_PARSED_CONTENT, s, n);
}

/* A section or a bare call begins: the segment before it is whole. */
static void segment_end(km_parser *p)
{
	if (p->first_segment)
		p->first_space = p->space.len;
	else
		forget_space(p, p->first_space);
	p->first_segment = false;
	p->segment_started = false;
}

/* ---- calls ---- */

static void call_open(km_parser *p, const char *name, size_t name_len, const char *text, size_t n)
{
	km_parser_event event = { .kind = KM_PARSED_CALL, .text = text, .len = n };

	forget_space(p, 0); /* what was held before the call was layout */
	km_buf_clear(&p->name);
	km_buf_append(&p->name, name, name_len);
	km_buf_clear(&p->id);
	km_buf_puts(&p->id, "functions.");
	km_buf_append(&p->id, name, name_len);
	km_buf_printf(&p->id, ":%d", p->options.history_tool_calls + p->calls);
	event.id = p->id.data;
	event.name = p->name.data;
	event.call_index = p->open_call = p->calls++;
	p->options.on_event(p->options.ctx, &event);
}

static void header_open(km_parser *p)
{
	km_buf_clear(&p->header);
	km_buf_clear(&p->arguments);
	p->too_long = false;
	p->state = HEADER;
}

static void header_text(km_parser *p, const char *s, size_t n)
{
	if (p->header.len + n > KM_PARSER_HOLD_MAX && !p->too_long) {
		p->too_long = true;
		drop(p, "a call's header is too long", p->header.data, p->header.len);
		km_buf_clear(&p->header);
	}
	if (p->too_long)
		drop(p, "a call's header is too long", s, n);
	else
		km_buf_append(&p->header, s, n);
}

static void header_drop(km_parser *p, const char *what)
{
	if (!p->too_long)
		repair(p, what, p->header.data, p->header.len);
	km_buf_clear(&p->header);
}

/* The header is whole: which form do the arguments take? */
static void arguments_open(km_parser *p)
{
	size_t len = p->header.len - trailing_space(p->header.data, p->header.len);
	size_t lead = leading_space(p->header.data, len), name_len = 0;
	const char *name = NULL;
	bool prefixed = false;
	enum km_tool_name_kind kind = KM_TOOL_UNKNOWN;

	if (!p->too_long)
		kind = km_tool_name(p->header.len ? p->header.data + lead : "", len - lead,
		                    p->options.declared_tools, &name, &name_len, &prefixed);
	p->arguments_started = false;
	p->long_run = false;
	switch (kind) {
	case KM_TOOL_NAMED:
	case KM_TOOL_ONLY:
		if (kind == KM_TOOL_ONLY)
			mend(p, "a call's id has no name: it is the only tool's");
		else if (!prefixed)
			mend(p, "a call's id has no \"functions.\" before the name");
		p->format_bytes += p->header.len;
		p->state = ARGUMENTS;
		call_open(p, name, name_len, "", 0);
		break;
	case KM_TOOL_BY_ARGUMENTS:
		p->state = ARGUMENTS_COLLECTED;
		break;
	case KM_TOOL_UNKNOWN:
		header_drop(p, "a call has no name");
		p->state = ARGUMENTS_DROPPED;
		break;
	}
}

static void arguments_text(km_parser *p, const char *s, size_t n)
{
	size_t body;

	if (!p->arguments_started) {
		size_t lead = leading_space(s, n);

		p->format_bytes += lead;
		s += lead;
		n -= lead;
		if (!n)
			return;
		p->arguments_started = true;
	}
	body = n - trailing_space(s, n);
	if (body) {
		emit_space(p, KM_PARSED_ARGUMENTS);
		emit(p, KM_PARSED_ARGUMENTS, s, body);
		p->long_run = false;
		s += body;
		n -= body;
	}
	if (p->long_run || p->space.len + n > KM_PARSER_HOLD_MAX) {
		emit_space(p, KM_PARSED_ARGUMENTS);
		emit(p, KM_PARSED_ARGUMENTS, s, n);
		p->long_run = true;
	} else {
		km_buf_append(&p->space, s, n);
	}
}

static void collected_text(km_parser *p, const char *s, size_t n)
{
	if (p->arguments.len + n > KM_PARSER_INFER_MAX) {
		header_drop(p,
		            "a call's id has no name and its arguments are too long to infer it");
		drop(p, "a call has no name", p->arguments.data, p->arguments.len);
		drop(p, "a call has no name", s, n);
		p->state = ARGUMENTS_DROPPED;
		return;
	}
	km_buf_append(&p->arguments, s, n);
}

/* The arguments are whole and may tell whose they are. */
static void collected_close(km_parser *p)
{
	const char *s = p->arguments.len ? p->arguments.data : "";
	size_t lead = leading_space(s, p->arguments.len);
	size_t n = p->arguments.len - lead - trailing_space(s + lead, p->arguments.len - lead);
	const char *name = km_tool_infer(p->options.declared_tools, s + lead, n);

	if (!name) {
		header_drop(p, "a call's id has no name and its arguments do not tell it");
		drop(p, "a call has no name", s, p->arguments.len);
		return;
	}
	mend(p, "a call's id has no name: it is inferred from the arguments");
	p->format_bytes += p->header.len + p->arguments.len - n;
	call_open(p, name, strlen(name), s + lead, n);
}

/* Ends the open call, whatever its form, and returns to what is around it. `missing`: what should
 * have stood here is not there; `cut`: the input ended instead. */
static void call_close(km_parser *p, const char *missing, bool cut)
{
	if (p->state == ARGUMENTS_COLLECTED) {
		collected_close(p);
	} else if (p->state == ARGUMENTS) {
		forget_space(p, 0);
		if (!p->arguments_started && !cut) {
			emit(p, KM_PARSED_ARGUMENTS, "{}", 2);
			mend(p, "a call's empty arguments are given as {}");
		}
	}
	if (missing)
		mend(p, missing);
	p->state = p->in_section ? SECTION : CONTENT;
}

static bool in_arguments(const km_parser *p)
{
	return p->state >= ARGUMENTS;
}

/* ---- the state machine ---- */

/* Word by word, so that what counts as layout does not depend on how the text was cut. */
static void section_text(km_parser *p, const char *s, size_t n)
{
	while (n) {
		size_t space = leading_space(s, n), word = space;

		while (word < n && !is_space(s[word]))
			word++;
		p->format_bytes += space;
		drop(p, "text inside a section, outside its calls", s + space, word - space);
		s += word;
		n -= word;
	}
}

static void text(km_parser *p, const char *s, size_t n)
{
	if (!n)
		return;
	switch (p->state) {
	case CONTENT:
		segment_text(p, s, n);
		break;
	case REASONING:
		emit(p, KM_PARSED_REASONING, s, n);
		break;
	case SECTION:
		section_text(p, s, n);
		break;
	case HEADER:
		header_text(p, s, n);
		break;
	case ARGUMENTS:
		arguments_text(p, s, n);
		break;
	case ARGUMENTS_COLLECTED:
		collected_text(p, s, n);
		break;
	case ARGUMENTS_DROPPED:
		drop(p, "a call has no name", s, n);
		break;
	}
}

static const char *stray_sentence(enum km_marker marker)
{
	switch (marker) {
	case KM_MARK_THINK:
		return "<think> where no block can open";
	case KM_MARK_THINK_END:
		return "</think> where no block is open";
	case KM_MARK_SECTION_BEGIN:
		return "a section's begin inside a section";
	case KM_MARK_SECTION_END:
		return "a section's end where none is open";
	case KM_MARK_CALL_END:
		return "a call's end where none is open";
	default:
		return "an argument marker where no call is open";
	}
}

static void stray(km_parser *p, enum km_marker marker, const char *s, size_t n)
{
	drop(p, stray_sentence(marker), s, n);
}

/* Leaves an open call and what surrounds it, so that `marker` meets CONTENT or SECTION. */
static void leave_call(km_parser *p, enum km_marker marker)
{
	if (p->state == HEADER) {
		header_drop(p, "a call's header has no arguments");
		p->state = p->in_section ? SECTION : CONTENT;
	} else if (in_arguments(p)) {
		call_close(p, marker == KM_MARK_CALL_END ? NULL : "a call has no end marker",
		           false);
	}
}

static void section_begin(km_parser *p, const char *s, size_t n)
{
	bool in_call = p->state == HEADER || in_arguments(p);

	leave_call(p, KM_MARK_SECTION_BEGIN);
	if (p->in_section && !in_call) {
		stray(p, KM_MARK_SECTION_BEGIN, s, n);
		return;
	}
	if (p->in_section)
		mend(p, "a section has no end marker");
	if (p->state == REASONING)
		mend(p, "a think block has no end marker");
	segment_end(p);
	p->format_bytes += n;
	p->in_section = true;
	p->state = SECTION;
}

static void section_end(km_parser *p, const char *s, size_t n)
{
	leave_call(p, KM_MARK_SECTION_END);
	if (!p->in_section) {
		stray(p, KM_MARK_SECTION_END, s, n);
		return;
	}
	p->format_bytes += n;
	p->in_section = false;
	p->state = CONTENT;
}

static void call_begin(km_parser *p, size_t n)
{
	leave_call(p, KM_MARK_CALL_BEGIN);
	if (p->state == REASONING)
		mend(p, "a think block has no end marker");
	if (!p->in_section) {
		mend(p, "a call outside of a section");
		segment_end(p);
	}
	p->format_bytes += n;
	header_open(p);
}

static void tool_marker(km_parser *p, enum km_marker marker, const char *s, size_t n)
{
	switch (marker) {
	case KM_MARK_SECTION_BEGIN:
		section_begin(p, s, n);
		return;
	case KM_MARK_SECTION_END:
		section_end(p, s, n);
		return;
	case KM_MARK_CALL_BEGIN:
		call_begin(p, n);
		return;
	case KM_MARK_ARGUMENT_BEGIN:
		if (p->state == HEADER) {
			p->format_bytes += n;
			arguments_open(p);
		} else if (in_arguments(p)) {
			text(p, s, n);
		} else {
			stray(p, marker, s, n);
		}
		return;
	default: /* KM_MARK_CALL_END */
		if (p->state != HEADER && !in_arguments(p)) {
			stray(p, marker, s, n);
			return;
		}
		p->format_bytes += n;
		leave_call(p, marker);
	}
}

static void think_marker(km_parser *p, enum km_marker marker, const char *s, size_t n)
{
	if (in_arguments(p)) {
		text(p, s, n);
	} else if (marker == KM_MARK_THINK && p->state == CONTENT) {
		p->format_bytes += n;
		p->state = REASONING;
	} else if (marker == KM_MARK_THINK_END && p->state == REASONING) {
		p->format_bytes += n;
		p->state = CONTENT;
	} else {
		stray(p, marker, s, n);
	}
}

/* A marker as it was spelled: s[0..n). */
static void marker_spelled(km_parser *p, enum km_marker marker, const char *s, size_t n)
{
	bool think = marker == KM_MARK_THINK || marker == KM_MARK_THINK_END;

	if (think ? p->options.reasoning : p->options.tools) {
		if (think)
			think_marker(p, marker, s, n);
		else
			tool_marker(p, marker, s, n);
		return;
	}
	if (p->state == REASONING &&
	    (marker == KM_MARK_SECTION_BEGIN || marker == KM_MARK_CALL_BEGIN)) {
		mend(p, "a think block has no end marker");
		p->state = CONTENT;
	}
	text(p, s, n);
}

/* ---- the front ends ---- */

static void flush_tail(km_parser *p)
{
	size_t n = p->tail_len;

	p->tail_len = 0;
	text(p, p->tail, n);
}

/* Completes the character that the last run of text has cut; returns how many bytes of s it
 * took. */
static size_t complete_tail(km_parser *p, const char *s, size_t n)
{
	size_t i = 0, len;

	while (i < n && p->tail_len) {
		if (((unsigned char)s[i] & 0xc0) == 0x80)
			p->tail[p->tail_len++] = s[i++];
		else
			flush_tail(p);
		if (p->tail_len && km_utf8_decode(p->tail, p->tail_len, &len) != KM_UTF8_MORE)
			flush_tail(p);
	}
	return i;
}

static void text_run(km_parser *p, const char *s, size_t n)
{
	size_t took = complete_tail(p, s, n), cut;

	s += took;
	n -= took;
	cut = km_utf8_tail(s, n);
	text(p, s, n - cut);
	if (cut) {
		memcpy(p->tail, s + n - cut, cut);
		p->tail_len = cut;
	}
}

static void flush_held(km_parser *p)
{
	size_t n = p->held_len;

	p->held_len = 0;
	text(p, p->held, n);
}

static void spelling_found(km_parser *p, const struct spelling *found)
{
	if (found >= &spellings[KM_MARK_COUNT] && p->options.tools)
		mend(p, "a section marker in the singular");
	marker_spelled(p, found->marker, found->text, strlen(found->text));
}

/* Takes bytes into `held` until they are a marker, or fail (and are text), or the input ends.
 * Returns how many it took; at least one when held_len is 0, for s[0] is '<' then. */
static size_t match_marker(km_parser *p, const char *s, size_t n)
{
	size_t i = 0;

	if (!p->held_len) {
		flush_tail(p);
		p->candidates = (1u << SPELLINGS) - 1;
	}
	for (; i < n; i++) {
		unsigned left = 0;

		for (unsigned c = p->candidates; c; c &= c - 1) {
			int at = __builtin_ctz(c);

			if (spellings[at].text[p->held_len] == s[i])
				left |= 1u << at;
		}
		if (!left) {
			flush_held(p);
			return i;
		}
		p->candidates = left;
		p->held[p->held_len++] = s[i];
		if (s[i] == '>') {
			const struct spelling *found = &spellings[__builtin_ctz(left)];

			p->held_len = 0;
			spelling_found(p, found);
			return i + 1;
		}
	}
	return i;
}

/* The first '<' at which a marker begins or, cut by the end, may begin. */
static const char *find_marker(const char *s, const char *end)
{
	static const char openings[3][12] = { "<|tool_call", "<think>", "</think>" };

	for (; (s = memchr(s, '<', (size_t)(end - s))); s++) {
		size_t left = (size_t)(end - s);

		for (int i = 0; i < 3; i++) {
			size_t n = strlen(openings[i]);

			if (!memcmp(s, openings[i], left < n ? left : n))
				return s;
		}
	}
	return NULL;
}

/* The marker that lies whole at s, or NULL. Few spellings have their '>' at the same place. */
static const struct spelling *whole_marker(const char *s, size_t n)
{
	for (int i = 0; i < SPELLINGS; i++) {
		size_t len = strlen(spellings[i].text);

		if (n >= len && s[len - 1] == '>' && !memcmp(s, spellings[i].text, len))
			return &spellings[i];
	}
	return NULL;
}

void km_parser_bytes(km_parser *p, const char *bytes, size_t len)
{
	const char *end = len ? bytes + len : bytes;

	while (bytes < end) {
		if (!p->held_len) {
			const char *open = find_marker(bytes, end);
			const struct spelling *whole;

			text_run(p, bytes, (size_t)((open ? open : end) - bytes));
			if (!open)
				return;
			bytes = open;
			whole = whole_marker(bytes, (size_t)(end - bytes));
			if (whole) {
				flush_tail(p);
				spelling_found(p, whole);
				bytes += strlen(whole->text);
				continue;
			}
		}
		bytes += match_marker(p, bytes, (size_t)(end - bytes));
	}
}

void km_parser_text(km_parser *p, const char *bytes, size_t len)
{
	if (!len)
		return;
	flush_held(p);
	text_run(p, bytes, len);
}

void km_parser_marker(km_parser *p, enum km_marker marker)
{
	flush_held(p);
	flush_tail(p);
	marker_spelled(p, marker, km_marker_text[marker], strlen(km_marker_text[marker]));
}

void km_parser_finish(km_parser *p)
{
	flush_held(p);
	flush_tail(p);
	if (p->state == HEADER)
		header_drop(p, "the input ends in a call's header");
	else if (in_arguments(p))
		call_close(p, "the input ends in a call's arguments", true);
	else if (p->state == REASONING)
		mend(p, "the input ends in a think block");
	if (p->in_section)
		mend(p, "a section has no end marker");
	if (!p->first_segment)
		forget_space(p, p->first_space);
	emit_space(p, KM_PARSED_CONTENT);
	p->in_section = false;
	p->state = CONTENT;
}

/* ---- lifecycle ---- */

km_parser *km_parser_new(const km_parser_options *options)
{
	km_parser *p = km_xcalloc(1, sizeof(*p));

	p->options = *options;
	p->state = options->in_reasoning && options->reasoning ? REASONING : CONTENT;
	p->first_segment = true;
	return p;
}

void km_parser_free(km_parser *p)
{
	if (!p)
		return;
	km_buf_release(&p->space);
	km_buf_release(&p->header);
	km_buf_release(&p->arguments);
	km_buf_release(&p->id);
	km_buf_release(&p->name);
	free(p);
}

int km_parser_calls(const km_parser *p)
{
	return p->calls;
}

int km_parser_take_call(km_parser *p)
{
	return p->calls++;
}

size_t km_parser_format_bytes(const km_parser *p)
{
	return p->format_bytes;
}

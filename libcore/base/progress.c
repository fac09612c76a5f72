#include "base/progress.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"

enum { BAR = 24 };

static void show_amount(char *out, size_t cap, double amount, const char *unit)
{
	static const char *const scaled[] = { "B", "kB", "MB", "GB", "TB" };
	int k = 0;

	if (strcmp(unit, "B") != 0) {
		snprintf(out, cap, "%.*f %s", amount < 10 && amount != (double)(int64_t)amount,
		         amount, unit);
		return;
	}
	while (amount >= 1000 && k < 4) {
		amount /= 1000;
		k++;
	}
	snprintf(out, cap, "%.*f %s", amount < 10 && k, amount, scaled[k]);
}

static void draw(km_progress *p, int64_t now, bool last)
{
	double done = (double)atomic_load(&p->done), total = (double)p->total;
	double seconds = (double)(now - p->start_ns) * 1e-9;
	double rate = seconds > 0 ? done / seconds : 0;
	char amount[48], speed[48], bar[BAR + 1] = "", left[48] = "";

	show_amount(amount, sizeof(amount), done, p->unit);
	show_amount(speed, sizeof(speed), rate, p->unit);
	if (total > 0) {
		int filled = (int)(BAR * (done < total ? done / total : 1));

		memset(bar, '.', BAR);
		memset(bar, '#', (size_t)filled);
		bar[BAR] = '\0';
		if (!last && rate > 0)
			snprintf(left, sizeof(left), ", %.0f s left", (total - done) / rate);
	}
	if (p->terminal)
		fprintf(stderr, "\r%s [%s] %s, %s/s%s\033[K%s", p->what, bar, amount, speed, left,
		        last ? "\n" : "");
	else if (total > 0)
		fprintf(stderr, "%s: %.0f%%, %s, %s/s%s\n", p->what, 100 * done / total, amount,
		        speed, left);
	else
		fprintf(stderr, "%s: %s, %s/s\n", p->what, amount, speed);
	p->drawn = true;
}

void km_progress_init(km_progress *p, const char *what, const char *unit, int64_t total, bool quiet)
{
	p->what = what;
	p->unit = unit;
	p->total = total;
	p->quiet = quiet;
	p->drawn = false;
	p->terminal = isatty(STDERR_FILENO);
	p->start_ns = km_now_ns();
	atomic_init(&p->done, 0);
	atomic_init(&p->last_drawn_ns, p->start_ns);
}

void km_progress_add(km_progress *p, int64_t amount)
{
	int64_t every = p->terminal ? 100000000 : INT64_C(3000000000);
	int64_t now, last;

	atomic_fetch_add(&p->done, amount);
	if (p->quiet)
		return;
	now = km_now_ns();
	last = atomic_load(&p->last_drawn_ns);
	if (now - last >= every && atomic_compare_exchange_strong(&p->last_drawn_ns, &last, now))
		draw(p, now, false);
}

void km_progress_finish(km_progress *p)
{
	if (!p->quiet)
		draw(p, km_now_ns(), true);
}

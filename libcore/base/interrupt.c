#include "base/interrupt.h"

#include <signal.h>
#include <stddef.h>

void km_interrupt_catch(void (*handler)(int signal))
{
	struct sigaction catch = { .sa_handler = handler, .sa_flags = (int)SA_RESETHAND };
	struct sigaction ignore = { .sa_handler = SIG_IGN }, hangup;

	sigaction(SIGINT, &catch, NULL);
	sigaction(SIGTERM, &catch, NULL);
	if (sigaction(SIGHUP, NULL, &hangup) == 0 && hangup.sa_handler != SIG_IGN)
		sigaction(SIGHUP, &catch, NULL);
	sigaction(SIGPIPE, &ignore, NULL);
}

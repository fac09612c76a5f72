/*
 * Signals of a tool whose long work has something to clean up or to keep: `handler` is called at
 * the first Ctrl-C (SIGINT), SIGTERM or SIGHUP (the terminal was closed), and should set a flag
 * that the work looks at; a second one ends the process. A SIGHUP that is ignored already (nohup)
 * stays ignored. SIGPIPE is ignored: progress that nobody reads any more ends nothing, and output
 * that cannot be written is found out when it is flushed.
 */
#ifndef KM_BASE_INTERRUPT_H
#define KM_BASE_INTERRUPT_H

void km_interrupt_catch(void (*handler)(int signal));

#endif

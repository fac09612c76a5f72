/*
 * How a launch stands to its neighbours in a stream, where a launch may begin in its predecessor's
 * tail.
 *
 * A kernel releases its successor, which may begin from then on, and waits for its predecessor: for
 * its end, and for all that it wrote to be visible on the device. As a rule (AFTER) it releases at
 * once, or when it has asked for the weights that it fetches ahead, and waits before it touches anything
 * but weights. Two neighbours that need nothing of each
 * other then still go one after the other. Side by side, B holds back C, which is beside B:
 *
 *   A  =========|                        ~  waits; its weights are on their way
 *   B     ~~~~~~|================|       =  reads what A wrote, works
 *   C            |===========|~~~|       ^  C may begin when all of B's blocks have released
 *   D             |~~~~~~~~~~~~~~|====
 *                ^
 *
 *   1. A thread of B releases only after its own wait. C begins when every block of B has released
 *      or ended, so A has ended then, and what it wrote is visible; so is what came before A, for
 *      which A, being AFTER, has waited. C reads all of it without a wait of its own.
 *   2. No block of C ends before it has waited for B. Whoever waits for C (D, which is AFTER) waits for
 *      B, and sees what both wrote.
 *   3. Neither of B and C may read or write what the other writes.
 *   4. Where a launch does not overlap with its predecessor it begins after that one's end, and its
 *      wait is over at once: 1 to 3 hold all the same.
 *
 * BESIDE behind anything but HOLDS is wrong: C could begin while A works.
 */
#ifndef KM_DEVICE_TURN_H
#define KM_DEVICE_TURN_H

enum km_turn { KM_TURN_AFTER, KM_TURN_HOLDS, KM_TURN_BESIDE };

#endif

/*
 * A 64-bit checksum that parts can be added up to in any order, so that threads can share a tensor:
 * the sum over 8-byte little-endian words of a bijective function of the word, different for each
 * place. A change of one word always shows, one of several with odds of 2^-64 against it. Not for
 * secrets.
 */
#ifndef KM_FORMAT_CHECKSUM_H
#define KM_FORMAT_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint64_t km_checksum_word(uint64_t word, uint64_t index)
{
	uint64_t z = word + (index + 1) * UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ z >> 32) * UINT64_C(0xbf58476d1ce4e5b9);
	return z ^ z >> 29;
}

/* Of the bytes from `offset` on, a multiple of 8; what misses to a whole word at the end counts as
 * 0. */
static inline uint64_t km_checksum(const void *data, size_t bytes, uint64_t offset)
{
	const unsigned char *p = data;
	uint64_t sum = 0, index = offset / 8, word = 0;
	size_t words = bytes / 8;

	for (size_t i = 0; i < words; i++) {
		memcpy(&word, p + i * 8, 8);
		sum += km_checksum_word(word, index + i);
	}
	if (bytes % 8) {
		word = 0;
		memcpy(&word, p + words * 8, bytes % 8);
		sum += km_checksum_word(word, index + words);
	}
	return sum;
}

#endif

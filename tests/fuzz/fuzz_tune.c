/* Tuning files: what is read is legal, can be written, and reads back as the same. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "device/moe_tune.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const km_moe_tune_context context = {
		.problem = { .tokens = 1,
		             .experts = 384,
		             .global_experts = 384,
		             .top_k = 8,
		             .hidden = 7168,
		             .intermediate = 256,
		             .group = 32,
		             .packed = true },
		.device = { 90, 132 },
	};
	km_tune_problem problem = km_moe_tune_problem(&context.problem);
	km_tune_schema schema = km_moe_tune_schema(&context);
	km_tune_table table, again;
	km_buf text = KM_BUF_INIT;
	km_err err = { 0 };

	if (km_tune_parse(&table, (const char *)data, size, "fuzz", &problem, &schema, &err) < 0) {
		KM_ASSERT(err.code < 0 && err.msg[0]);
		return 0;
	}
	km_tune_format(&table, &problem, &schema, &text);
	KM_ASSERT(km_tune_parse(&again, text.data, text.len, "again", &problem, &schema, &err) ==
	          0);
	KM_ASSERT(again.count == table.count);
	for (int i = 0; i < table.count; i++)
		KM_ASSERT(!memcmp(again.entries[i].values, table.entries[i].values,
		                  sizeof(table.entries[i].values)) &&
		          again.entries[i].tokens == table.entries[i].tokens);
	km_tune_release(&table);
	km_tune_release(&again);
	km_buf_release(&text);
	return 0;
}

#include "device/cuda_ops.h"

#include "dense.h"
#include "device/cuda_blas.h"
#include "device/cuda_state.h"

static int checked(cudaError_t rc, const char *what, km_err *err)
{
	return rc == cudaSuccess ? 0 : km_cuda_fail(err, rc, what);
}

/* Launches may begin in their predecessor's tail: every kernel of ours waits before it reads its
 * results. */
static bool overlaps(const km_cuda *cuda)
{
	return cuda->info.capability >= 90;
}

/*
 * From how many rows on cuBLASLt takes over. Measured on H100 (tests/gpu/test_ops_cuda): its 64 rows of
 * bf16 weights cost less than the streaming form's 16 (o 43 us against 60, q_b 17 against 24), and about
 * what the streaming form's 8 do. For fp8 the copy to bf16 comes on top, so the streaming form goes on
 * to the rows that it does in one pass. The general form ends where a copy costs less.
 *
 * A norm is part of the slab form of up to 4 rows: each block makes it for itself, and at 8 rows of K2.5's
 * slice of eight that costs more than its launch (H200, the dense half of a layer: 67.2 us against 62.6 with
 * the norms apart; at 4 rows 48.4 against 48.7).
 */
enum { STREAM_BF16_ROWS = 8, STREAM_FP8_ROWS = 32, GENERAL_ROWS = 8, NORM_ROWS = 4 };

static int most_rows(const km_weight *w)
{
	if (!kk_linear_stream_fits(w))
		return GENERAL_ROWS;
	return w->type == KM_W_BF16 ? STREAM_BF16_ROWS : STREAM_FP8_ROWS;
}

enum km_linear_form km_linear_plan(const km_weight *w, int tokens, const km_linear_device *device)
{
	bool stream = kk_linear_stream_fits(w);

	if (device->slab && kk_linear_slab_fits(w, tokens, KK_X_GIVEN))
		return KM_LINEAR_SLAB;
	if (device->blas && tokens > most_rows(w) && w->cols % 8 == 0)
		return KM_LINEAR_BLAS;
	return stream ? KM_LINEAR_STREAM : KM_LINEAR_GENERAL;
}

void km_linear_explain(const km_weight *w, const km_linear_device *device, km_buf *out)
{
	bool stream = kk_linear_stream_fits(w);

	if (km_linear_plan(w, 1, device) == KM_LINEAR_SLAB)
		km_buf_puts(out, "slabs up to 8 rows, then ");
	km_buf_puts(out, stream ? "streaming form" : "general form");
	if (!stream)
		km_buf_puts(out, w->type == KM_W_BF16 || w->type == KM_W_FP8
		                         ? " (the shape does not fit the streaming form)"
		                         : " (the streaming form takes bf16 and fp8)");
	if (km_linear_plan(w, 1 << 20, device) == KM_LINEAR_BLAS)
		km_buf_printf(out, ", above %d rows cuBLASLt%s", most_rows(w),
		              w->type == KM_W_BF16 ? "" : " over a bf16 copy made each time");
}

/* Four or so values between powers of two: up to a fifth of the work is on rows that nobody wants.
 * */
int km_linear_rounded(int tokens)
{
	int unit = 8;

	while (tokens > 8 * unit)
		unit *= 2;
	return (tokens + unit - 1) / unit * unit;
}

static int blas(km_cuda *cuda, const km_cuda_linear *a, int i, km_err *err)
{
	const km_weight *w = a->w[i];
	km_cuda_matmul args = {
		.x = a->x,
		.w = w->data,
		.y = a->y[i],
		.tokens = km_linear_rounded(a->tokens),
		.rows = w->rows,
		.cols = w->cols,
		.x_stride = a->x_stride,
		.y_stride = w->rows,
		.y_bf16 = a->y_bf16,
		.accumulate = a->accumulate,
	};

	if (w->type != KM_W_BF16) {
		KM_TRY(km_cuda_ops_dequantize(cuda, w, a->scratch, err));
		args.w = a->scratch;
	}
	return km_cuda_blas_matmul(cuda, &args, err);
}

static kk_linear_args ours_of(const km_cuda *cuda, const km_cuda_linear *a, int from, int count)
{
	kk_linear_args args = { .x = a->x,
		                .weights = count,
		                .tokens = a->tokens,
		                .x_stride = a->x_stride,
		                .y_bf16 = a->y_bf16,
		                .accumulate = a->accumulate,
		                .pdl = overlaps(cuda) };

	for (int i = 0; i < count; i++) {
		args.w[i] = *a->w[from + i];
		args.y[i] = a->y[from + i];
		args.y_stride[i] = args.w[i].rows;
	}
	return args;
}

static int slab(km_cuda *cuda, const km_cuda_linear *a, int from, int count, km_err *err)
{
	kk_linear_slab_args args = {
		.linear = ours_of(cuda, a, from, count),
		.from = a->from == KM_X_NORM   ? KK_X_NORM
		        : a->from == KM_X_SILU ? KK_X_SILU
		                               : KK_X_GIVEN,
		.a = a->a,
		.b = a->b,
		.a_stride = a->w[from]->cols,
		.eps = a->eps,
		.x_out = a->keep ? a->made : NULL,
		.turn = a->turn,
		.multiprocessors = cuda->info.multiprocessors,
	};

	return checked(kk_linear_slab(&args, cuda->stream), "linear layer", err);
}

static int ours(km_cuda *cuda, enum km_linear_form form, const km_cuda_linear *a, int from,
                int count, km_err *err)
{
	kk_linear_args args = ours_of(cuda, a, from, count);

	if (form == KM_LINEAR_SLAB)
		return slab(cuda, a, from, count, err);
	return checked(form == KM_LINEAR_STREAM ? kk_linear_stream(&args, cuda->stream)
	                                        : kk_linear_general(&args, cuda->stream),
	               "linear layer", err);
}

/* Each block of a launch makes all of x for itself: not worth it for many values of a norm, which 132
 * blocks read as f32 and not as bf16. */
bool km_cuda_linear_makes_x(const km_cuda_linear *a, const km_linear_device *device)
{
	enum kk_x_from from = a->from == KM_X_NORM ? KK_X_NORM : KK_X_SILU;

	for (int i = 0; i < a->weights; i++)
		if (km_linear_plan(a->w[i], a->tokens, device) != KM_LINEAR_SLAB ||
		    !kk_linear_slab_fits(a->w[i], a->tokens, from))
			return false;
	return a->from == KM_X_SILU || (a->from == KM_X_NORM && a->tokens <= NORM_ROWS);
}

int km_cuda_ops_make_x(km_cuda *cuda, const km_cuda_linear *a, km_err *err)
{
	int cols = a->w[0]->cols;
	km_cuda_norm norm = { a->a, NULL, a->b, a->made, a->tokens, cols, cols, a->eps };

	if (a->from == KM_X_SILU)
		return km_cuda_ops_silu_mul(cuda, a->a, a->b, a->made, a->tokens, cols, err);
	return km_cuda_ops_norm(cuda, &norm, err);
}

/* Whether one launch takes all weights: of one form of ours, and of one type. */
static bool in_one_launch(const km_cuda_linear *a, const enum km_linear_form *form)
{
	for (int i = 1; i < a->weights; i++)
		if (form[i] != form[0] || a->w[i]->type != a->w[0]->type)
			return false;
	return form[0] == KM_LINEAR_SLAB || (form[0] != KM_LINEAR_BLAS && a->weights <= 2);
}

int km_cuda_ops_linear(km_cuda *cuda, const km_linear_device *device, const km_cuda_linear *args,
                       km_err *err)
{
	enum km_linear_form form[KM_LINEAR_WEIGHTS];
	km_cuda_linear a = *args;

	KM_ASSERT(a.weights >= 1 && a.weights <= KM_LINEAR_WEIGHTS);
	for (int i = 0; i < a.weights; i++)
		form[i] = km_linear_plan(a.w[i], a.tokens, device);
	KM_ASSERT(a.turn == KM_TURN_AFTER ||
	          (form[0] == KM_LINEAR_SLAB && in_one_launch(&a, form) &&
	           (a.from == KM_X_GIVEN || km_cuda_linear_makes_x(&a, device))));
	if (a.from != KM_X_GIVEN && !km_cuda_linear_makes_x(&a, device)) {
		KM_TRY(km_cuda_ops_make_x(cuda, &a, err));
		a.from = KM_X_GIVEN;
		a.x = a.made;
		a.x_stride = a.w[0]->cols;
	}
	if (in_one_launch(&a, form))
		return ours(cuda, form[0], &a, 0, a.weights, err);
	for (int i = 0; i < a.weights; i++)
		KM_TRY(form[i] == KM_LINEAR_BLAS ? blas(cuda, &a, i, err)
		                                 : ours(cuda, form[i], &a, i, 1, err));
	return 0;
}

int km_cuda_ops_embed(km_cuda *cuda, const int32_t *ids, int tokens, const km_weight *table,
                      float *y, km_err *err)
{
	kk_embed_args args = {
		.ids = ids, .table = *table, .y = y, .tokens = tokens, .pdl = overlaps(cuda)
	};

	return checked(kk_embed(&args, cuda->stream), "embedding", err);
}

int km_cuda_ops_norm(km_cuda *cuda, const km_cuda_norm *a, km_err *err)
{
	kk_norm_args args = { .residual = a->residual,
		              .delta = a->delta,
		              .weight = a->weight,
		              .y = a->y,
		              .tokens = a->tokens,
		              .size = a->size,
		              .residual_stride = a->stride,
		              .y_stride = a->size,
		              .eps = a->eps,
		              .pdl = overlaps(cuda) };

	return checked(kk_norm(&args, cuda->stream), "norm", err);
}

int km_cuda_ops_silu_mul(km_cuda *cuda, const float *gate, const float *up, void *y, int tokens,
                         int size, km_err *err)
{
	kk_silu_mul_args args = { .gate = gate,
		                  .up = up,
		                  .y = y,
		                  .tokens = tokens,
		                  .size = size,
		                  .pdl = overlaps(cuda) };

	return checked(kk_silu_mul(&args, cuda->stream), "silu_mul", err);
}

int km_cuda_ops_gather(km_cuda *cuda, const int32_t *rows, int count, const void *from, void *to,
                       int bytes, km_err *err)
{
	kk_gather_args args = { .rows = rows,
		                .from = from,
		                .to = to,
		                .count = count,
		                .bytes = bytes,
		                .pdl = overlaps(cuda) };

	return checked(kk_gather(&args, cuda->stream), "gather", err);
}

int km_cuda_ops_count(km_cuda *cuda, const int32_t *ids, int rows, int each, const int32_t *valid,
                      int64_t *counts, km_err *err)
{
	kk_count_args args = { .ids = ids,
		               .valid = valid,
		               .counts = (unsigned long long *)counts,
		               .rows = rows,
		               .each = each,
		               .pdl = overlaps(cuda) };

	return checked(kk_count(&args, cuda->stream), "counting", err);
}

int km_cuda_ops_dequantize(km_cuda *cuda, const km_weight *w, void *to, km_err *err)
{
	return checked(kk_dequantize(w, to, cuda->stream), "dequantization", err);
}

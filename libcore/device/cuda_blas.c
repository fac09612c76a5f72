#include "device/cuda_blas.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <stdlib.h>

#include "base/mem.h"
#include "device/cuda_state.h"

enum { WORKSPACE_BYTES = KM_CUDA_BLAS_BYTES };

/* Of the toolkit whose headers these are. */
#define BLAS_TEXT(x) #x
#define BLAS_TEXT_OF(x) BLAS_TEXT(x)
#define BLAS_LIBRARY "libcublasLt.so." BLAS_TEXT_OF(CUBLAS_VER_MAJOR)

typedef struct blas_shape {
	km_cuda_matmul key; /* without pointers */
	cublasLtMatmulDesc_t op;
	cublasLtMatrixLayout_t w, x, y;
	cublasLtMatmulAlgo_t algo;
} blas_shape;

/* The library's functions that are used, under their own names. */
#define BLAS_FUNCTIONS(F)                                                                          \
	F(cublasLtCreate) F(cublasLtDestroy) F(cublasLtMatmulDescCreate)                           \
	F(cublasLtMatmulDescDestroy) F(cublasLtMatmulDescSetAttribute)                             \
	F(cublasLtMatrixLayoutCreate) F(cublasLtMatrixLayoutDestroy)                               \
	F(cublasLtMatmulPreferenceCreate) F(cublasLtMatmulPreferenceDestroy)                       \
	F(cublasLtMatmulPreferenceSetAttribute) F(cublasLtMatmulAlgoGetHeuristic)                  \
	F(cublasLtMatmul) F(cublasLtGetStatusString)

typedef struct km_cuda_blas {
	void *library, *workspace;
	cublasLtHandle_t handle;
	int shapes;
	blas_shape shape[KM_CUDA_BLAS_SHAPES];
#define BLAS_MEMBER(name) __typeof__(&name) name;
	BLAS_FUNCTIONS(BLAS_MEMBER)
} km_cuda_blas;

static int blas_fail(const km_cuda_blas *b, km_err *err, cublasStatus_t rc, const char *what)
{
	return km_fail(err, KM_EDEVICE, "cuBLASLt: %s: %s", what, b->cublasLtGetStatusString(rc));
}

static int load_functions(km_cuda_blas *b, km_err *err)
{
	b->library = dlopen(BLAS_LIBRARY, RTLD_NOW | RTLD_LOCAL);
	if (!b->library)
		return km_fail(err, KM_ENOTFOUND, "cuBLASLt cannot be opened: %s", dlerror());
#define BLAS_LOAD(name)                                                                            \
	*(void **)&b->name = dlsym(b->library, #name);                                             \
	if (!b->name)                                                                              \
		return km_fail(err, KM_ENOTFOUND, BLAS_LIBRARY " has no " #name);
	BLAS_FUNCTIONS(BLAS_LOAD)
	return 0;
}

static int open_parts(km_cuda *cuda, km_cuda_blas *b, km_err *err)
{
	cublasStatus_t rc;

	KM_TRY(load_functions(b, err));
	rc = b->cublasLtCreate(&b->handle);
	if (rc != CUBLAS_STATUS_SUCCESS)
		return blas_fail(b, err, rc, "cublasLtCreate");
	return km_cuda_take(cuda, &b->workspace, WORKSPACE_BYTES, "cuBLASLt's workspace", err);
}

int km_cuda_blas_open(km_cuda *cuda, km_err *err)
{
	km_cuda_blas *b;
	int rc;

	if (cuda->blas)
		return 0;
	b = km_xcalloc(1, sizeof(*b));
	cuda->blas = b;
	rc = open_parts(cuda, b, err);
	if (rc < 0)
		km_cuda_blas_close(cuda);
	return rc;
}

/* Also what was only made in part. */
static void forget(const km_cuda_blas *b, const blas_shape *s)
{
	if (s->op)
		b->cublasLtMatmulDescDestroy(s->op);
	if (s->w)
		b->cublasLtMatrixLayoutDestroy(s->w);
	if (s->x)
		b->cublasLtMatrixLayoutDestroy(s->x);
	if (s->y)
		b->cublasLtMatrixLayoutDestroy(s->y);
}

void km_cuda_blas_close(km_cuda *cuda)
{
	km_cuda_blas *b = cuda->blas;

	if (!b)
		return;
	for (int i = 0; i < b->shapes; i++)
		forget(b, &b->shape[i]);
	if (b->handle)
		b->cublasLtDestroy(b->handle);
	if (b->library)
		dlclose(b->library);
	free(b);
	cuda->blas = NULL;
}

#define BLAS_TRY(what)                                                                             \
	do {                                                                                       \
		cublasStatus_t rc_ = b->what;                                                      \
		if (rc_ != CUBLAS_STATUS_SUCCESS)                                                  \
			return blas_fail(b, err, rc_, #what);                                      \
	} while (0)

/* Column-major as the library has it: y^T [rows, tokens] = w^T^T x^T. */
static int describe(km_cuda_blas *b, blas_shape *s, km_err *err)
{
	const km_cuda_matmul *k = &s->key;
	cublasOperation_t transposed = CUBLAS_OP_T;
	size_t workspace = WORKSPACE_BYTES;
	cublasLtMatmulPreference_t preference;
	cublasLtMatmulHeuristicResult_t best;
	uint64_t rows = (uint64_t)k->rows, cols = (uint64_t)k->cols, tokens = (uint64_t)k->tokens;
	int found = 0;

	BLAS_TRY(cublasLtMatmulDescCreate(&s->op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
	BLAS_TRY(cublasLtMatmulDescSetAttribute(s->op, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
	                                        sizeof(transposed)));
	BLAS_TRY(cublasLtMatrixLayoutCreate(&s->w, CUDA_R_16BF, cols, rows, (int64_t)cols));
	BLAS_TRY(cublasLtMatrixLayoutCreate(&s->x, CUDA_R_16BF, cols, tokens, k->x_stride));
	BLAS_TRY(cublasLtMatrixLayoutCreate(&s->y, k->y_bf16 ? CUDA_R_16BF : CUDA_R_32F, rows, tokens,
	                                    k->y_stride));
	BLAS_TRY(cublasLtMatmulPreferenceCreate(&preference));
	b->cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
	                                        &workspace, sizeof(workspace));
	b->cublasLtMatmulAlgoGetHeuristic(b->handle, s->op, s->w, s->x, s->y, s->y, preference, 1,
	                                  &best, &found);
	b->cublasLtMatmulPreferenceDestroy(preference);
	if (!found)
		return km_fail(err, KM_EUNSUPPORTED, "cuBLASLt has no algorithm for %d x %d x %d", k->tokens,
		               k->rows, k->cols);
	s->algo = best.algo;
	return 0;
}

static bool same_shape(const km_cuda_matmul *a, const km_cuda_matmul *b)
{
	return a->tokens == b->tokens && a->rows == b->rows && a->cols == b->cols &&
	       a->x_stride == b->x_stride && a->y_stride == b->y_stride && a->y_bf16 == b->y_bf16 &&
	       a->accumulate == b->accumulate;
}

static int find_shape(km_cuda_blas *b, blas_shape **shape, const km_cuda_matmul *args, km_err *err)
{
	int rc;

	for (int i = 0; i < b->shapes; i++) {
		*shape = &b->shape[i];
		if (same_shape(&(*shape)->key, args))
			return 0;
	}
	if (b->shapes == KM_CUDA_BLAS_SHAPES)
		return km_fail(err, KM_ELIMIT, "cuBLASLt: more than %d shapes", KM_CUDA_BLAS_SHAPES);
	*shape = &b->shape[b->shapes];
	**shape = (blas_shape){ .key = *args };
	rc = describe(b, *shape, err);
	if (rc < 0)
		forget(b, *shape);
	else
		b->shapes++;
	return rc;
}

int km_cuda_blas_matmul(km_cuda *cuda, const km_cuda_matmul *a, km_err *err)
{
	km_cuda_blas *b = cuda->blas;
	const float one = 1.0f, beta = a->accumulate ? 1.0f : 0.0f;
	blas_shape *s = NULL;

	KM_ASSERT(b);
	KM_TRY(find_shape(b, &s, a, err));
	BLAS_TRY(cublasLtMatmul(b->handle, s->op, &one, a->w, s->w, a->x, s->x, &beta, a->y, s->y, a->y,
	                        s->y, &s->algo, b->workspace, WORKSPACE_BYTES, cuda->stream));
	return 0;
}

int km_cuda_blas_linear(km_cuda *cuda, const void *x, const void *w, float *y, int tokens, int rows,
                        int cols, km_err *err)
{
	km_cuda_matmul args = { .x = x, .w = w, .y = y, .tokens = tokens, .rows = rows, .cols = cols,
		                .x_stride = cols, .y_stride = rows };

	return km_cuda_blas_matmul(cuda, &args, err);
}

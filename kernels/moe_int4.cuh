/*
 * The streaming kernel of the int4 experts: from routed ids to the summed output in one launch.
 * moe_int4.cu has the essay; moe_int4_large.cu the tiles of many tokens.
 */
#ifndef KK_MOE_INT4_CUH
#define KK_MOE_INT4_CUH

#include "launch.cuh"
#include "moe_direct.cuh"
#include "moe_front.cuh"

/* ---- The warps that multiply. ---- */

/* act = silu(gate) * up of one item; a lane's first two sums are gate's, the others up's. INVERTED: direct_acts. */
template <typename L, bool INVERTED>
__device__ __forceinline__ void store_act(const kk_moe_args &a, char *to, const tile_sums<L> &sum, const int *places,
                                          int rows, int first)
{
	int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
	unsigned short *act = (unsigned short *)to + first + g;

#pragma unroll
	for (int n = 0; n < L::NT; n++)
#pragma unroll
		for (int i = 0; i < 2; i++) {
			int row = n * 8 + 2 * t + i;

			if (row >= rows)
				continue;
#pragma unroll
			for (int r = 0; r < L::RB; r++)
				act[(size_t)places[row] * a.intermediate + r * 8] =
					__bfloat16_as_ushort(__float2bfloat16(silu(L::UNIT * sum[r][n][i]) *
					                                      (L::UNIT_8 * sum[r][n][2 + i]))) ^
					(INVERTED ? 0xffff : 0);
		}
}

template <typename L>
__device__ __forceinline__ void store_part(const kk_moe_args &a, const tile_sums<L> &sum, const int *places,
                                           int rows, int first)
{
	int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

#pragma unroll
	for (int n = 0; n < L::NT; n++) {
		if (n * 8 >= rows)
			break;
		if (a.part_bf16) {
			/* A pair of lanes swaps, so that each has two rows of one place. */
			int row = n * 8 + 2 * t + (g & 1);

#pragma unroll
			for (int r = 0; r < L::RB; r++)
#pragma unroll
				for (int h = 0; h < 2; h++) {
					float u = h ? L::UNIT_8 : L::UNIT, even = u * sum[r][n][2 * h], odd = u * sum[r][n][2 * h + 1];
					float keep = g & 1 ? odd : even;
					float got = __shfl_xor_sync(0xffffffffu, g & 1 ? even : odd, 4);
					__nv_bfloat162 v = g & 1 ? __floats2bfloat162_rn(got, keep)
					                         : __floats2bfloat162_rn(keep, got);

					if (row < rows)
						*(__nv_bfloat162 *)((__nv_bfloat16 *)a.part +
						                    (size_t)places[row] * a.hidden + first +
						                    r * 16 + h * 8 + (g & ~1)) = v;
				}
		} else {
#pragma unroll
			for (int i = 0; i < 2; i++) {
				int row = n * 8 + 2 * t + i;

				if (row >= rows)
					continue;
#pragma unroll
				for (int r = 0; r < L::RB; r++) {
					float *to = (float *)a.part + (size_t)places[row] * a.hidden + first + r * 16 + g;

					to[0] = L::UNIT * sum[r][n][i];
					to[8] = L::UNIT_8 * sum[r][n][2 + i];
				}
			}
		}
	}
}

template <typename L, bool DIRECT>
__device__ __forceinline__ void multiply_up(const kk_moe_args &a, const stream_work &w, stream_smem *s,
                                            const lane_parts &p, int warp, float *sums, rings &q, char *act)
{
	int warp_row = warp % L::WR, warp_column = warp / L::WR;
	uint32_t rec = w.record_bytes, first = w.stage0 + warp_row * L::RB * L::PER * rec;
	x_rows<L> own = lane_rows<L>(w.x_rows, L::UP_PITCH);

	ptx_hold(first);
	for (int i = w.up_lo; i < w.up_hi; i++) {
		tile_sums<L> sum;
		int tile = 0;

		clear<L>(sum);
		for (int c = 0; c < w.up_records; c += L::PER) {
			int n = min(L::PER, w.up_records - c);
			bool last = c + L::PER >= w.up_records;
			uint32_t stage = first + q.w.at * w.stage_bytes, x = w.x0 + q.x.at * w.x_stage_bytes;

			ptx_mbarrier_wait(barrier_of(s->full, q.w.at), q.w.parity);
			ptx_mbarrier_wait(barrier_of(s->x_full, q.x.at), q.x.parity);
			for (int k = warp_column; k < n; k += L::WK)
				multiply_record<L>(sum, p, stage + k * rec, L::PER * rec, x + k * RECORD_COLS * 2, own,
				                   L::NT > 2 ? s->rows[q.x.at] : 0);
			give_stage(s->empty, q.w.at);
			q.w.next();
			if (last) {
				join<L>(sum, sums, warp_row, warp_column);
				if (warp_column == 0)
					store_act<L, DIRECT>(a, act, sum, s->places[q.x.at], s->rows[q.x.at],
					             (s->item[q.x.at].y * L::WR + warp_row) * L::RB * 8);
				tile = s->item[q.x.at].x;
			}
			give_stage(s->x_empty, q.x.at);
			q.x.next();
		}
		if (!DIRECT && warp_column == 0)
			finish_part(a, tile);
	}
}

template <typename L>
__device__ __forceinline__ void multiply_down(const kk_moe_args &a, const stream_work &w, stream_smem *s,
                                              const lane_parts &p, int warp, rings &q)
{
	uint32_t rec = w.record_bytes, first = w.stage0 + warp * L::RB * L::REC * rec;
	x_rows<L> own = lane_rows<L>(w.x_rows, L::DOWN_PITCH);

	ptx_hold(first);
	for (int i = w.down_lo; i < w.down_hi; i++) {
		tile_sums<L> sum;

		clear<L>(sum);
		for (int c = 0; c < w.down_records; c += L::REC) {
			int n = min(L::REC, w.down_records - c);
			uint32_t stage = first + q.w.at * w.stage_bytes, x = w.x0 + q.x.at * w.x_stage_bytes;

			ptx_mbarrier_wait(barrier_of(s->full, q.w.at), q.w.parity);
			ptx_mbarrier_wait(barrier_of(s->x_full, q.x.at), q.x.parity);
			for (int k = 0; k < n; k++)
				multiply_record<L>(sum, p, stage + k * rec, L::REC * rec, x + k * RECORD_COLS * 2, own,
				                   L::NT > 2 ? s->rows[q.x.at] : 0);
			give_stage(s->empty, q.w.at);
			q.w.next();
			if (c + L::REC >= w.down_records)
				store_part<L>(a, sum, s->places[q.x.at], s->rows[q.x.at],
				              s->item[q.x.at].y * L::DOWN_ROWS + warp * L::RB * 16);
			give_stage(s->x_empty, q.x.at);
			q.x.next();
		}
	}
}

/* ---- The sum over each token's places. ---- */

/* Eight columns of a place. */
__device__ __forceinline__ void add_place(const kk_moe_args &a, size_t place, int column, float weight,
                                          float (&all)[8])
{
	uint4 u = ptx_load_fresh((const char *)a.part + (place * a.hidden + column) * (a.part_bf16 ? 2 : 4));
	uint4 v = {};

	if (!a.part_bf16)
		v = ptx_load_fresh((const char *)a.part + (place * a.hidden + column + 4) * 4);
	if (a.part_bf16) {
		uint32_t h[4] = {u.x, u.y, u.z, u.w};

#pragma unroll
		for (int i = 0; i < 4; i++) {
			all[2 * i] = fmaf(weight, __uint_as_float(h[i] << 16), all[2 * i]);
			all[2 * i + 1] = fmaf(weight, __uint_as_float(h[i] & 0xffff0000u), all[2 * i + 1]);
		}
	} else {
		uint32_t h[8] = {u.x, u.y, u.z, u.w, v.x, v.y, v.z, v.w};

#pragma unroll
		for (int i = 0; i < 8; i++)
			all[i] = fmaf(weight, __uint_as_float(h[i]), all[i]);
	}
}

__device__ __forceinline__ void sum_places(const kk_moe_args &a, int threads)
{
	int per = a.hidden / 8, stride = gridDim.x * threads;

	for (int o = blockIdx.x * threads + threadIdx.x; o < a.tokens * per; o += stride) {
		int token = o / per, column = o % per * 8;
		float all[8] = {};

#pragma unroll 8
		for (int k = 0; k < a.top_k; k++) {
			size_t place = (size_t)token * a.top_k + k;
			int e = __ldg(a.ids + place);
			float weight = __ldg(a.weights + place);

			if (e >= 0 && e < a.experts && weight != 0.0f)
				add_place(a, place, column, weight, all);
		}
#pragma unroll
		for (int i = 0; i < 8; i++)
			add_y(a, (size_t)token * a.hidden + column + i, all[i]);
	}
}

/* DIRECT: the decode form. */
template <typename L, bool DIRECT>
__global__ void __launch_bounds__(L::THREADS, 1) moe_stream(const __grid_constant__ kk_moe_args a,
                                                                const __grid_constant__ stream_maps maps)
{
	extern __shared__ __align__(1024) char smem[];
	stream_smem *s = (stream_smem *)smem;
	float *sums = (float *)(smem + 12 * 1024);
	char *base = smem + 12 * 1024 + a.sums_bytes;
	int warp = threadIdx.x / 32, most = min(a.tokens, L::T), round; /* of the launches, or of what all wait for first */
	bool front = DIRECT && a.gate.logits;
	float before = 0.0f;
	front_ahead ahead;
	stream_work w;

	w.group_shift = a.group == 32 ? 0 : a.group == 64 ? 1 : 2;
	w.record_bytes = RECORD_CODES + 4096 / a.group;
	w.up_records = a.hidden / RECORD_COLS;
	w.down_records = a.intermediate / RECORD_COLS;
	w.stages = a.stages;
	w.x_stages = a.x_stages;
	w.stage_bytes = L::W * L::REC * L::RB * w.record_bytes;
	w.x_rows = L::T <= 16 ? min(a.inside ? a.tokens : a.tokens * a.top_k, L::T) : L::T;
	w.x_stage_bytes = w.x_rows * L::UP_PITCH;
	w.stage0 = ptx_shared_address(base);
	w.x0 = w.stage0 + w.stages * w.stage_bytes;
	if (threadIdx.x < 4)
		s->minus[threadIdx.x] = threadIdx.x % 2 ? MINUS_HIGH : MINUS_LOW;
	if (threadIdx.x == 0) {
		prefetch_maps(maps);
#pragma unroll 1
		for (int i = 0; i < w.stages; i++) {
			ptx_mbarrier_init(barrier_of(s->full, i), 1);
			ptx_mbarrier_init(barrier_of(s->empty, i), L::W);
		}
#pragma unroll 1
		for (int i = 0; i < w.x_stages; i++) {
			ptx_mbarrier_init(barrier_of(s->x_full, i), 1);
			ptx_mbarrier_init(barrier_of(s->x_empty, i), L::W);
		}
		ptx_mbarrier_init(barrier_of(&s->bias, 0), 1);
		ptx_mbarrier_init_done();
	}
	begin_division<L, DIRECT>(a, w);
	ptx_release_successor();
	if (front)
		begin_front(ahead, s, (front_smem *)sums, a, w);
	ptx_wait_predecessor();
	round = read_round(a.sync + (DIRECT ? DIRECT_LAUNCHES : 0));
	if (DIRECT && warp < L::W)
		before = load_first(a, w);
	if (DIRECT || a.inside) {
		if (front) {
			run_front(a, s, (front_smem *)sums, most, w.per_most);
		} else if (a.tokens * a.top_k > WARP_PLACES) {
			sort_inside(a, s, most);
		} else {
			if (warp == 0)
				sort_by_warp(a, s, most, w.per_most, false);
			__syncthreads(); /* the tiles are known to all; the block's barriers are ready */
		}
		w.tiles = s->tiles;
	} else {
		w.tiles = __ldcg(a.total) / L::T;
		__syncthreads(); /* the block's barriers are ready; the round was read before anybody arrives */
	}
	divide<L, DIRECT>(a, w);
	if (warp == L::W) {
		fetch_weights<L, DIRECT>(a, maps, w, s);
	} else if (warp == L::W + 1) {
		fetch_activations<L, DIRECT>(a, w, s, round);
	} else {
		rings q = {{0, 0, w.stages}, {0, 0, w.x_stages}};
		if (front)
			before += multiply_shared(a, w, (front_smem *)sums, ahead, 32 * L::W);
		lane_parts p = lane_records(threadIdx.x % 32, w.group_shift, ptx_shared_address(s->minus));

		if (threadIdx.x == 0 && !DIRECT)
			s->round_down = read_round(a.sync + SYNC_STRIDE); /* which cannot end without this block */
		if constexpr (DIRECT) {
			char *act = direct_acts(a, round, 0);

			clear_acts(a, round);
			multiply_up<L, true>(a, w, s, p, warp, sums, q, act);
			if (L::WK == 1)
				ptx_barrier_some(BAR_ALL, 32 * L::W); /* the stages of x have been read; join waits too */
			multiply_direct<L>(a, w, s, p, base, sums, q, act, before);
			if (threadIdx.x == 0)
				arrive_round(a.sync + DIRECT_LAUNCHES);
		} else {
			multiply_up<L, false>(a, w, s, p, warp, sums, q, (char *)a.act);
			if (!a.ready) {
				ptx_barrier_some(BAR_ALL, 32 * L::W); /* this block's activations are stored */
				if (threadIdx.x == 0)
					arrive_round(a.sync);
			}
			multiply_down<L>(a, w, s, p, warp, q);
			ptx_barrier_some(BAR_ALL, 32 * L::W); /* this block's parts are stored */
			if (threadIdx.x == 0) {
				arrive_round(a.sync + SYNC_STRIDE);
				wait_round(a.sync + SYNC_STRIDE, s->round_down);
			}
			ptx_barrier_some(BAR_ALL, 32 * L::W); /* every block's are */
			clear_ready(a, w.tiles, 32 * L::W);
			sum_places(a, 32 * L::W);
		}
	}
}

/* A matrix of all experts, in boxes of `blocks` row blocks by `records` records. */
static inline cudaError_t map_weights(CUtensorMap *map, const kk_moe_args *a, const void *data, int64_t stride, int rows,
                                      int cols, int blocks, int records)
{
	cuuint64_t record = RECORD_CODES + 4096 / a->group, across = cols / RECORD_COLS;
	tensor_shape t = {CU_TENSOR_MAP_DATA_TYPE_UINT64, CU_TENSOR_MAP_SWIZZLE_NONE, 4, data,
	                  {record / 8, across, (cuuint64_t)rows / 16, (cuuint64_t)a->experts},
	                  {record, across * record, (cuuint64_t)stride},
	                  {(cuuint32_t)record / 8, (cuuint32_t)records, (cuuint32_t)blocks, 1}};

	return make_tensor_map(map, t);
}

/* A box is a stage of the tile's. */
template <typename L>
static cudaError_t make_stream_maps(stream_maps *maps, const kk_moe_args *a)
{
	cudaError_t rc = map_weights(&maps->gate_up, a, a->gate_up, a->gate_up_stride, 2 * a->intermediate, a->hidden,
	                             L::ROWS / 16, L::PER);

	return rc != cudaSuccess ? rc
	                         : map_weights(&maps->down, a, a->down, a->down_stride, a->hidden, a->intermediate,
	                                       L::DOWN_ROWS / 16, L::REC);
}

/* `more`: the kernel's arguments after the first. */
template <typename L, typename Kernel, typename... More>
static cudaError_t launch_stream(const kk_moe_args *a, Kernel kernel, int threads, cudaStream_t stream,
                                 const More &...more)
{
	cudaLaunchAttribute attr = {};
	cudaLaunchConfig_t config = {};
	cudaError_t rc = allow_shared(kernel, a->smem_bytes);

	if (rc != cudaSuccess)
		return rc;
	if (a->warps != L::W || a->hidden % L::DOWN_ROWS || 2 * a->intermediate % L::ROWS)
		return cudaErrorInvalidValue;
	config.gridDim = dim3(a->blocks);
	config.blockDim = dim3(threads);
	config.dynamicSmemBytes = a->smem_bytes;
	config.stream = stream;
	config.attrs = &attr;
	/* Blocks wait for each other. Where launches overlap, all run at once without being told to (moe_int4.cu, RULES),
	 * and a cooperative launch begins 1 us later. */
	config.numAttrs = 1;
	if (a->pdl) {
		attr.id = cudaLaunchAttributeProgrammaticStreamSerialization;
		attr.val.programmaticStreamSerializationAllowed = 1;
	} else {
		attr.id = cudaLaunchAttributeCooperative;
		attr.val.cooperative = 1;
	}
	return cudaLaunchKernelEx(&config, kernel, *a, more...);
}

template <typename L, bool DIRECT>
static cudaError_t launch_tile(const kk_moe_args *a, cudaStream_t stream)
{
	stream_maps maps;
	cudaError_t rc = make_stream_maps<L>(&maps, a);

	return rc != cudaSuccess ? rc : launch_stream<L>(a, moe_stream<L, DIRECT>, L::THREADS, stream, maps);
}

cudaError_t moe_stream_large(const kk_moe_args *a, cudaStream_t stream);
cudaError_t moe_prefill_launch(const kk_moe_args *a, cudaStream_t stream);

#endif

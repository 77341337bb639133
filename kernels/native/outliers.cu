// Outliers: what a sparse matrix adds to a product, out += x D^T, D by rows.
//
// Legend: M rows of activations, N rows of the weight, D its outliers beyond what codes mean in their places. WIDE says whether
// columns are int32, else u16. Grid (ceil(N / 8), eights of rows of activations at a time), 256 threads: a warp has a row of D.
#include "intrinsics.cuh"

#if WIDE
typedef int Column;
#else
typedef u16 Column;
#endif

// x [M, >= K] with rows ldx apart; deltas fp32 and columns [n], those of row r from offsets[r] to offsets[r + 1], int32 [N + 1];
// out [M, N].
extern "C" __global__ void __launch_bounds__(256)
outliers(const u16* __restrict__ x, const float* __restrict__ deltas, const void* __restrict__ columns,
         const int* __restrict__ offsets, u16* __restrict__ out, int M, int N, int ldx) {
    const int lane = threadIdx.x % 32, n = blockIdx.x * 8 + threadIdx.x / 32;
    if (n >= N) return;
    const int begin = offsets[n], end = offsets[n + 1];
    if (begin == end) return;
    for (int first = 8 * blockIdx.y; first < M; first += 8 * gridDim.y) {
        float sums[8] = {};
        for (int i = begin + lane; i < end; i += 32) {
            const float delta = deltas[i];
            const u16* at = x + static_cast<const Column*>(columns)[i];
#pragma unroll
            for (int j = 0; j < 8; j++) sums[j] += delta * float_of(at[u64(min(first + j, M - 1)) * ldx]);
        }
#pragma unroll
        for (int apart = 16; apart; apart /= 2)
#pragma unroll
            for (int j = 0; j < 8; j++) sums[j] += __shfl_xor_sync(ALL_LANES, sums[j], apart);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            u16* to = out + u64(first + j) * N + n;
            if (lane == j && first + j < M) *to = half_of(float_of(*to) + sums[j]);
        }
    }
}

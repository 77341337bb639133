// Finish: what skinny computed in several splits, added in their order, and made an output.
//
// Legend: M rows of activations, N rows of the weight. Grid (ceil(N / 256), rows at a time), or (ceil(N / 256), blocks) where
// there is a map of blocks; 256 threads.
#include "intrinsics.cuh"

// partials fp32 [splits, M, N]; bias [experts?, N] or null; tensor_scale fp32 [experts?] or null; blocks int32 [3, nblocks] or
// null, the expert, the first row and how many rows of each; out [M, N].
extern "C" __global__ void __launch_bounds__(256)
finish(const float* __restrict__ partials, const u16* __restrict__ bias, const float* __restrict__ tensor_scale,
       const int* __restrict__ blocks, u16* __restrict__ out, int M, int N, int splits, int nblocks) {
    const int n = blockIdx.x * 256 + threadIdx.x;
    if (n >= N) return;
    const int y = blockIdx.y, expert = blocks ? blocks[y] : 0;
    const int first = blocks ? blocks[nblocks + y] : y, rows = blocks ? blocks[2 * nblocks + y] : 0;
    const int end = blocks ? first + rows : M, step = blocks ? 1 : gridDim.y;
    const float divisor = tensor_scale ? tensor_scale[expert] : 1.f;
    const float more = bias ? float_of(bias[u64(expert) * N + n]) : 0.f;
    for (int m = first; m < end; m += step) {
        const float* at = partials + u64(m) * N + n;
        float sum = 0;
        for (int split = 0; split < splits; split++) sum += at[u64(split) * M * N];
        out[u64(m) * N + n] = half_of(sum / divisor + more);
    }
}

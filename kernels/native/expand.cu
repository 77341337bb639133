// Expand: a packed weight as the dense one that it means, [N, K] in halves, each rounded once.
//
// Legend: N rows and K columns of the weight, T = ceil(N / 16); lane 4g + t; p, i, z as in decode.cuh. Grid (T, ceil(chunks / 4)),
// 128 threads: a warp has a chunk of 16 rows.
#include "decode.cuh"

// A scale as steps() of algebra/scales.py has it, what decode.cuh leaves out included.
DEVICE float exact_scale(u32 stored) {
    const float nan = __uint_as_float(0x7fc00000u);
    if (SCALE == SCALE_E8M0) return stored == 255 ? nan : stored ? meant_scale(stored) : 0x1p-127f;
    if (SCALE == SCALE_E4M3) return (stored & 0x7f) == 0x7f ? nan : meant_scale(stored);
    return meant_scale(stored);
}

// tiles, scale and zero as tiles.py has them; table fp32 [16] where codes are looked up; tensor_scale fp32 [], which scales in
// e4m3 are divided by; out [N, K].
extern "C" __global__ void __launch_bounds__(128, 8)
expand(const uint4* __restrict__ tiles, const void* __restrict__ scale, const u8* __restrict__ zero, const u32* __restrict__ table,
       const float* __restrict__ tensor_scale, u16* __restrict__ out, int N, int K, int chunks, int groups, int shift) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, c = blockIdx.y * 4 + threadIdx.x / 32;
#if GRID == GRID_TABLE
    // Sixteen neighbouring words lie in banks of their own, whichever of them lanes ask for.
    __shared__ float values[16];
    if (threadIdx.x < 16) values[threadIdx.x] = __uint_as_float(table[threadIdx.x]);
    __syncthreads();
#endif
    if (c >= chunks) return;
    const float divisor = SCALE == SCALE_E4M3 ? *tensor_scale : 1;
#pragma unroll 1
    for (int r = g; r < 16; r += 8) {
        const int row = blockIdx.x * 16 + r;
        if (row >= N) return;
        Words words;
        load(words, tiles + (u64(blockIdx.x) * chunks + c) * (16 * ROW), r, t);
#pragma unroll
        for (int p = 0; p < PLANES; p++) {
            const int column = c * CHUNK + 32 * p + 8 * t;
            if (column >= K) break;
            const u64 at = (u64(blockIdx.x) * groups + (column >> shift)) * 16 + r;
            const float s = exact_scale(static_cast<const Stored*>(scale)[at]) / divisor;
            const u32 with = SCALED ? both(ONE) : ZERO ? zero[at] : MIDDLE;
            u32 dense[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
#if GRID == GRID_TABLE
                const u32 code = words.low[i] >> 4 * p;
                dense[i] = halves_of(values[code & 15] * s, values[code >> 16 & 15] * s);
#else
                const u32 pair = decode(words, i, p, with, nullptr);
                dense[i] = halves_of(float_of(pair) * (1 << POWER) * s, float_of(pair >> 16) * (1 << POWER) * s);
#endif
            }
            u16* to = out + u64(row) * K + column;
            if (K % 8 == 0) {
                store(to, dense);
            } else {
#pragma unroll
                for (int j = 0; j < 8; j++)
                    if (column + j < K) to[j] = dense[j / 2] >> j % 2 * 16;
            }
        }
    }
}

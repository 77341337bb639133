// Skinny: a few rows of activations by a packed weight, y = x W^T + b, codes to products in registers.
//
// Legend: M rows of activations, N rows and K columns of the weight; 8 NT rows of activations, which are counted by n, and WARPS
// warps a block; lane 4g + t; p and i as in decode.cuh. Grid (ceil(N / 16), splits, ceil(M / 8 NT)), or in z the map's blocks.
//
// A block has 16 rows of the weight, and its warps take turns at their chunks. Codes are the left operand of a product of 16 by 16
// by 8: a lane loads 16 bytes of rows g and g + 8, words 8t to 8t + 7, and in plane p has columns 32p + 8t to 32p + 8t + 7. The
// order of columns within a product is free as long as activations have the same, so those are plain 16 bytes too, of row g of each
// eight. Sums of a group are scaled in fp32. Warps, and then splits, are added in their order, so that every run gives the same.
#include "decode.cuh"

#ifndef NT
#define NT 1
#endif
#ifndef WARPS
#define WARPS 8
#endif

constexpr int SIDES = FOLD || SCALED ? 1 : 2;  // sums of a run: without a FOLD lanes t < 2 have another group than the others
constexpr int SCALES = PLANES / RUN * SIDES;   // that a lane has of each row of a chunk
constexpr bool EARLY = SCALES <= 2;            // whether they are loaded as early as codes
constexpr int PITCH = 20;                      // floats between rows of activations where warps are added: no conflicts of banks

// Registers that a thread may have, by what each needs, and chunks that a warp has asked for when it begins with one.
constexpr bool CROWDED = BITS < 4 || GRID == GRID_TABLE || !EARLY, FULL = BITS < 4 && !EARLY && NT * SIDES > 1;
constexpr bool MORE = CROWDED || ZERO || SCALES > 1;
constexpr int REGISTERS = NT > 2 && MORE                                ? 255
                          : NT > 2 || FULL                              ? 168
                          : NT > 1 || (CROWDED && GRID != GRID_E2M1)    ? 128
                          : MORE                                        ? 80
                                                                        : 64;
constexpr int DEPTH = NT > 1 && CROWDED ? 1 : 2;

// What a lane has of a chunk.
struct Chunk {
    Words words[2];
    u32 scale[SCALES][2], zero[SCALES][2];
};

// Where a lane finds its part of a weight.
struct Weight {
    const uint4* tiles;
    const Stored* scale;
    const u8* zero;
    const u32* pairs;
    int shift, g, t;

    __device__ __forceinline__ void load_scales(Chunk& to, int c, int group) const {
        const int own = SCALED ? 2 * group + t / 2 : group;
        const int at = 16 * (GROUPS == 1 ? c * CHUNK >> shift : c * GROUPS + own);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            to.scale[group][r] = scale[at + 8 * r];
            to.zero[group][r] = ZERO ? zero[at + 8 * r] : MIDDLE;
        }
    }

    // Chunk c, the next of those that are a step apart.
    __device__ __forceinline__ void load(Chunk& to, int c, int step) {
#pragma unroll
        for (int r = 0; r < 2; r++) ::load(to.words[r], tiles, g + 8 * r, t);
#pragma unroll
        for (int group = 0; EARLY && group < SCALES; group++) load_scales(to, c, group);
        tiles += u64(step) * (16 * ROW);
    }

    // Adds the product of chunk c; x: [NT], from its column 8t on. TAIL where less than a chunk of columns is left.
    template <bool TAIL>
    __device__ __forceinline__ void multiply(float (&sums)[NT][4], Chunk& chunk, int c, const u16* const (&x)[NT], int left) const {
#pragma unroll
        for (int run = 0; run < PLANES / RUN; run++) {
            float part[SIDES][NT][4];
#pragma unroll
            for (int group = run * SIDES; !EARLY && group < (run + 1) * SIDES; group++) load_scales(chunk, c, group);
#pragma unroll
            for (int q = 0; q < RUN; q++) {
                const int p = run * RUN + q;
                u32 b[NT][4], with[2];
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    if (!TAIL || 32 * p + 8 * t < left) ::load(b[n], x[n] + 32 * p);
                    else b[n][0] = b[n][1] = b[n][2] = b[n][3] = 0;
                }
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    // Not an index that is only known when it runs: then registers would have to be memory.
                    const u32 zero = SIDES > 1 && t < 2 ? chunk.zero[run * SIDES][r] : chunk.zero[run * SIDES + SIDES - 1][r];
                    with[r] = SCALED ? scale_halves(chunk.scale[run][r]) : zero;
                }
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    u32 a[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) a[j] = decode(chunk.words[j % 2], i + j / 2, p, with[j % 2], pairs);
#pragma unroll
                    for (int side = 0; side < SIDES; side++) {
                        const bool own = SIDES == 1 || t / 2 == side;
#pragma unroll
                        for (int n = 0; n < NT; n++)
                            mma(SCALED ? sums[n] : part[side][n], a, own ? b[n][i] : 0, own ? b[n][i + 1] : 0, SCALED || q || i);
                    }
                }
            }
#pragma unroll
            for (int j = 0; !SCALED && j < 4 * SIDES; j++) {
                const int side = j / 4;
                const float s = meant_scale(chunk.scale[run * SIDES + side][j % 4 / 2]);
#pragma unroll
                for (int n = 0; n < NT; n++) sums[n][j % 4] += part[side][n][j % 4] * s;
            }
        }
    }
};

// x [M, >= K] with rows ldx apart, readable up to the next multiple of 8 columns, where it is zero beyond K; tiles, scale and zero
// as tiles.py has them, matrices of experts behind one another; table fp32 [16] where codes are looked up; bias [experts?, N] or
// null; tensor_scale fp32 [experts?], which scales in e4m3 are divided by; blocks int32 [3, nblocks] or null: expert, first row and
// rows of each. out [M, N] for a single split, else fp32 [splits, M, N] for `finish` to add.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 65536 / (32 * WARPS * REGISTERS))
skinny(const u16* __restrict__ x, const uint4* __restrict__ tiles, const void* __restrict__ scale, const u8* __restrict__ zero,
       const u32* __restrict__ table, const u16* __restrict__ bias, const float* __restrict__ tensor_scale,
       const int* __restrict__ blocks, void* __restrict__ out, int M, int N, int K, int ldx, int chunks, int groups, int shift,
       int nblocks) {
    constexpr bool LOOKS = GRID == GRID_TABLE;
    __shared__ union {
        u32 pairs[LOOKS ? 256 : 1][32];
        float added[WARPS][8 * NT][PITCH];
    } shared;
    const int thread = threadIdx.x, warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    const int z = blockIdx.z, expert = blocks ? blocks[z] : 0, first = blocks ? blocks[nblocks + z] : 8 * NT * z;
    const int rows = blocks ? blocks[2 * nblocks + z] : M - first;
    if (rows <= 0) return;

    const u64 tile = u64(expert) * gridDim.x + blockIdx.x, grid = tile * groups * 16 + g;
    const int step = WARPS * gridDim.y, full = K / CHUNK;
    int c = blockIdx.y * WARPS + warp;
    Weight weight = {tiles + (tile * chunks + c) * (16 * ROW), static_cast<const Stored*>(scale) + grid,
                     ZERO ? zero + grid : zero, &shared.pairs[0][thread % 32], shift, g, t};
    Chunk ahead[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (c + d * step < full) weight.load(ahead[d], c + d * step, step);

    for (int i = thread; LOOKS && i < 256 * 32; i += 32 * WARPS)
        shared.pairs[i / 32][i % 32] = halves_of(__uint_as_float(table[i / 32 % 16]), __uint_as_float(table[i / 512]));
    if (LOOKS) __syncthreads();

    // For rows that are not there the last one stands in; its products are dropped.
    const u16* at[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) at[n] = x + u64(first + min(g + 8 * n, rows - 1)) * ldx + c * CHUNK + 8 * t;
    float sums[NT][4] = {};
    while (c < full) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            weight.multiply<false>(sums, ahead[d], c, at, 0);
            if (c + DEPTH * step < full) weight.load(ahead[d], c + DEPTH * step, step);
#pragma unroll
            for (int n = 0; n < NT; n++) at[n] += u64(step) * CHUNK;
            c += step;
            if (c >= full) break;
        }
    }
    if (c < chunks) {
        Chunk last;
        weight.load(last, c, step);
        weight.multiply<true>(sums, last, c, at, K - c * CHUNK);
    }

    if (LOOKS) __syncthreads();
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) shared.added[warp][8 * n + 2 * t + j % 2][g + j / 2 * 8] = sums[n][j];
    __syncthreads();
    for (int i = thread; i < 8 * NT * 16; i += 32 * WARPS) {
        const int m = i / 16, n = blockIdx.x * 16 + i % 16;
        if (m >= rows || n >= N) continue;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += shared.added[w][m][i % 16];
        sum *= 1 << POWER;
        const u64 place = u64(first + m) * N + n;
        if (gridDim.y > 1) {
            static_cast<float*>(out)[u64(blockIdx.y) * M * N + place] = sum;
            continue;
        }
        if (SCALE == SCALE_E4M3) sum /= tensor_scale[expert];
        if (bias) sum += float_of(bias[u64(expert) * N + n]);
        static_cast<u16*>(out)[place] = half_of(sum);
    }
}

// Integers: activations rounded to whole numbers, by codes of 2 to 8 bits, summed as int32 within spans of columns.
//
// Legend: y = sum over spans of s t (sum_k q_k c_k - o sum_k q_k); q and s of whole_inputs.h, c a code, t its scale, o its zero point.
// A block is 16 rows of 32 columns: vectors of 64 bytes, four for each row. Step k of a product takes the columns 4 k to 4 k + 3; with
// codes of L bits, vector k L / 8 has those of step k from bit k L % 8 of its bytes on. 3, 5 and 6 bits lie as 2 + 1, 4 + 1 and 4 + 2.
// A sum of a span is exact, also as fp32; every number is made by one thread, in one order.
#include <stdlib.h>

#include "decode.h"
#include "scales.h"
#include "turns.h"
#include "whole_inputs.h"

namespace {

constexpr int VECTORS = 16 / W;                        // of the rows of a tile
constexpr int TILES = W == 16 ? 2 : 1;                 // tiles at a time
constexpr int NV = TILES * VECTORS;
constexpr int BLOCK = W == 16 ? 12 : 4;                // tokens whose sums are in registers
constexpr int MOST = 256;                              // columns of a span: 256 x 255 x 128 is exact as fp32
constexpr int AHEAD = 4096;                            // bytes that memory is asked for beforehand

struct Run {
  const Weight& weight;
  const Work& work;
  const Rounding& how;
  Whole x;
  int64_t tiles, blocks, next, rounded;
  int failed;
};

#if defined(NEON)
template <int BITS>
constexpr int LESS = BITS == 8 ? 128 : 0;  // taken from codes, so that they are signed
#else
template <int BITS>
constexpr int LESS = 0;
#endif

// Adds four products of unsigned by signed bytes to each lane.
template <int BITS>
S dot(S sum, U codes, U x) {
#if defined(__AVX512VNNI__)
  return (S)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#elif defined(__AVX512BW__)
  const __m512i c = (__m512i)codes, v = (__m512i)x;
  if constexpr (BITS < 8) return sum + (S)_mm512_madd_epi16(_mm512_maddubs_epi16(c, v), _mm512_set1_epi16(1));
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(c, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8));
  return sum + (S)even + (S)_mm512_madd_epi16(_mm512_srli_epi16(c, 8), _mm512_srai_epi16(v, 8));
#elif defined(__AVX2__)
  const __m256i c = (__m256i)codes, v = (__m256i)x;
  if constexpr (BITS < 8) return sum + (S)_mm256_madd_epi16(_mm256_maddubs_epi16(c, v), _mm256_set1_epi16(1));
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(c, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
  return sum + (S)even + (S)_mm256_madd_epi16(_mm256_srli_epi16(c, 8), _mm256_srai_epi16(v, 8));
#elif defined(NEON)
  const int8x16_t c = vreinterpretq_s8_u32((uint32x4_t)(BITS == 8 ? codes ^ 0x80808080u : codes)), v = vreinterpretq_s8_u32((uint32x4_t)x);
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(c), vget_low_s8(v))), high = vpaddlq_s16(vmull_s8(vget_high_s8(c), vget_high_s8(v)));
  return sum + (S)vpaddq_s32(low, high);
#else
  for (int l = 0; l < W; l++)
    for (int i = 0; i < 4; i++) sum[l] += (int32_t)(codes[l] >> 8 * i & 255) * (int8_t)(x[l] >> 8 * i & 255);
  return sum;
#endif
}

// The codes of step k, vector v of the rows.
template <int BITS>
U codes_of(const uint8_t* block, int v, int k) {
  using D = Codes<BITS>;
  const auto part = [&](int from, int bits, uint32_t mask) {
    U found;
    memcpy(&found, block + 64 * (from + k * bits / 8) + 4 * W * v, 4 * W);
    return bits == 8 ? found : found >> (k * bits % 8) & mask * 0x01010101u;
  };
  U code = part(0, D::LOW, (1u << D::LOW) - 1);
  if constexpr (D::MORE) code |= part(D::LOW, D::MORE, (1u << D::MORE) - 1) << D::LOW;
  return code;
}

inline F floats(S v) { return __builtin_convertvector(v, F); }

// The products of TILES tiles by tokens m to m + T; `grid` has the tiles' scales, then zero points, each [G, 16].
template <int BITS, int T>
void multiply(const Run& run, const uint8_t* const* codes, const float* grid, int64_t m, F (*totals)[NV]) {
  const Weight& w = run.weight;
  const Whole& x = run.x;
  constexpr int CHAINS = T == 1 ? 2 : 1;  // sums that do not wait for each other
  const int each = x.span / 32, middle = w.zero ? 0 : LESS<BITS> - w.middle;
  const int64_t apart = 16 * w.groups;
  for (int64_t g = 0, b = 0; g < x.spans; g++) {
    S sums[CHAINS][T][NV] = {};
    for (int t = 0; t < T; t++)
      for (int v = 0; v < NV; v++) sums[0][t][v] = middle * x.total[(m + t) * x.spans + g] - S{};
    const int64_t until = b + each < run.blocks ? b + each : run.blocks;
    for (; b < until; b++) {
      const uint8_t* at[TILES];
      for (int i = 0; i < TILES; i++) {
        at[i] = codes[i] + b * BITS * 64;
        if constexpr (T == 1 && BITS < 8)
          for (int line = 0; line < BITS; line++) __builtin_prefetch(at[i] + AHEAD + 64 * line, 0, 2);
      }
      const int8_t* q = x.q + m * x.apart + 32 * b;
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) {
        U c[NV];
        for (int v = 0; v < NV; v++) c[v] = codes_of<BITS>(at[v / VECTORS], v % VECTORS, k);
        for (int t = 0; t < T; t++) {
          uint32_t four;
          memcpy(&four, q + t * x.apart + 4 * k, 4);
          for (int v = 0; v < NV; v++) sums[k % CHAINS][t][v] = dot<BITS>(sums[k % CHAINS][t][v], c[v], four - U{});
        }
      }
    }
    const float* scale = grid + ((g * x.span) >> w.shift) * 16;
    for (int v = 0; v < NV; v++) {
      const float* of = scale + v / VECTORS * 2 * apart + v % VECTORS * W;
      const F by = load(of);
      for (int t = 0; t < T; t++) {
        const int64_t place = (m + t) * x.spans + g;
        F sum = floats(CHAINS == 2 ? sums[0][t][v] + sums[CHAINS - 1][t][v] : sums[0][t][v]);
        if (w.zero) sum = fma(load(of + apart), splat((float)-x.total[place]), sum);
        totals[t][v] = fma(sum, by * splat(x.scale[place]), totals[t][v]);
      }
    }
  }
}

// What a token's sums for a tile become.
void finish(const Run& run, int64_t expert, int64_t t, int64_t m, float* sums) {
  const Weight& w = run.weight;
  const int rows = w.rows - 16 * t < 16 ? (int)(w.rows - 16 * t) : 16;
  if (run.how.asymmetric)
    for (int r = 0; r < rows; r++) sums[r] -= run.x.lean[m] * run.how.sums[expert * w.rows + 16 * t + r];
  if (w.outliers) add_outliers(w, run.work, m, 16 * t, rows, sums);
  Work to = run.work;
  if (run.how.wide) to.dtype = F32;
  put(to, m * w.rows + 16 * t, 16 * t, sums, rows);
}

template <int BITS, int T>
void tokens(const Run& run, int64_t expert, int64_t t, int tiles, const uint8_t* const* codes, const float* grid, int64_t& m, int64_t until) {
  for (; m + T <= until; m += T) {
    alignas(64) F totals[T][NV] = {};
    multiply<BITS, T>(run, codes, grid, m, totals);
    for (int i = 0; i < T; i++)
      for (int n = 0; n < tiles; n++) {
        alignas(64) float sums[16];
        memcpy(sums, &totals[i][n * VECTORS], 64);
        finish(run, expert, t + n, m + i, sums);
      }
  }
}

// The tiles from t on of an expert, by its tokens.
template <int BITS>
void some_tiles(const Run& run, int64_t expert, int64_t t, int tiles, float* grid) {
  const Weight& w = run.weight;
  const Work& work = run.work;
  int64_t m = work.offsets ? work.offsets[expert] : 0;
  const int64_t until = work.offsets ? work.offsets[expert + 1] : work.tokens;
  if (m == until) return;
  const uint8_t* codes[TILES];
  for (int i = 0; i < TILES; i++) {
    const int64_t at = expert * run.tiles + t + (i < tiles ? i : 0), apart = 16 * w.groups;  // the last may be alone
    float *scale = grid + 2 * i * apart, *zero = scale + apart;
    codes[i] = (const uint8_t*)w.tiles + at * run.blocks * BITS * 64;
    scales_of(w, at, divisor_of(w, expert), scale);
    for (int64_t n = 0; w.zero && n < apart; n++) zero[n] = (float)(w.zero[at * apart + n] - LESS<BITS>);
  }
  tokens<BITS, BLOCK>(run, expert, t, tiles, codes, grid, m, until);
  tokens<BITS, BLOCK / 2>(run, expert, t, tiles, codes, grid, m, until);
  tokens<BITS, 2>(run, expert, t, tiles, codes, grid, m, until);
  tokens<BITS, 1>(run, expert, t, tiles, codes, grid, m, until);
}

float* room_for(Run& run, int64_t count) {
  float* room = (float*)aligned_alloc(64, (4 * count + 63) / 64 * 64);
  if (!room) __atomic_store_n(&run.failed, 1, __ATOMIC_RELAXED);
  return room;
}

void round_inputs(void* given) {
  Run& run = *(Run*)given;
  float* room = room_for(run, run.x.padded);
  if (!room) return;
  for (int64_t m; (m = __atomic_fetch_add(&run.rounded, 1, __ATOMIC_RELAXED)) < run.work.tokens;)
    round_token(run.work, run.how, run.weight.columns, m, room, run.x);
  free(room);
}

void worker(void* given) {
  Run& run = *(Run*)given;
  const int64_t of = (run.tiles + TILES - 1) / TILES;
  float* grid = room_for(run, 2 * TILES * 16 * run.weight.groups);
  if (!grid) return;
  by_bits(run.weight.bits, [&](auto codes) {
    in_turns(run.next, of * run.work.experts, run.work.threads, [&](int64_t from, int64_t until) {
      for (int64_t i = from; i < until; i++) {
        const int64_t t = i % of * TILES, left = run.tiles - t;
        some_tiles<decltype(codes)::BITS>(run, i / of, t, (int)(left < TILES ? left : TILES), grid);
      }
    });
  });
  free(grid);
}

}  // namespace

// Multiplies. Returns 0, or 1 if there is no memory.
EXPORT int NAME(integers, ISA)(const Weight* weight, const Work* work, const Rounding* how) {
  const int64_t tokens = work->tokens, blocks = (weight->columns + 31) / 32, group = weight->shift < 8 ? 1 << weight->shift : MOST;
  const int span = how->span && how->span < group ? how->span : (int)group;
  const int64_t lines = (blocks + 1) / 2 | 1;  // odd, or the tokens of a block share few sets of the cache
  Whole x{32 * blocks, 64 * lines, (32 * blocks + span - 1) / span, span, nullptr, nullptr, nullptr, nullptr};
  const int64_t bytes = tokens * x.apart, floats = tokens * (2 * x.spans + 1);
  char* room = (char*)aligned_alloc(64, bytes + (4 * floats + 63) / 64 * 64);
  if (!room) return 1;
  x.q = (int8_t*)room, x.scale = (float*)(room + bytes), x.total = (int32_t*)(x.scale + tokens * x.spans), x.lean = x.scale + 2 * tokens * x.spans;
  Run run{*weight, *work, *how, x, (weight->rows + 15) / 16, blocks, 0, 0, 0};
  if (tokens * weight->columns > 20000)
    by_threads(*work, round_inputs, &run);
  else
    round_inputs(&run);
  if (!run.failed) by_threads(*work, worker, &run);
  free(room);
  return run.failed;
}

// Rows of a matrix as dense numbers, as `expand` of expand.cpp makes them.
EXPORT void NAME(integer_rows, ISA)(const Rows* rows) {
  const Weight& w = *rows->weight;
  const int64_t blocks = (w.columns + 31) / 32;
  by_bits(w.bits, [&](auto codes) {
    using D = decltype(codes);
    for (int64_t i = 0; i < rows->count; i++) {
      const int64_t row = rows->index ? rows->index[i] : rows->first + i, tile = row / 16, lane = row % 16;
      const uint8_t* at = (const uint8_t*)w.tiles + tile * blocks * D::BITS * 64 + 4 * lane;
      for (int64_t column = 0; column < w.columns; column++) {
        const uint8_t* byte = at + column / 32 * D::BITS * 64 + column % 4;
        const int k = column % 32 / 4;
        int code = byte[k * D::LOW / 8 * 64] >> (k * D::LOW % 8) & ((1 << D::LOW) - 1);
        if constexpr (D::MORE) code |= (byte[(D::LOW + k * D::MORE / 8) * 64] >> (k * D::MORE % 8) & ((1 << D::MORE) - 1)) << D::LOW;
        const int64_t place = (tile * w.groups + (column >> w.shift)) * 16 + lane;
        float scale;
        stored(w.scale, place, 1, w.scales, &scale);
        const float v = (float)(code - (w.zero ? w.zero[place] : w.middle)) * scale;
        write(rows->out, i * w.columns + column, v, rows->dtype);
      }
    }
  });
}

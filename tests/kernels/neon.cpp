// Compares kernels for NEON with those in plain C++ on random bits, every kind of code: built for aarch64 and run by qemu.
#include <math.h>
#include <initializer_list>
#include <stdio.h>
#include <stdlib.h>

#include "attention.h"
#include "dense.h"
#include "steps.h"
#include "weight.h"

extern "C" int product_neon(const Weight*, const Work*);
extern "C" int product_plain(const Weight*, const Work*);
extern "C" int integers_neon(const Weight*, const Work*, const Rounding*);
extern "C" int integers_plain(const Weight*, const Work*, const Rounding*);
extern "C" void integer_rows_neon(const Rows*);
extern "C" void integer_rows_plain(const Rows*);
extern "C" void expand_neon(Rows*);
extern "C" void expand_plain(Rows*);
extern "C" void norm_neon(const Norm*);
extern "C" void norm_plain(const Norm*);
extern "C" void rotary_neon(const Rotary*);
extern "C" void rotary_plain(const Rotary*);
extern "C" void mix_neon(const Mix*);
extern "C" void mix_plain(const Mix*);
extern "C" void gate_neon(const Gate*);
extern "C" void gate_plain(const Gate*);
extern "C" int attend_neon(const Attention*);
extern "C" int attend_plain(const Attention*);
extern "C" void dense_neon(const Dense*);
extern "C" void dense_plain(const Dense*);

static uint32_t state = 1;
static uint32_t bits() { return state = state * 1664525u + 1013904223u; }
static float uniform() { return (bits() >> 8) * 0x1p-23f - 1; }

int main() {
  const struct { int bits, grid, scales; } kinds[] = {
      {2, TABLE, F32}, {3, TABLE, BF16}, {4, TABLE, F16}, {4, TABLE, BYTE_E8M0}, {4, TABLE, BYTE_E4M3}, {5, INTEGER, F32},
      {6, INTEGER, BF16}, {8, INTEGER, F32}, {8, E4M3, F32}, {8, E5M2, F32},
  };
  const int64_t N = 37, K = 520;
  int failed = 0, compared = 0;
  for (auto kind : kinds)
    for (int shift : {4, 5, 6, 7, 8, 31})
      for (int beside = 0; beside < 3; beside++) {
        if (beside && kind.grid != TABLE && kind.grid != INTEGER) continue;
        const int low = kind.bits == 3 ? 2 : kind.bits == 5 || kind.bits == 6 ? 4 : kind.bits, columns = 512 / low;
        const int words = kind.bits == 3 || kind.bits == 6 ? 48 : kind.bits == 5 ? 40 : 32;
        const int64_t T = (N + 15) / 16, C = (K + columns - 1) / columns, G = shift == 31 ? 1 : (C * columns + (1ll << shift) - 1) >> shift;
        uint16_t* tiles = (uint16_t*)malloc(T * C * 16 * words * 2);
        for (int64_t i = 0; i < T * C * 16 * words; i++) {
          tiles[i] = bits() >> 16;
          if (kind.grid >= E4M3) tiles[i] &= 0xbfbf;  // no infinities
        }
        float *scale = (float*)malloc(T * G * 16 * 4), *minimum = (float*)malloc(T * G * 16 * 4);
        uint8_t* zero = (uint8_t*)malloc(T * G * 16);
        for (int64_t i = 0; i < T * G * 16; i++) {
          const float v = uniform();
          const uint32_t half = bits();
          if (kind.scales == F32) scale[i] = v;
          if (kind.scales == BF16 || kind.scales == F16) ((uint16_t*)scale)[i] = 0x2c00 | (half & 0x8fff);
          if (kind.scales >= BYTE_E8M0) ((uint8_t*)scale)[i] = kind.scales == BYTE_E8M0 ? 120 + half % 8 : half & 0x77;
          zero[i] = bits() >> 24 & ((1 << kind.bits) - 1);
        }
        for (int64_t i = 0; i < T * G * 16; i++)
          if (kind.scales == F32) minimum[i] = uniform();
        float table[16], divisor = 3;
        for (float& v : table) v = uniform();
        if (beside == 2 && kind.scales != F32) continue;
        Weight w{};
        w.tiles = tiles, w.scale = scale, w.zero = beside == 1 ? zero : nullptr, w.minimum = beside == 2 ? minimum : nullptr;
        w.divisor = kind.scales == BYTE_E4M3 ? &divisor : nullptr, w.table = table, w.rows = N, w.columns = K, w.chunks = C, w.groups = G;
        w.bits = kind.bits, w.grid = kind.grid, w.scales = kind.scales, w.shift = shift, w.middle = 1 << (kind.bits - 1);
        for (int tokens : {1, 2, 13, 31}) {
          float *x = (float*)malloc(tokens * K * 4), *one = (float*)malloc(tokens * N * 4), *two = (float*)malloc(tokens * N * 4);
          for (int64_t i = 0; i < tokens * K; i++) x[i] = uniform();
          Work work{x, nullptr, one, nullptr, tokens, K, 1, F32, 1, nullptr, 0};
          if (product_neon(&w, &work)) return 2;
          work.out = two;
          if (product_plain(&w, &work)) return 2;
          double most = 0, off = 0;
          for (int64_t i = 0; i < tokens * N; i++) most = fmax(most, fabs(two[i])), off = fmax(off, fabs(one[i] - two[i]));
          compared++;
          if (!(off <= 1e-5 * most)) failed++, printf("bits %d grid %d shift %d beside %d tokens %d: %g of %g\n", kind.bits, kind.grid, shift, beside, tokens, off, most);
          free(x), free(one), free(two);
        }
        for (int dtype : {F32, F16, BF16}) {
          char *one = (char*)calloc(N * K, 4), *two = (char*)calloc(N * K, 4);
          Rows rows{&w, nullptr, 0, N, one, dtype, 1, nullptr, 0};
          expand_neon(&rows);
          rows.out = two;
          expand_plain(&rows);
          compared++;
          for (int64_t i = 0; i < N * K * 4; i++)
            if (one[i] != two[i]) {
              failed++, printf("bits %d grid %d shift %d beside %d dtype %d: byte %ld\n", kind.bits, kind.grid, shift, beside, dtype, (long)i);
              break;
            }
          free(one), free(two);
        }
        free(tiles), free(scale), free(minimum), free(zero);
      }
  for (int plus_one : {0, 1}) {
    float x[3 * 37], weight[37], angle[6], one[3 * 37], two[3 * 37], three[3 * 37], four[3 * 37];
    for (float& v : x) v = uniform();
    for (float& v : weight) v = uniform();
    for (float& v : angle) v = uniform();
    norm_neon(new Norm{x, weight, one, 3, 37, 1e-5f, plus_one, F32}), norm_plain(new Norm{x, weight, two, 3, 37, 1e-5f, plus_one, F32});
    gate_neon(new Gate{x, one, three, 3 * 37, F32}), gate_plain(new Gate{x, one, four, 3 * 37, F32});
    rotary_neon(new Rotary{one, three, angle, angle, 1, 6, 6, 6, 0, F32}), rotary_plain(new Rotary{two, four, angle, angle, 1, 6, 6, 6, 0, F32});
    float mixed[96], plainly[96];
    mix_neon(new Mix{x, mixed, 96, 16 << plus_one, F32}), mix_plain(new Mix{x, plainly, 96, 16 << plus_one, F32});
    for (int i = 0; i < 96; i++)
      if (!(fabs(mixed[i] - plainly[i]) <= 2e-6)) failed++, printf("mixed, block %d: %d\n", 16 << plus_one, i);
    compared++;
    for (int i = 0; i < 3 * 37; i++)
      if (!(fabs(one[i] - two[i]) <= 2e-6 && fabs(three[i] - four[i]) <= 2e-6)) {
        failed++, printf("steps, plus one %d: %d\n", plus_one, i);
        break;
      }
  }
  for (int tokens : {1, 2, 7}) {
    constexpr int ROWS = 741;
    static float x[7 * 96], weight[ROWS * 96], bias[ROWS], one[7 * ROWS], two[7 * ROWS];
    for (float& v : x) v = uniform();
    for (float& v : weight) v = uniform();
    for (float& v : bias) v = uniform();
    dense_neon(new Dense{weight, ROWS, 96, Work{x, bias, one, nullptr, tokens, 96, 1, F32, 1, nullptr, 0}});
    dense_plain(new Dense{weight, ROWS, 96, Work{x, bias, two, nullptr, tokens, 96, 1, F32, 1, nullptr, 0}});
    compared++;
    for (int i = 0; i < tokens * ROWS; i++)
      if (!(fabs(one[i] - two[i]) <= 2e-5)) {
        failed++, printf("dense, %d tokens: %d\n", tokens, i);
        break;
      }
  }
  for (int bits_ : {2, 3, 4, 5, 6, 8})
    for (int shift : {5, 7, 31})
      for (int how = 0; how < 3; how++) {  // by spans; by token; by token with zero points
        const int64_t T = (N + 15) / 16, B = (K + 31) / 32, G = shift == 31 ? 1 : (B * 32 + (1ll << shift) - 1) >> shift;
        uint8_t *codes = (uint8_t*)malloc(T * B * bits_ * 64), *zero = (uint8_t*)malloc(T * G * 16);
        float *scale = (float*)malloc(T * G * 16 * 4), sums[37];
        for (int64_t i = 0; i < T * B * bits_ * 64; i++) codes[i] = bits() >> 24;
        for (int64_t i = 0; i < T * G * 16; i++) scale[i] = uniform(), zero[i] = bits() >> 24 & ((1 << bits_) - 1);
        for (float& v : sums) v = uniform();
        Weight w{};
        w.tiles = (uint16_t*)codes, w.scale = scale, w.zero = how == 1 ? zero : nullptr, w.rows = N, w.columns = K, w.groups = G;
        w.bits = bits_, w.grid = INTEGER, w.scales = F32, w.shift = shift, w.middle = 1 << (bits_ - 1);
        const Rounding rounding{sums, how == 2 ? 4 : 8, how == 2, how ? 0 : 64, 0};
        for (int tokens : {1, 2, 13}) {
          float *x = (float*)malloc(tokens * K * 4), *one = (float*)malloc(tokens * N * 4), *two = (float*)malloc(tokens * N * 4);
          for (int64_t i = 0; i < tokens * K; i++) x[i] = uniform();
          Work work{x, nullptr, one, nullptr, tokens, K, 1, F32, 1, nullptr, 0};
          if (integers_neon(&w, &work, &rounding)) return 2;
          work.out = two;
          if (integers_plain(&w, &work, &rounding)) return 2;
          double most = 0, off = 0;
          for (int64_t i = 0; i < tokens * N; i++) most = fmax(most, fabs(two[i])), off = fmax(off, fabs(one[i] - two[i]));
          compared++;
          if (!(off <= 1e-5 * most)) failed++, printf("integers, bits %d shift %d how %d tokens %d: %g of %g\n", bits_, shift, how, tokens, off, most);
          free(x), free(one), free(two);
        }
        float *one = (float*)malloc(N * K * 4), *two = (float*)malloc(N * K * 4);
        Rows rows{&w, nullptr, 0, N, one, F32, 1, nullptr, 0};
        integer_rows_neon(&rows);
        rows.out = two;
        integer_rows_plain(&rows);
        compared++;
        for (int64_t i = 0; i < N * K; i++)
          if (one[i] != two[i]) {
            failed++, printf("integers, bits %d shift %d: number %ld\n", bits_, shift, (long)i);
            break;
          }
        free(one), free(two), free(codes), free(zero), free(scale);
      }
  for (int dtype : {F32, F16, BF16})
    for (int64_t keys : {1, 17, 300}) {
      const int64_t H = 6, G = 2, D = 48, E = 80, size = dtype == F32 ? 4 : 2;
      char *x = (char*)malloc((H * D + G * keys * (D + E)) * size);
      float one[H * E], two[H * E];
      for (int64_t i = 0; i < H * D + G * keys * (D + E); i++)
        if (dtype == F32) ((float*)x)[i] = uniform();
        else ((uint16_t*)x)[i] = (bits() >> 16 & 0x83ff) | (dtype == F16 ? 0x3800 : 0x3f00);
      char *key = x + H * D * size, *value = key + G * keys * D * size;
      Attention job{x, key, value, one, nullptr, 1, H, G, keys, D, E, 0, D, 0, keys * D, D, 0, keys * E, E, 0, 0.1f, dtype, 1, nullptr};
      if (attend_neon(&job)) return 2;
      job.out = two;
      if (attend_plain(&job)) return 2;
      compared++;
      for (int64_t i = 0; i < H * E; i++) {
        const double a = dtype == F32 ? one[i] : ((uint16_t*)one)[i], b = dtype == F32 ? two[i] : ((uint16_t*)two)[i];
        // In half precision the last bit of a number may differ.
        if (!(fabs(a - b) <= (dtype == F32 ? 2e-6 : 1))) {
          failed++, printf("attention, dtype %d keys %ld: %ld\n", dtype, (long)keys, (long)i);
          break;
        }
      }
      free(x);
    }
  printf("%d comparisons, %d differ\n", compared, failed);
  return failed != 0 || compared < 100;
}

// Product: activations by a packed weight, or by the matrices of a stack, each token's row by its expert.
//
// Sums of a group are in fp32 and scaled there. Zero points and minima add a multiple of the sums of a group's activations, and
// outliers what they are beyond the codes in their places. Threads take tiles in turn; every sum is made by one of them, in one
// order.
#include <stdlib.h>

#include "panels.h"
#include "rows.h"
#include "turns.h"

namespace {

constexpr int FEW = 12;    // tokens up to which rows are multiplied, and not panels
constexpr int FEWER = 8;   // the same of what panels have at half the size, once it is rounded
constexpr int TURN = 16;   // tokens that a thread arranges in its turn
constexpr int64_t LEAST = 64, MOST = 512;  // tokens at a time, by panels,
constexpr int64_t CACHED = 8 << 20;        // between which so many bytes of them decide
constexpr int64_t ALONE = 128;             // tokens of a thread from which each has its own: caches share nothing that is written

struct Chunk {
  int columns, words;  // words of a row
};

struct Run {
  Job job;
  int64_t columns, parts;  // of a part of an arranged token, and how many
  bool few, pairs;
  bool divided;  // whether scales are divided, and not sums, of which there are fewer
  AddRows rows;
  AddPanels panels;
  int64_t next;  // the tokens, then the tiles that are next in turn
  int failed;    // whether a thread had no memory for its sums
};

void arrange_token(const Run& run, int64_t m) {
  const Weight& w = run.job.weight;
  const Work& work = run.job.work;
  for (int64_t c = 0; c < run.parts; c++) {
    const int64_t at = (c * work.tokens + m) * run.columns, left = w.columns - c * run.columns;
    const int64_t count = left < 0 ? 0 : left < run.columns ? left : run.columns;
    if (run.pairs)
      copied(work, m, c * run.columns, count, run.columns, (uint16_t*)run.job.x + at);
    else
      arranged(work, m, c * run.columns, count, run.columns, run.few, (float*)run.job.x + at);
  }
  if (run.job.totals) totalled(work, m, w, run.job.totals + m * w.groups);
}

void arranger(void* given) {
  Run& run = *(Run*)given;
  const int64_t all = run.job.work.tokens;
  for (;;) {
    const int64_t from = __atomic_fetch_add(&run.next, TURN, __ATOMIC_RELAXED);
    if (from >= all) break;
    for (int64_t m = from; m < from + TURN && m < all; m++) arrange_token(run, m);
  }
}

// What a tile's sums for token m become.
void finish(const Job& job, float divisor, const float* shift, int64_t t, int64_t m, float* sums) {
  const Weight& w = job.weight;
  const int rows = w.rows - 16 * t < 16 ? (int)(w.rows - 16 * t) : 16;
  for (int r = 0; divisor != 1 && r < 16; r++) sums[r] /= divisor;
  if (job.totals) {
    const float* total = job.totals + m * w.groups;
    for (int64_t g = 0; g < w.groups; g++)
      for (int r = 0; r < 16; r++) sums[r] += shift[g * 16 + r] * total[g];
  }
  if (w.outliers) add_outliers(w, job.work, m, 16 * t, rows, sums);
  put(job.work, m * w.rows + 16 * t, 16 * t, sums, rows);
}

// One or TILES tiles, from t on, by the tokens of an expert. `room` has sums, then scales, then shifts.
void some_tiles(const Run& run, int64_t expert, int64_t t, int tiles, F* room, float* scale) {
  const Job& job = run.job;
  const Weight& w = job.weight;
  const Work& work = job.work;
  const int64_t from = work.offsets ? work.offsets[expert] : 0, until = work.offsets ? work.offsets[expert + 1] : work.tokens;
  if (from == until) return;
  const int64_t at = expert * job.tiles + t, grid = 16 * w.groups;
  float* shift = scale + TILES * grid;
  const float divisor = divisor_of(w, expert);
  for (int i = 0; i < tiles; i++) {
    scales_of(w, at + i, run.divided ? divisor : 1, scale + i * grid);
    if (job.totals) shifts_of(w, at + i, scale + i * grid, shift + i * grid);
  }
  const uint16_t* codes = w.tiles + at * job.words;
  const int64_t size = work.dtype == F32 ? 4 : 2;
  for (int64_t first = from; first < until;) {
    const int64_t most = run.few ? FEW : MOST;
    const int count = (int)(until - first < most ? until - first : most);
    if (run.few) {
      memset((void*)room, 0, sizeof(F) * 16 * count);
      run.rows(job, codes, scale, first, count, room);
      for (int m = 0; m < count; m++) {
        alignas(64) float out[16];
        sums(room + m * 16, out);
        finish(job, run.divided ? 1 : divisor, shift, t, first + m, out);
      }
    } else {
      memset((void*)room, 0, sizeof(F) * NV * count);
      run.panels(job, codes, tiles, scale, grid, first, count, room);
      for (int m = 0; m < count; m++) {
        __builtin_prefetch((char*)work.out + ((first + m + 8) * w.rows + 16 * t) * size, 1);
        for (int i = 0; i < tiles; i++) finish(job, run.divided ? 1 : divisor, shift + i * grid, t + i, first + m, (float*)room + (m * TILES + i) * 16);
      }
    }
    first += count;
  }
}

void worker(void* given) {
  Run& run = *(Run*)given;
  const int64_t each = run.few ? 1 : TILES, of = (run.job.tiles + each - 1) / each;
  const int64_t sums = W * (run.few ? 16 * FEW : NV * MOST);
  float* room = (float*)aligned_alloc(64, 4 * (sums + 2 * TILES * 16 * run.job.weight.groups));
  if (!room) {
    __atomic_store_n(&run.failed, 1, __ATOMIC_RELAXED);
    return;
  }
  in_turns(run.next, of * run.job.work.experts, run.job.work.threads, [&](int64_t from, int64_t until) {
    for (int64_t i = from; i < until; i++) {
      const int64_t t = i % of * each, left = run.job.tiles - t;
      some_tiles(run, i / of, t, (int)(left < each ? left : each), (F*)room, room + sums);
    }
  });
  free(room);
}

// Parts of the tokens, each by one thread.
struct Parts {
  const Weight& weight;
  const Work& work;
  int64_t count, next;
  int failed;
};

}  // namespace

EXPORT int NAME(product, ISA)(const Weight* weight, const Work* work);

namespace {

int multiply_part(const Parts& parts, int64_t i, bool alone) {
  const Work& work = parts.work;
  const int64_t from = work.tokens * i / parts.count, until = work.tokens * (i + 1) / parts.count, size = work.dtype == F32 ? 4 : 2;
  Work some = work;
  some.x = (const char*)work.x + from * work.stride * size;
  some.out = (char*)work.out + from * parts.weight.rows * size;
  some.tokens = until - from;
  if (alone) some.parallel = nullptr, some.threads = 1;
  return NAME(product, ISA)(&parts.weight, &some);
}

void take_parts(void* given) {
  Parts& parts = *(Parts*)given;
  for (int64_t i; (i = __atomic_fetch_add(&parts.next, 1, __ATOMIC_RELAXED)) < parts.count;)
    if (multiply_part(parts, i, true)) __atomic_store_n(&parts.failed, 1, __ATOMIC_RELAXED);
}

}  // namespace

// Multiplies. Returns 0, or 1 if there is no memory for activations or sums.
EXPORT int NAME(product, ISA)(const Weight* weight, const Work* work) {
  const Weight& w = *weight;
  // Every tile goes through all activations, which a cache must hold.
  const int64_t fit = CACHED / ((work->dtype == F32 ? 4 : 2) * w.columns), most = fit < LEAST ? LEAST : fit < MOST ? fit : MOST;
  const int64_t threads = work->parallel ? work->threads : 1, each_thread = work->tokens / threads;
  if (!work->offsets && threads > 1 && each_thread >= ALONE) {
    Parts parts{w, *work, threads * ((each_thread + most - 1) / most), 0, 0};
    work->parallel(take_parts, &parts, work->threads, 0);
    return parts.failed;
  }
  if (!work->offsets && work->tokens > most) {
    Parts parts{w, *work, (work->tokens + most - 1) / most, 0, 0};
    for (; parts.next < parts.count && !parts.failed; parts.next++) parts.failed = multiply_part(parts, parts.next, false);
    return parts.failed;
  }
  const int64_t each = work->tokens / (work->offsets ? work->experts : 1);
  const bool few = each <= (work->rounded && !w.exact ? FEWER : FEW), totals = w.zero || w.minimum;
#if defined(__AVX512BF16__)
  // With scales of few bits values are bfloat16 numbers, too. Others may have to be rounded, which is faster where groups are small.
  const bool product = w.exact && (w.scales == BYTE_E8M0 || (w.scales == BYTE_E4M3 && w.grid == TABLE));
  const bool scaled = work->dtype == BF16 && !few && !totals && (product || (work->rounded && (!w.exact || w.shift < 8)));
  const bool pairs = scaled || (work->dtype == BF16 && w.exact);
#else
  const bool scaled = false, pairs = false;
#endif
  const auto [chunk, words] = by_codes(w, [](auto codes) { return Chunk{decltype(codes)::COLUMNS, decltype(codes)::WORDS}; });
  const int columns = few ? chunk : SPAN;
  const int64_t parts = (w.chunks * chunk + columns - 1) / columns;
  const int64_t bytes = (work->tokens * parts * columns * (pairs ? 2 : 4) + 63) / 64 * 64;
  char* room = (char*)aligned_alloc(64, bytes + (totals ? (work->tokens * w.groups * 4 + 63) / 64 * 64 : 0));
  if (!room) return 1;
  float* sums = totals ? (float*)(room + bytes) : nullptr;
  Run run{{w, *work, room, sums, (w.rows + 15) / 16, w.chunks * 16 * words}, columns, parts, few, pairs,
          totals || (scaled && !w.exact), rows_for(w, pairs, each), panels_for(w, scaled ? SCALED : pairs ? PAIRED : SINGLE), 0, 0};
  if (few)
    arranger(&run);
  else
    by_threads(*work, arranger, &run);
  run.next = 0;
  by_threads(*work, worker, &run);
  free(room);
  return run.failed;
}

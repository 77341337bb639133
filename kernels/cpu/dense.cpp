// Dense: a few tokens by a matrix of plain numbers, such as a head that is not quantized; it is read once.
//
// Sums are in fp32. Threads take 16 rows in turn; every sum is made by one of them, in one order.
#include "dense.h"

#include "dots.h"
#include "turns.h"

namespace {

constexpr int TOGETHER = 16;      // tokens for which rows stay in a cache
constexpr int LATER = 16 << 10;  // bytes beyond the next rows that the second cache is asked for
constexpr int STREAMS = 4;       // places from which a token's rows are read at once

struct Run {
  const Dense& job;
  int64_t next;
};

void put_sums(const Dense& job, int64_t m, int64_t row, int rows, const F* found) {
  alignas(64) float out[16];
  sums(found, out);
  put(job.work, m * job.rows + row, row, out, rows);
}

// Sums of ROWS rows, `apart` bytes from each other, by TOKENS tokens, each a vector to be summed; a token's are 16 from the next
// one's. Rows may be NEIGHBOURS: then caches are asked for what lies `ahead` of them, and for what comes LATER.
template <class S, int ROWS, int TOKENS, bool NEIGHBOURS = true>
void add(const char* rows, int64_t apart, int64_t ahead, const char* x, int64_t stride, int64_t columns, F* out) {
  F sums[ROWS][TOKENS] = {};
  for (int64_t k = 0; k < columns; k += S::COUNT) {
    typename S::V w[ROWS];
    for (int r = 0; r < ROWS; r++) {
      w[r] = S::read(rows + r * apart, k);
      const char* next = rows + ahead + (ROWS * k / S::COUNT + r) * S::BYTES;
      if constexpr (NEIGHBOURS) __builtin_prefetch(next), __builtin_prefetch(next + LATER, 0, 2);
    }
    for (int m = 0; m < TOKENS; m++) {
      const auto v = S::read(x + m * stride, k);
      for (int r = 0; r < ROWS; r++) sums[r][m] = S::more(w[r], v, sums[r][m]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int m = 0; m < TOKENS; m++) out[m * 16 + r] = sums[r][m];
}

template <class S, int ROWS>
void by_tokens(const char* rows, int64_t bytes, const char* x, int64_t stride, int64_t columns, int tokens, F* out) {
  int64_t ahead = ROWS * bytes;
  for (; tokens >= 4; tokens -= 4, x += 4 * stride, out += 4 * 16, ahead = 0)
    add<S, ROWS, 4>(rows, bytes, ahead, x, stride, columns, out);
  if (tokens == 3) add<S, ROWS, 3>(rows, bytes, ahead, x, stride, columns, out);
  if (tokens == 2) add<S, ROWS, 2>(rows, bytes, ahead, x, stride, columns, out);
  if (tokens == 1) add<S, ROWS, 1>(rows, bytes, ahead, x, stride, columns, out);
}

// Up to 16 rows by all tokens.
template <class S>
void tile(const Dense& job, int64_t first, int rows) {
  const Work& work = job.work;
  const int64_t bytes = job.columns * S::BYTES / S::COUNT, stride = work.stride * S::BYTES / S::COUNT;
  const char* from = (const char*)job.weight + first * bytes;
  for (int64_t m = 0; m < work.tokens; m += TOGETHER) {
    const int count = work.tokens - m < TOGETHER ? (int)(work.tokens - m) : TOGETHER;
    const char* x = (const char*)work.x + m * stride;
    F found[TOGETHER * 16] = {};
    int r = 0;
    for (; r + 4 <= rows; r += 4) by_tokens<S, 4>(from + r * bytes, bytes, x, stride, job.columns, count, found + r);
    for (; r < rows; r++) by_tokens<S, 1>(from + r * bytes, bytes, x, stride, job.columns, count, found + r);
    for (int i = 0; i < count; i++) put_sums(job, m + i, first, rows, found + 16 * i);
  }
}

// STREAMS times 16 rows, `apart` rows from each other, by a token. So a core reads 33 GB/s where it reads 24 from one place.
template <class S>
void streams(const Dense& job, int64_t first, int64_t apart) {
  const int64_t bytes = job.columns * S::BYTES / S::COUNT;
  const char* from = (const char*)job.weight + first * bytes;
  F found[STREAMS][16], some[STREAMS];
  for (int r = 0; r < 16; r++) {
    add<S, STREAMS, 1, false>(from + r * bytes, apart * bytes, 0, (const char*)job.work.x, 0, job.columns, some);
    for (int n = 0; n < STREAMS; n++) found[n][r] = some[n];
  }
  for (int n = 0; n < STREAMS; n++) put_sums(job, 0, first + n * apart, 16, found[n]);
}

template <class S>
void some_tiles(const Dense& job, int64_t from, int64_t until) {
  const int64_t whole = job.rows / 16 < until ? job.rows / 16 : until;
  const int64_t each = job.work.tokens == 1 ? (whole - from) / STREAMS : 0;
  for (int64_t t = from; t < from + each; t++) streams<S>(job, 16 * t, 16 * each);
  for (int64_t t = from + STREAMS * each; t < until; t++) tile<S>(job, 16 * t, t < whole ? 16 : (int)(job.rows % 16));
}

void worker(void* given) {
  Run& run = *(Run*)given;
  const Dense& job = run.job;
  const int32_t dtype = job.work.dtype;
  const auto some = dtype == F32 ? some_tiles<Dots<F32>> : dtype == BF16 ? some_tiles<Dots<BF16>> : some_tiles<Dots<F16>>;
  in_turns(run.next, (job.rows + 15) / 16, job.work.threads, [&](int64_t from, int64_t until) { some(job, from, until); });
}

}  // namespace

EXPORT void NAME(dense, ISA)(const Dense* job) {
  Run run{*job, 0};
  by_threads(job->work, worker, &run);
}

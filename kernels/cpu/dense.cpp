// Dense: a few tokens by a matrix of plain numbers, such as a head that is not quantized; it is read once, in the order of memory.
//
// Sums are in fp32. Threads take 16 rows in turn; every sum is made by one of them, in one order.
#include "dense.h"

#include "dots.h"

namespace {

constexpr int TOGETHER = 16;      // tokens for which rows stay in a cache
constexpr int LATER = 16 << 10;  // bytes beyond the next rows that the second cache is asked for

struct Run {
  const Dense& job;
  int64_t next;
};

// Sums of ROWS rows by TOKENS tokens, each a vector to be summed; a token's are 16 from the next one's. Memory is asked for what
// lies `ahead` of the rows, in its own order.
template <class S, int ROWS, int TOKENS>
void add(const char* rows, int64_t bytes, int64_t ahead, const char* x, int64_t stride, int64_t columns, F* out) {
  F sums[ROWS][TOKENS] = {};
  for (int64_t k = 0; k < columns; k += S::COUNT) {
    typename S::V w[ROWS];
    for (int r = 0; r < ROWS; r++) {
      w[r] = S::read(rows + r * bytes, k);
      const char* next = rows + ahead + (ROWS * k / S::COUNT + r) * S::BYTES;
      __builtin_prefetch(next);
      __builtin_prefetch(next + LATER, 0, 2);
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
  const int64_t size = work.dtype == F32 ? 4 : 2, bytes = job.columns * size, stride = work.stride * size;
  const char* from = (const char*)job.weight + first * bytes;
  for (int64_t m = 0; m < work.tokens; m += TOGETHER) {
    const int count = work.tokens - m < TOGETHER ? (int)(work.tokens - m) : TOGETHER;
    const char* x = (const char*)work.x + m * stride;
    F found[TOGETHER * 16] = {};
    int r = 0;
    for (; r + 4 <= rows; r += 4) by_tokens<S, 4>(from + r * bytes, bytes, x, stride, job.columns, count, found + r);
    for (; r < rows; r++) by_tokens<S, 1>(from + r * bytes, bytes, x, stride, job.columns, count, found + r);
    for (int i = 0; i < count; i++) {
      alignas(64) float out[16];
      sums(found + 16 * i, out);
      put(work, (m + i) * job.rows + first, first, out, rows);
    }
  }
}

void worker(void* given) {
  Run& run = *(Run*)given;
  const Dense& job = run.job;
  const int64_t all = (job.rows + 15) / 16, step = 1 + all / (8 * job.work.threads);
  for (;;) {
    const int64_t from = __atomic_fetch_add(&run.next, step, __ATOMIC_RELAXED);
    if (from >= all) break;
    for (int64_t t = from; t < from + step && t < all; t++) {
      const int rows = job.rows - 16 * t < 16 ? (int)(job.rows - 16 * t) : 16;
      if (job.work.dtype == F32)
        tile<Dots<F32>>(job, 16 * t, rows);
      else if (job.work.dtype == BF16)
        tile<Dots<BF16>>(job, 16 * t, rows);
      else
        tile<Dots<F16>>(job, 16 * t, rows);
    }
  }
}

}  // namespace

EXPORT void NAME(dense, ISA)(const Dense* job) {
  Run run{*job, 0};
  if (job->work.parallel && job->work.threads > 1)
    job->work.parallel(worker, &run, job->work.threads, 0);
  else
    worker(&run);
}

// Turns: what threads take of the tiles that are left, many at first and one by one in the end, so that all are done together.
#pragma once

#include "weight.h"

namespace {  // each instruction set has its own

// Calls `does` with the first tile of each turn that this thread gets and the one behind its last; `next` is what all threads
// share, from 0 on.
template <class Does>
void in_turns(int64_t& next, int64_t all, int32_t threads, Does does) {
  for (int64_t from = __atomic_load_n(&next, __ATOMIC_RELAXED);;) {
    if (from >= all) return;
    const int64_t until = from + 1 + (all - from) / (8 * threads);
    // Who was faster has left a new `from`.
    if (!__atomic_compare_exchange_n(&next, &from, until, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
    does(from, until);
    from = __atomic_load_n(&next, __ATOMIC_RELAXED);
  }
}

// Does it by as many threads as a job has.
template <class Job>
void by_threads(const Job& job, void (*does)(void*), void* given) {
  if (job.parallel && job.threads > 1)
    job.parallel(does, given, job.threads, 0);
  else
    does(given);
}

}  // namespace

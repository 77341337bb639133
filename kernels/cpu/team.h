// Team: threads that spin between two products, while one thread goes through blocks and gives out tasks. To open a parallel region
// for each takes as long as a small product.
#pragma once

#include <sched.h>

#include "weight.h"

namespace {  // each instruction set has its own

constexpr uint64_t OPEN = 1 << 16, TASK = 1 << 17;  // below OPEN: how many others are at the task; from TASK on: its number
constexpr int SPINS = 4096;                         // before a thread lets others run, about 50 us

struct Team {
  void (*body)(void*);  // what the first thread does, and of what
  void* job;
  void (*task)(void*);
  void* given;
  uint64_t others;  // that may join in
  uint64_t state;
  int32_t arrived, over;
};

thread_local Team* current;  // whose tasks a thread gives out

inline void rest(int& spins) {
  if (spins++ >= SPINS)
    sched_yield();
  else
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#else
    {}
#endif
}

// A `Parallel` of the current team. Who comes too late is not waited for.
void together(void (*task)(void*), void* given, unsigned threads, unsigned) {
  Team& team = *current;
  team.task = task, team.given = given, team.others = threads - 1;
  const uint64_t last = __atomic_load_n(&team.state, __ATOMIC_RELAXED) / TASK;
  __atomic_store_n(&team.state, (last + 1) * TASK | OPEN, __ATOMIC_RELEASE);
  task(given);
  __atomic_fetch_and(&team.state, ~OPEN, __ATOMIC_ACQ_REL);
  for (int spins = 0; __atomic_load_n(&team.state, __ATOMIC_ACQUIRE) % OPEN;) rest(spins);
}

void member(void* given) {
  Team& team = *(Team*)given;
  if (!__atomic_fetch_add(&team.arrived, 1, __ATOMIC_RELAXED)) {
    current = &team;
    team.body(team.job);
    current = nullptr;
    __atomic_store_n(&team.over, 1, __ATOMIC_RELEASE);
    return;
  }
  uint64_t done = 0;
  for (int spins = 0; !__atomic_load_n(&team.over, __ATOMIC_ACQUIRE); rest(spins)) {
    uint64_t state = __atomic_load_n(&team.state, __ATOMIC_ACQUIRE);
    if (!(state & OPEN) || state / TASK == done || state % OPEN >= __atomic_load_n(&team.others, __ATOMIC_RELAXED)) continue;
    // Nobody else writes task and given before this thread is off again.
    if (!__atomic_compare_exchange_n(&team.state, &state, state + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) continue;
    done = state / TASK;
    team.task(team.given);
    __atomic_fetch_sub(&team.state, 1, __ATOMIC_RELEASE);
    spins = 0;
  }
}

// Does the body, which may use `together`.
void as_team(Parallel parallel, int32_t threads, void (*body)(void*), void* job) {
  Team team{body, job, nullptr, nullptr, 0, 0, 0, 0};
  parallel(member, &team, threads, 0);
}

}  // namespace

// Attention: one query of each head, over the keys and values of a cache; softmax(scale * q k) v, with sums in fp32.
//
// Heads that share keys are computed together, a SPLIT of the keys at a time, each by one thread; then the parts of a head are
// added up in their order. So any number of threads gives the same bits.
#include <stdlib.h>

#include "attention.h"
#include "dots.h"
#include "turns.h"

namespace {

constexpr int64_t SPLIT = 256;  // keys at a time
constexpr int LANES = 16;       // what head sizes must divide by
constexpr int MOST = 1024;      // numbers of a key at most

struct Run {
  const Attention& job;
  int64_t splits, stride;  // of a head; floats of a part: values, the largest score, the sum of weights
  float* parts;            // [B, H, splits, stride]
  int64_t next;
};

// Adds weights [count, QUERIES] by values [count, VECTORS * W] to out [QUERIES, stride].
template <int32_t DTYPE, int QUERIES, int VECTORS>
void add_values(const void* value, int64_t at, int64_t row, const float* weights, int64_t count, float* out, int64_t stride) {
  F total[QUERIES][VECTORS] = {};
  for (int64_t k = 0; k < count; k++, at += row) {
    F v[VECTORS];
    for (int i = 0; i < VECTORS; i++) v[i] = numbers<DTYPE>(value, at + i * W);
    for (int q = 0; q < QUERIES; q++) {
      const F weight = splat(weights[q * SPLIT + k]);
      for (int i = 0; i < VECTORS; i++) total[q][i] = fma(weight, v[i], total[q][i]);
    }
  }
  for (int q = 0; q < QUERIES; q++)
    for (int i = 0; i < VECTORS; i++) store(out + q * stride + i * W, total[q][i]);
}

// Scores of keys, each a product with a query: QUERIES by [count] of SPLIT. D reads the keys' numbers, and Q those of the queries,
// which are kept MOST apart.
template <class Q, class D, int QUERIES>
void score(const Attention& job, const float* queries, int64_t at, int64_t count, float* scores) {
  F total[QUERIES][16] = {};
  for (int64_t k = 0; k < count; k += 16) {
    for (int i = 0; i < 16 && k + i < count; i++) {
      F sum[QUERIES] = {};
      for (int64_t d = 0; d < job.size; d += D::COUNT) {
        const auto key = D::read(job.key, at + (k + i) * job.key_row + d);
        for (int q = 0; q < QUERIES; q++) sum[q] = D::more(key, Q::read(queries + q * MOST, d), sum[q]);
      }
      for (int q = 0; q < QUERIES; q++) total[q][i] = sum[q];
    }
    for (int q = 0; q < QUERIES; q++) sums(total[q], scores + q * SPLIT + k);
  }
}

// Scores [count] become weights; the largest and the sum of weights go behind a part's values.
void weigh(const Attention& job, const uint8_t* mask, int64_t count, float* weights, float* part) {
  const int64_t padded = (count + W - 1) / W * W;
  for (int64_t k = 0; k < padded; k += W) store(weights + k, load(weights + k) * splat(job.scale));
  for (int64_t k = 0; k < padded; k++)
    if (k >= count || (mask && !mask[k])) weights[k] = -__builtin_inff();
  F largest = splat(-__builtin_inff());
  for (int64_t k = 0; k < padded; k += W) largest = chosen(load(weights + k) > largest, load(weights + k), largest);
  float most = -__builtin_inff(), sum = 0;
  for (int i = 0; i < W; i++) most = largest[i] > most ? largest[i] : most;
  F total{};
  for (int64_t k = 0; k < padded; k += W) {
    // Where no key counts none has a weight.
    const F found = most == -__builtin_inff() ? F{} : exponential(load(weights + k) - splat(most));
    store(weights + k, found), total += found;
  }
  for (int i = 0; i < W; i++) sum += total[i];
  part[job.values] = most, part[job.values + 1] = sum;
}

template <int32_t DTYPE, int QUERIES>
void some_queries(const Run& run, int64_t b, int64_t group, int64_t head, int64_t split) {
  const Attention& job = run.job;
  const int64_t from = split * SPLIT, count = job.keys - from < SPLIT ? job.keys - from : SPLIT;
  const int64_t key = b * job.key_batch + group * job.key_group + from * job.key_row;
  const int64_t value = b * job.value_batch + group * job.value_group + from * job.value_row;
  float* part = run.parts + ((b * job.heads + head) * run.splits + split) * run.stride;
  const int64_t stride = run.splits * run.stride;
  const bool together = Dots<DTYPE>::COUNT > W && job.size % Dots<DTYPE>::COUNT == 0;
  alignas(64) float weights[QUERIES * SPLIT], queries[QUERIES * MOST];
  for (int q = 0; q < QUERIES; q++) {
    const int64_t at = b * job.query_batch + (head + q) * job.query_head;
    if (together)
      memcpy(queries + q * MOST, (const uint16_t*)job.query + at, 2 * job.size);
    else
      for (int64_t d = 0; d < job.size; d += W) store(queries + q * MOST + d, numbers<DTYPE>(job.query, at + d));
  }
  if (together)
    score<Dots<DTYPE>, Dots<DTYPE>, QUERIES>(job, queries, key, count, weights);
  else
    score<Each<F32>, Each<DTYPE>, QUERIES>(job, queries, key, count, weights);
  for (int q = 0; q < QUERIES; q++)
    weigh(job, job.mask ? job.mask + b * job.mask_batch + from : nullptr, count, weights + q * SPLIT, part + q * stride);
  int64_t e = 0;
  for (; e + 4 * W <= job.values; e += 4 * W)
    add_values<DTYPE, QUERIES, 4>(job.value, value + e, job.value_row, weights, count, part + e, stride);
  for (; e < job.values; e += LANES)
    add_values<DTYPE, QUERIES, LANES / W>(job.value, value + e, job.value_row, weights, count, part + e, stride);
}

template <int32_t DTYPE>
void some_keys(const Run& run, int64_t b, int64_t group, int64_t split) {
  const int64_t each = run.job.heads / run.job.groups;
  for (int64_t head = group * each, left = each; left > 0;) {
    const int64_t now = left < 4 ? left : 4;
    const auto add = now == 4 ? some_queries<DTYPE, 4> : now == 3 ? some_queries<DTYPE, 3> : now == 2 ? some_queries<DTYPE, 2> : some_queries<DTYPE, 1>;
    add(run, b, group, head, split);
    head += now, left -= now;
  }
}

void worker(void* given) {
  Run& run = *(Run*)given;
  const Attention& job = run.job;
  const int64_t all = job.batch * job.groups * run.splits;
  const auto add = job.dtype == F32 ? some_keys<F32> : job.dtype == BF16 ? some_keys<BF16> : some_keys<F16>;
  for (;;) {
    const int64_t i = __atomic_fetch_add(&run.next, 1, __ATOMIC_RELAXED);
    if (i >= all) break;
    add(run, i / run.splits / job.groups, i / run.splits % job.groups, i % run.splits);
  }
}

// The parts of a head become its output.
void join(const Run& run, int64_t number) {
  const Attention& job = run.job;
  float* part = run.parts + number * run.splits * run.stride;
  float most = -__builtin_inff(), sum = 0;
  for (int64_t s = 0; s < run.splits; s++) most = part[s * run.stride + job.values] > most ? part[s * run.stride + job.values] : most;
  for (int64_t s = 0; s < run.splits; s++) {
    float* own = part + s * run.stride;
    const float weight = own[job.values] == -__builtin_inff() ? 0 : exponential(splat(own[job.values] - most))[0];
    sum += own[job.values + 1] * weight;
    for (int64_t e = 0; e < job.values; e++) part[e] = s ? part[e] + own[e] * weight : own[e] * weight;
  }
  const float whole = sum == 0 ? 0 : 1 / sum;
  for (int64_t e = 0; e < job.values; e++) {
    const float v = part[e] * whole;
    const int64_t at = number * job.values + e;
    if (job.dtype == F32)
      ((float*)job.out)[at] = v;
    else
      ((uint16_t*)job.out)[at] = job.dtype == BF16 ? bf16_of(v) : half_of(v);
  }
}

}  // namespace

// Computes. Returns 0, or 1 if there is no memory for the parts.
EXPORT int NAME(attend, ISA)(const Attention* job) {
  const int64_t splits = (job->keys + SPLIT - 1) / SPLIT, stride = job->values + LANES;
  float* parts = (float*)aligned_alloc(64, 4 * job->batch * job->heads * splits * stride);
  if (!parts) return 1;
  Run run{*job, splits, stride, parts, 0};
  by_threads(*job, worker, &run);
  for (int64_t number = 0; number < job->batch * job->heads; number++) join(run, number);
  free(parts);
  return 0;
}

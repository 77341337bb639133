// Block: norms, products, rotation, cache, attention and gated products of decoder blocks that follow each other, in one call.
//
// Every part is the kernel that a module would call, and is rounded as there, so that a block has the same bits.
#include <stdlib.h>

#include "block.h"

#include "arrange.h"
#include "attention.h"
#include "steps.h"
#include "team.h"

EXPORT int NAME(product, ISA)(const Weight*, const Work*);
EXPORT int NAME(integers, ISA)(const Weight*, const Work*, const Rounding*);
EXPORT int NAME(attend, ISA)(const Attention*);
EXPORT void NAME(norm, ISA)(const Norm*);
EXPORT void NAME(rotary, ISA)(const Rotary*);
EXPORT void NAME(gate, ISA)(const Gate*);

namespace {

int32_t threads_for(const Block& job, int64_t products) {
  const int64_t most = 1 + products / job.alone;
  return most < job.threads ? (int32_t)most : job.threads;
}

int multiplied(const Block& job, const Linear& linear, const void* x, void* out) {
  const Weight& w = *linear.weight;
  const int32_t threads = threads_for(job, w.rows * w.columns * job.batch);
  const Work work{x, linear.bias, out, nullptr, job.batch, w.columns, 1, job.dtype, threads, job.parallel, job.batch > linear.exact};
  return linear.how ? NAME(integers, ISA)(&w, &work, linear.how) : NAME(product, ISA)(&w, &work);
}

void normed(const Block& job, const Scaled& by, const void* x, int64_t rows, int64_t width, void* out) {
  const Norm norm{x, by.weight, out, rows, width, by.epsilon, by.plus_one, job.dtype};
  NAME(norm, ISA)(&norm);
}

// out = x + more, rounded.
template <int32_t DTYPE>
void added(const void* x, const void* more, int64_t count, void* out) {
  int64_t i = 0;
  for (; DTYPE != F16 && i + W <= count; i += W) put_numbers<DTYPE>(out, i, numbers<DTYPE>(x, i) + numbers<DTYPE>(more, i));
  for (; i < count; i++) write(out, i, read(x, i, DTYPE) + read(more, i, DTYPE), DTYPE);
}

void added(const Block& job, const void* x, const void* more, void* out) {
  const int64_t count = job.batch * job.query.weight->columns;
  if (job.dtype == F32) return added<F32>(x, more, count, out);
  if (job.dtype == BF16) return added<BF16>(x, more, count, out);
  added<F16>(x, more, count, out);
}

// Puts keys and values into the last place of the cache. Returns 0, or 1 if there is no memory.
int computed(const Block& job) {
  const int64_t bytes = job.dtype == F32 ? 4 : 2, width = job.query.weight->columns, inner = job.gate.weight->rows;
  const int64_t queries = job.heads * job.size, keys = job.groups * job.size, row = job.size * bytes;
  const int64_t sizes[] = {width, queries, keys, keys, queries, width, inner, inner, inner};
  int64_t all = 0, from[9];
  for (int i = 0; i < 9; i++) from[i] = all, all += (job.batch * sizes[i] * bytes + 63) / 64 * 64;
  char* room = (char*)aligned_alloc(64, all);
  if (!room) return 1;
  char *input = room + from[0], *query = room + from[1], *key = room + from[2], *value = room + from[3], *attended = room + from[4];
  char *result = room + from[5], *gate = room + from[6], *up = room + from[7], *gated = room + from[8];

  normed(job, job.first_norm, job.x, job.batch, width, input);
  int failed = multiplied(job, job.query, input, query) | multiplied(job, job.key, input, key) | multiplied(job, job.value, input, value);
  if (job.query_norm.weight) {
    normed(job, job.query_norm, query, job.batch * job.heads, job.size, query);
    normed(job, job.key_norm, key, job.batch * job.groups, job.size, key);
  }
  const Rotary rotary{query, key, job.cos, job.sin, job.batch, job.heads, job.groups, job.size, job.angles, job.dtype};
  NAME(rotary, ISA)(&rotary);
  const int64_t group = job.room * job.size, text = job.groups * group, last = (job.count - 1) * job.size;
  for (int64_t i = 0; i < job.batch * job.groups; i++) {
    memcpy((char*)job.keys + (i * group + last) * bytes, key + i * row, row);
    memcpy((char*)job.values + (i * group + last) * bytes, value + i * row, row);
  }
  const Attention attention{
      query, job.keys, job.values, attended, job.mask, job.batch, job.heads, job.groups, job.count, job.size, job.size,
      queries, job.size, text, group, job.size, text, group, job.size, job.mask_batch, job.scale, job.dtype,
      threads_for(job, job.batch * job.heads * job.count * 2 * job.size), job.parallel};
  failed |= NAME(attend, ISA)(&attention);
  failed |= multiplied(job, job.output, attended, result);
  added(job, job.x, result, job.out);

  normed(job, job.second_norm, job.out, job.batch, width, input);
  failed |= multiplied(job, job.gate, input, gate) | multiplied(job, job.up, input, up);
  const Gate gates{gate, up, gated, job.batch * inner, job.dtype};
  NAME(gate, ISA)(&gates);
  failed |= multiplied(job, job.down, gated, result);
  added(job, job.out, result, job.out);
  free(room);
  return failed;
}

struct Walk {
  Block* blocks;
  int64_t count;
  int failed;
};

void walk(void* given) {
  Walk& all = *(Walk*)given;
  for (int64_t i = 0; i < all.count && !all.failed; i++) all.failed = computed(all.blocks[i]);
}

}  // namespace

// Computes one after another, by as many threads as the first has. Returns 0, or 1 if there is no memory.
EXPORT int NAME(blocks, ISA)(Block* blocks, int64_t count) {
  Walk all{blocks, count, 0};
  const Parallel parallel = blocks->parallel;
  if (!parallel || blocks->threads < 2) {
    walk(&all);
    return all.failed;
  }
  for (int64_t i = 0; i < count; i++) blocks[i].parallel = together;
  as_team(parallel, blocks->threads, walk, &all);
  return all.failed;
}

// Steps: what lies between the products of a few tokens: norms, rotations of queries and keys, mixed inputs, and gated products.
//
// Each is rounded where transformers' code rounds: after every operation, in the dtype of activations, but for what that computes in
// fp32. One thread does it: a call costs more than the numbers of a token.
#include "steps.h"

#include "arrange.h"

namespace {

template <int32_t DTYPE>
void norm(const Norm& job) {
  for (int64_t m = 0; m < job.rows; m++) {
    const int64_t at = m * job.width;
    F many{};
    int64_t i = 0;
    for (; i + W <= job.width; i += W) {
      const F x = numbers<DTYPE>(job.x, at + i);
      many = fma(x, x, many);
    }
    float sum = 0;
    for (int l = 0; l < W; l++) sum += many[l];
    for (; i < job.width; i++) sum += read(job.x, at + i, DTYPE) * read(job.x, at + i, DTYPE);
    const float by = 1 / __builtin_sqrtf(sum / job.width + job.epsilon);
    for (i = 0; i < job.width; i++) {
      const float x = read(job.x, at + i, DTYPE) * by, w = read(job.weight, i, DTYPE);
      write(job.out, at + i, job.plus_one ? x * (1 + w) : as(x, DTYPE) * w, DTYPE);
    }
  }
}

// Each of a text's heads becomes x cos + (its halves swapped, the first one negated) sin.
template <int32_t DTYPE>
void rotate(void* x, int64_t heads, const Rotary& job) {
  const int64_t half = job.size / 2;
  for (int64_t b = 0; b < job.batch; b++)
    for (int64_t h = 0; h < heads; h++) {
      const int64_t at = (b * heads + h) * job.size, angle = b * job.angles;
      for (int64_t i = 0; i < half; i++) {
        const float first = read(x, at + i, DTYPE), second = read(x, at + half + i, DTYPE);
        const auto turned = [&](int64_t k, float own, float other) {
          return as(own * read(job.cos, angle + k, DTYPE), DTYPE) + as(other * read(job.sin, angle + k, DTYPE), DTYPE);
        };
        write(x, at + i, turned(i, first, -second), DTYPE), write(x, at + half + i, turned(half + i, second, first), DTYPE);
      }
    }
}

template <int32_t DTYPE>
void rotary(const Rotary& job) {
  rotate<DTYPE>(job.query, job.heads, job);
  rotate<DTYPE>(job.key, job.groups, job);
}

template <int32_t DTYPE>
void mix(const Mix& job) {
  const float by = 1 / __builtin_sqrtf((float)job.block);
  alignas(64) float v[128];
  for (int64_t at = 0; at < job.count; at += job.block) {
    for (int64_t i = 0; i < job.block; i += W) store(v + i, numbers<DTYPE>(job.x, at + i));
    for (int64_t half = 1; half < job.block; half *= 2)
      for (int64_t start = 0; start < job.block; start += 2 * half)
        for (int64_t i = start; i < start + half; i++) {
          const float first = v[i], second = v[i + half];
          v[i] = first + second, v[i + half] = first - second;
        }
    for (int64_t i = 0; i < job.block; i++) write(job.out, at + i, v[i] * by, DTYPE);
  }
}

template <int32_t DTYPE>
void gate(const Gate& job) {
  for (int64_t i = 0; i < job.count; i += W) {
    alignas(64) float x[W] = {}, found[W];
    const int64_t left = job.count - i < W ? job.count - i : W;
    for (int64_t l = 0; l < left; l++) x[l] = read(job.gate, i + l, DTYPE);
    const F v = load(x), e = exponential(chosen(v < F{}, v, F{} - v));
    store(found, chosen(v < F{}, e, splat(1)) / (splat(1) + e));
    for (int64_t l = 0; l < left; l++) write(job.out, i + l, as(x[l] * found[l], DTYPE) * read(job.up, i + l, DTYPE), DTYPE);
  }
}

}  // namespace

#define STEP(name, Kind)                         \
  EXPORT void NAME(name, ISA)(const Kind* job) { \
    if (job->dtype == F32) return name<F32>(*job);   \
    if (job->dtype == BF16) return name<BF16>(*job); \
    name<F16>(*job);                             \
  }

STEP(norm, Norm)
STEP(rotary, Rotary)
STEP(mix, Mix)
STEP(gate, Gate)

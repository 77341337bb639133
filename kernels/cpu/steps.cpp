// Steps: what lies between the products of a few tokens: norms, rotations of queries and keys, and gated products.
//
// Each is rounded where transformers' code rounds: after every operation, in the dtype of activations, but for what that computes in
// fp32. One thread does it: a call costs more than the numbers of a token.
#include "steps.h"

#include "arrange.h"

namespace {

// Rounded to a dtype.
template <int32_t DTYPE>
float as(float v) {
  return DTYPE == F32 ? v : DTYPE == BF16 ? from_bits((uint32_t)bf16_of(v) << 16) : half_to_float(half_of(v));
}

template <int32_t DTYPE>
float get(const void* x, int64_t i) {
  return read(x, i, DTYPE);
}

template <int32_t DTYPE>
void set(void* x, int64_t i, float v) {
  if (DTYPE == F32) ((float*)x)[i] = v;
  else ((uint16_t*)x)[i] = DTYPE == BF16 ? bf16_of(v) : half_of(v);
}

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
    for (; i < job.width; i++) sum += get<DTYPE>(job.x, at + i) * get<DTYPE>(job.x, at + i);
    const float by = 1 / __builtin_sqrtf(sum / job.width + job.epsilon);
    for (i = 0; i < job.width; i++) {
      const float x = get<DTYPE>(job.x, at + i) * by, w = get<DTYPE>(job.weight, i);
      set<DTYPE>(job.out, at + i, job.plus_one ? x * (1 + w) : as<DTYPE>(x) * w);
    }
  }
}

// x cos + (its halves swapped, the first one negated) sin; `from` may be `to`.
template <int32_t DTYPE>
void rotate(const void* from, int64_t at, const void* cos, const void* sin, int64_t angle, void* to, int64_t place, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = get<DTYPE>(from, at + i), b = get<DTYPE>(from, at + half + i);
    const float first = as<DTYPE>(a * get<DTYPE>(cos, angle + i)) + as<DTYPE>(-b * get<DTYPE>(sin, angle + i));
    const float second = as<DTYPE>(b * get<DTYPE>(cos, angle + half + i)) + as<DTYPE>(a * get<DTYPE>(sin, angle + half + i));
    set<DTYPE>(to, place + i, first), set<DTYPE>(to, place + half + i, second);
  }
}

template <int32_t DTYPE>
void rotary(const Rotary& job) {
  for (int64_t b = 0; b < job.batch; b++) {
    for (int64_t h = 0; h < job.heads; h++) {
      const int64_t at = (b * job.heads + h) * job.size;
      rotate<DTYPE>(job.query, at, job.cos, job.sin, b * job.angles, job.query, at, job.size);
    }
    for (int64_t g = 0; g < job.groups; g++) {
      const int64_t at = (b * job.groups + g) * job.size;
      rotate<DTYPE>(job.key, at, job.cos, job.sin, b * job.angles, job.key, at, job.size);
    }
  }
}

template <int32_t DTYPE>
void gate(const Gate& job) {
  const auto put = [&](int64_t i, float x, float sigmoid) { set<DTYPE>(job.out, i, as<DTYPE>(x * sigmoid) * get<DTYPE>(job.up, i)); };
  for (int64_t i = 0; i < job.count; i += W) {
    alignas(64) float x[W] = {}, found[W];
    const int64_t left = job.count - i < W ? job.count - i : W;
    for (int64_t l = 0; l < left; l++) x[l] = get<DTYPE>(job.gate, i + l);
    const F v = load(x), e = exponential(chosen(v < F{}, v, F{} - v));
    store(found, chosen(v < F{}, e, splat(1)) / (splat(1) + e));
    for (int64_t l = 0; l < left; l++) put(i + l, x[l], found[l]);
  }
}

}  // namespace

#define FOR_DTYPES(name, Kind)                                    \
  EXPORT void NAME(name, ISA)(const Kind* job) {                  \
    if (job->dtype == F32) return ::name<F32>(*job);              \
    if (job->dtype == BF16) return ::name<BF16>(*job);            \
    ::name<F16>(*job);                                            \
  }
#define STEP(name, Kind) FOR_DTYPES(name, Kind)

STEP(norm, Norm)
STEP(rotary, Rotary)
STEP(gate, Gate)

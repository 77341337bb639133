// Steps as kernels get them; see steps.cpp. Numbers of a row are neighbours in memory.
#pragma once

#include "weight.h"

// x / sqrt(mean of x^2 + epsilon), times the weight, or the weight plus one.
struct Norm {
  const void *x, *weight;  // [rows, width], [width]
  void* out;
  int64_t rows, width;
  float epsilon;
  int32_t plus_one;  // then x is rounded after the product, else before it
  int32_t dtype;
};

// Queries [B, H, size] and keys [B, G, size], rotated in place by angles [B or 1, size].
struct Rotary {
  void *query, *key;
  const void *cos, *sin;
  int64_t batch, heads, groups, size, angles;  // angles: numbers from one text's to the next one's
  int32_t dtype;
};

// Each `block` numbers by the Hadamard matrix of that order over its root; `block` is a power of two from 16 to 128.
struct Mix {
  const void* x;
  void* out;
  int64_t count;
  int32_t block;
  int32_t dtype;
};

// silu(gate) up.
struct Gate {
  const void *gate, *up;
  void* out;
  int64_t count;
  int32_t dtype;
};

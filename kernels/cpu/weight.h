// Weight: a packed matrix as kernels get it, and what is asked of it.
//
// Legend: M tokens, N rows, K columns; T = ceil(N / 16) tiles of rows; KC columns of a chunk, C chunks; G groups of C KC columns.
// The bits of a tile are told in tiles.py. What lies beyond N and K is zero bits.
#pragma once

#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define NAME_(name, isa) name##_##isa
#define NAME(name, isa) NAME_(name, isa)

enum Grid : int32_t { TABLE, INTEGER, E4M3, E5M2 };
enum Dtype : int32_t { F32, F16, BF16, BYTE_E8M0, BYTE_E4M3 };

struct Weight {
  const uint16_t* tiles;  // [experts, T, C, 16, words]
  const void* scale;      // [experts, T, G, 16]
  const uint8_t* zero;    // like scale, or none
  const void* minimum;    // like scale, or none
  const float* divisor;   // [experts]: what scales are divided by, or none
  const float* table;     // [16]: values by code, for TABLE
  const float* outliers;           // what they are beyond the values of the codes in their places, by rows, or none
  const void* outlier_columns;     // uint16, or int32 if `wide`
  const int32_t* outlier_offsets;  // [N + 1]
  int64_t rows, columns, chunks, groups;
  int32_t bits, grid, scales, shift;  // shift: a column's number >> shift is its group; 31 for whole rows
  int32_t middle;         // of integers: the code that decodes to zero
  int32_t exact;          // whether every value of the table is a bfloat16 number
  int32_t wide;
};

// Opens a parallel region: GOMP_parallel of the OpenMP runtime that torch has loaded, so that there is one pool of threads.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Work {
  const void* x;           // [M, K], rows `stride` numbers apart
  const void* bias;        // [N] in x's dtype, or none
  void* out;               // [M, N] in x's dtype
  const int32_t* offsets;  // [experts + 1]: expert e has the tokens from offsets[e] up to offsets[e + 1]; none for a single matrix
  int64_t tokens, stride, experts;
  int32_t dtype, threads;
  Parallel parallel;       // none: one thread
  int32_t rounded;         // whether values may be rounded to x's dtype before they are multiplied
};

// How `integers` rounds activations.
struct Rounding {
  const float* sums;   // [experts, N]: sums of the weight's rows, for activations with zero points
  int32_t bits;        // 8 or 4
  int32_t asymmetric;  // whether a token has a zero point
  int32_t span;        // columns that share a scale, a power of two from 32 on; 0: all of a token
  int32_t wide;        // whether results are fp32, whatever activations are; then there is no bias
};

// Rows as dense numbers.
struct Rows {
  const Weight* weight;
  const int64_t* index;  // [count], or none: the rows from `first` on, which begins a tile
  int64_t first, count;
  void* out;             // [count, K]
  int32_t dtype, threads;
  Parallel parallel;
  int64_t next;
};

// Block: what a kernel gets of a whole decoder block of a Llama, for one token of each text.
//
// Legend: B texts, H heads of queries, G of keys, D numbers of each; K keys in the cache, the new one among them.
#pragma once

#include "weight.h"

// y = x w^T + bias.
struct Linear {
  const Weight* weight;
  const void* bias;    // or none
  int64_t exact;       // tokens up to which values are multiplied unrounded
  const Rounding* how; // of activations, where whole numbers are multiplied; else none
};

// A norm by the root of the mean square.
struct Scaled {
  const void* weight;
  float epsilon;
  int32_t plus_one;  // as steps.h has it
};

struct Block {
  const void* x;  // [B, width]
  void* out;      // [B, width]
  const void *cos, *sin;   // [B or 1, D]
  const uint8_t* mask;     // [B, K], or none
  void *keys, *values;     // [B, G, room, D]
  int64_t batch, count, room, mask_batch, angles;  // B, K, room; numbers from one text's to the next one's
  Linear query, key, value, output, gate, up, down;
  Scaled first_norm, second_norm;  // of the width
  Scaled query_norm, key_norm;     // of a head's numbers, or none
  int64_t heads, groups, size;  // H, G, D
  float scale;
  int64_t alone;                // products of two numbers that a further thread must have
  int32_t dtype, threads;
  Parallel parallel;
};

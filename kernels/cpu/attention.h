// Attention: what a kernel gets of a query, of cached keys and values, and of which keys count.
//
// Legend: B texts, H heads of queries, G of keys; K keys, D numbers of each, E numbers of a value.
#pragma once

#include "weight.h"

struct Attention {
  const void *query, *key, *value;  // [B, H, D], [B, G, K, D], [B, G, K, E]; the last numbers are neighbours
  void* out;                        // [B, H, E]
  const uint8_t* mask;              // [B, K]: 1 where a key counts; or none
  int64_t batch, heads, groups, keys, size, values;  // B, H, G, K, D, E
  int64_t query_batch, query_head, key_batch, key_group, key_row, value_batch, value_group, value_row, mask_batch;
  float scale;
  int32_t dtype, threads;
  Parallel parallel;
};

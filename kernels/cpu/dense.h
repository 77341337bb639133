// Dense: a matrix of plain numbers as a kernel gets it, and the tokens it is multiplied by.
#pragma once

#include "weight.h"

struct Dense {
  const void* weight;     // [N, K] in the dtype of x; K is a multiple of 32
  int64_t rows, columns;  // N, K
  Work work;              // of one matrix; results are rounded once
};

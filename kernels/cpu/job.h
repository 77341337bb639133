// Job: what threads share while they multiply.
#pragma once

#include "arrange.h"
#include "decode.h"
#include "dots.h"
#include "scales.h"

namespace {  // each instruction set has its own

struct Job {
  const Weight& weight;
  const Work& work;
  void* x;              // arranged: [C, M, columns of a chunk], or [., M, SPAN] for panels
  float* totals;        // [M, G]: sums of activations, or none
  int64_t tiles, words;  // of a matrix; of a tile
};

}  // namespace

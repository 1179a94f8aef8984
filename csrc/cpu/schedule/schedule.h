// Runs a call: cuts it into tiles, spreads these over threads, merges what they give.

#pragma once

#include "cpu/attention.h"
#include "cpu/linear.h"

namespace fa3npu {

void attention_forward(const Attention& a);
void attention_backward(const Attention& a);
void linear(const Linear& call);

}  // namespace fa3npu

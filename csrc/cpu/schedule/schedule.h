// Runs an attention call: cuts it into tiles, spreads these over threads, merges what they give.

#pragma once

#include "cpu/attention.h"

namespace fa3npu {

void attention_forward(const Attention& a);
void attention_backward(const Attention& a);

}  // namespace fa3npu

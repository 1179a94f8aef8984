// Compiles the kernels: each .cpp beside it includes this once, for one instruction set. The
// vectors are the compiler's, as wide as a register.
//
// Bits: an element of a product is always summed in the order of its index, a row's softmax never
// mixes with another row's, and masked keys add exact zeros. So a row's result does not depend on
// the tile, the batch or the thread that computed it.

#pragma once

#include "cpu/tile/backward.h"
#include "cpu/tile/forward.h"
#include "cpu/tile/isa.h"
#include "cpu/tile/kernels.h"
#include "cpu/tile/linear.h"
#include "cpu/tile/quantise.h"

namespace fa3npu::FA3NPU_ISA {

template <class U>
constexpr Kernels kKernels = {state_bytes<Sum<U>>, forward_bytes<U>, backward_bytes<U>,
                              dq_bytes<U>,         forward_chunk<U>, empty_state<Sum<U>>,
                              merge_state<Sum<U>>, finish<Sum<U>>,   backward_delta<U>,
                              backward_keys<U>,    kLinearRows,      arranged_bytes<U>,
                              linear_bytes<U>,     arrange_x<U>,     linear_columns<U>};

}  // namespace fa3npu::FA3NPU_ISA

namespace fa3npu {

#if FA3NPU_BFLOAT16
const InstructionSet FA3NPU_SET = {FA3NPU_NAME, &FA3NPU_ISA::kKernels<FA3NPU_ISA::Pair>, nullptr,
                                   nullptr, FA3NPU_ISA::quantise_row};
#else
const InstructionSet FA3NPU_SET = {FA3NPU_NAME, &FA3NPU_ISA::kKernels<float>,
                                   &FA3NPU_ISA::kKernels<float>, &FA3NPU_ISA::kKernels<double>,
                                   FA3NPU_ISA::quantise_row};
#endif

}  // namespace fa3npu

FA3NPU_TARGET_TEMPLATES

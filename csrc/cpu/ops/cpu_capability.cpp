// cpu_capability and cpu_capabilities: the instruction sets of the CPU kernels.

#include <torch/csrc/stable/library.h>

#include "cpu/tile/kernels.h"

namespace fa3npu {

STABLE_TORCH_LIBRARY_IMPL(fa3npu, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("cpu_capabilities", TORCH_BOX(&cpu_capabilities));
}

}  // namespace fa3npu

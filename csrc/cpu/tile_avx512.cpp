#include "cpu/tile_headers.h"

#if defined(__x86_64__)
#include "cpu/isa_avx512.h"

namespace fa3npu::avx512 {
#include "cpu/tile.h"
}  // namespace fa3npu::avx512
FA3NPU_TARGET_END

#endif

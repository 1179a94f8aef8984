#include "cpu/tile_headers.h"

#if defined(__x86_64__)
#include "cpu/isa_amx.h"

namespace fa3npu::amx {
#include "cpu/tile.h"
}  // namespace fa3npu::amx
FA3NPU_TARGET_END

#endif

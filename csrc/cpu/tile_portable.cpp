#include "cpu/tile_headers.h"

#include "cpu/isa_portable.h"

namespace fa3npu::portable {
#include "cpu/tile.h"
}  // namespace fa3npu::portable

#include "cpu/tile_headers.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")

namespace fa3npu::avx2 {

#define FA3NPU_NAME "AVX2"
#define FA3NPU_BYTES 32   // of a register
#define FA3NPU_ROWS 6     // rows and
#define FA3NPU_VECTORS 2  // vectors of the product's register tile
#define FA3NPU_AVX512 0
#define FA3NPU_BFLOAT16 0  // whether products of bfloat16 are instructions
#define FA3NPU_AMX 0
#include "cpu/tile.h"

}  // namespace fa3npu::avx2

#endif

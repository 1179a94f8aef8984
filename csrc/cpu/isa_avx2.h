FA3NPU_TARGET("avx2,fma")

#define FA3NPU_NAME "AVX2"
#define FA3NPU_BYTES 32   // of a register
#define FA3NPU_ROWS 6     // rows and
#define FA3NPU_VECTORS 2  // vectors of the product's register tile
#define FA3NPU_AVX512 0
#define FA3NPU_BFLOAT16 0  // whether products of bfloat16 are instructions
#define FA3NPU_AMX 0

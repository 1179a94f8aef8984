#define FA3NPU_NAME "portable"
#define FA3NPU_BYTES 16   // of a register
#define FA3NPU_ROWS 4     // rows and
#define FA3NPU_VECTORS 2  // vectors of the product's register tile
#define FA3NPU_AVX512 0
#define FA3NPU_BFLOAT16 0  // whether products of bfloat16 are instructions
#define FA3NPU_AMX 0

// What the compiler makes of vectors of 16 bytes.

#define FA3NPU_BYTES 16  // of a register
#define FA3NPU_ROWS 4    // rows and
#if defined(__aarch64__)
#define FA3NPU_NAME "NEON"
#define FA3NPU_VECTORS 4  // vectors of the product's register tile: there are 32 registers
#else
#define FA3NPU_NAME "portable"
#define FA3NPU_VECTORS 2
#endif
#define FA3NPU_AVX512 0
#define FA3NPU_BFLOAT16 0  // whether products of bfloat16 are instructions
#define FA3NPU_AMX 0

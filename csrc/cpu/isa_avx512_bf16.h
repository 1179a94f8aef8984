FA3NPU_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")

#define FA3NPU_NAME "AVX512_BF16"
#define FA3NPU_BYTES 64   // of a register
#define FA3NPU_ROWS 6     // rows and
#define FA3NPU_VECTORS 4  // vectors of the product's register tile
#define FA3NPU_AVX512 1
#define FA3NPU_BFLOAT16 1  // whether products of bfloat16 are instructions
#define FA3NPU_AMX 0

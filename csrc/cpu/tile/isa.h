// The instruction set that this translation unit compiles the kernels for: the one that a macro
// FA3NPU_FOR_... names, or what every machine has. Its code lies in a namespace of its own, between
// FA3NPU_TARGET_BEGIN and FA3NPU_TARGET_END. Includes stay outside: inline functions of other
// headers are shared by all sets, and must run on every machine.

#pragma once

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

// FA3NPU_ISA      its namespace
// FA3NPU_SET      the table of its kernels, see kernels.h
// FA3NPU_BYTES    of a register
// FA3NPU_ROWS     rows and
// FA3NPU_VECTORS  vectors of a product's register tile
#if defined(FA3NPU_FOR_AMX)
#define FA3NPU_ISA amx
#define FA3NPU_SET kAmx
#define FA3NPU_NAME "AMX"
#define FA3NPU_FEATURES \
  "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,amx-tile,amx-bf16"
#elif defined(FA3NPU_FOR_AVX512_BF16)
#define FA3NPU_ISA avx512_bf16
#define FA3NPU_SET kAvx512Bf16
#define FA3NPU_NAME "AVX512_BF16"
#define FA3NPU_FEATURES "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma"
#elif defined(FA3NPU_FOR_AVX512)
#define FA3NPU_ISA avx512
#define FA3NPU_SET kAvx512
#define FA3NPU_NAME "AVX512"
#define FA3NPU_FEATURES "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#elif defined(FA3NPU_FOR_AVX2)
#define FA3NPU_ISA avx2
#define FA3NPU_SET kAvx2
#define FA3NPU_NAME "AVX2"
#define FA3NPU_FEATURES "avx2,fma,f16c"
#define FA3NPU_BYTES 32
#define FA3NPU_ROWS 6
#define FA3NPU_VECTORS 2
#else  // what the compiler makes of vectors of 16 bytes
#define FA3NPU_ISA portable
#define FA3NPU_SET kPortable
#define FA3NPU_BYTES 16
#define FA3NPU_ROWS 4
#if defined(__aarch64__)
#define FA3NPU_NAME "NEON"
#define FA3NPU_VECTORS 4  // there are 32 registers
#else
#define FA3NPU_NAME "portable"
#define FA3NPU_VECTORS 2
#endif
#endif

#if defined(FA3NPU_FEATURES)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Whether there are tiles of bfloat16, products of bfloat16, registers of 64 bytes.
#if defined(FA3NPU_FOR_AMX)
#define FA3NPU_AMX 1
#else
#define FA3NPU_AMX 0
#endif
#if FA3NPU_AMX || defined(FA3NPU_FOR_AVX512_BF16)
#define FA3NPU_BFLOAT16 1
#else
#define FA3NPU_BFLOAT16 0
#endif
#if FA3NPU_BFLOAT16 || defined(FA3NPU_FOR_AVX512)
#define FA3NPU_AVX512 1
#define FA3NPU_BYTES 64
#define FA3NPU_ROWS 6
#define FA3NPU_VECTORS 4
#else
#define FA3NPU_AVX512 0
#endif

#define FA3NPU_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if !defined(FA3NPU_FEATURES)
#define FA3NPU_TARGET_BEGIN
#define FA3NPU_TARGET_END
#define FA3NPU_TARGET_TEMPLATES
#elif defined(__clang__)
#define FA3NPU_TARGET(features) \
  FA3NPU_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FA3NPU_TARGET_BEGIN FA3NPU_TARGET(FA3NPU_FEATURES)
#define FA3NPU_TARGET_END FA3NPU_PRAGMA(clang attribute pop)
#define FA3NPU_TARGET_TEMPLATES
#else
#define FA3NPU_TARGET(features) FA3NPU_PRAGMA(GCC target(features))
#define FA3NPU_TARGET_BEGIN FA3NPU_PRAGMA(GCC push_options) FA3NPU_TARGET(FA3NPU_FEATURES)
#define FA3NPU_TARGET_END FA3NPU_PRAGMA(GCC pop_options)
// The last line of a translation unit: g++ compiles the lambdas of templates for what holds there.
#define FA3NPU_TARGET_TEMPLATES FA3NPU_TARGET(FA3NPU_FEATURES)
#endif

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's intrinsics use them so
#endif

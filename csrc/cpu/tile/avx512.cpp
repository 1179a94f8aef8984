#if defined(__x86_64__)
#define FA3NPU_FOR_AVX512
#include "cpu/tile/instruction_set.h"
#endif

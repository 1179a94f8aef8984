// The machine's limits, measured: a library that limits.py compiles and calls. Reading a buffer far
// beyond the caches gives the DRAM read; products between registers (or tiles) give the arithmetic
// peaks. One thread is timed by CPU time, more by wall time, as the rows of the benchmark are.
//
//   gcc -O3 -march=native -fopenmp -shared -fPIC limits.c -o limits.so
//
// Each function returns GB/s or GFLOP/s of so many threads together; 0 if the CPU lacks it.

#define _GNU_SOURCE
#include <omp.h>
#include <stddef.h>
#include <stdlib.h>
#include <time.h>
#if defined(__AVX512F__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef __AVX512F__
#define WIDTH 64  // bytes of a vector register
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define LANES (WIDTH / 4)
#define SUMS 12  // independent sums: enough to hide the latency of an FMA, few enough for registers
#define SAMPLES 7

typedef float vec __attribute__((vector_size(WIDTH)));

static int threads;
static volatile float sink;  // what is stored here cannot be optimised away

static double now(void) {
  struct timespec t;
  clock_gettime(threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int ascending(const void* a, const void* b) {
  return (*(const double*)a > *(const double*)b) - (*(const double*)a < *(const double*)b);
}

// Runs work() once on every thread, several times; the median of amounts (of a thread) per second.
static double rate(double amount, void (*work)(int thread)) {
  double samples[SAMPLES];
  for (int i = -1; i < SAMPLES; ++i) {  // -1: to warm up
    const double start = now();
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num());
    if (i >= 0) samples[i] = threads * amount / (now() - start);
  }
  qsort(samples, SAMPLES, sizeof *samples, ascending);
  return samples[SAMPLES / 2] / 1e9;
}

static const vec* buffer;
static size_t share;  // vectors that each thread reads

static void read_share(int thread) {
  vec sum[8] = {0};
  const vec* p = buffer + thread * share;
  for (size_t i = 0; i < share; i += 8)
    for (int j = 0; j < 8; ++j) sum[j] += p[i + j];
  for (int j = 1; j < 8; ++j) sum[0] += sum[j];
  sink = sum[0][0];
}

double stream(int number_of_threads, const void* memory, size_t bytes) {
  threads = number_of_threads;
  buffer = memory;
  share = bytes / WIDTH / threads / 8 * 8;
  return rate(share * WIDTH, read_share);
}

#define STEPS 1000000L

static void multiply_add(int thread) {
  vec sum[SUMS], factor, term;
  for (int j = 0; j < LANES; ++j) factor[j] = 0.999f, term[j] = 1e-3f;
  for (int j = 0; j < SUMS; ++j) sum[j] = term * (float)(thread + j);
  for (long i = 0; i < STEPS; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < SUMS; ++j) sum[j] = sum[j] * factor + term;
  }
  for (int j = 1; j < SUMS; ++j) sum[0] += sum[j];
  sink = sum[0][0];
}

double fma_peak(int number_of_threads) {
  threads = number_of_threads;
  return rate(STEPS * SUMS * LANES * 2.0, multiply_add);
}

#ifdef __AVX512BF16__
static void dot_bf16(int thread) {
  __m512 sum[SUMS];
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = (__m512bh)_mm512_set1_epi16(0x3c00);
  for (int j = 0; j < SUMS; ++j) sum[j] = _mm512_set1_ps(thread + j);
  for (long i = 0; i < STEPS; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < SUMS; ++j) sum[j] = _mm512_dpbf16_ps(sum[j], a, b);
  }
  for (int j = 1; j < SUMS; ++j) sum[0] = _mm512_add_ps(sum[0], sum[j]);
  sink = _mm512_reduce_add_ps(sum[0]);
}
#endif

double vdpbf16ps_peak(int number_of_threads) {
  threads = number_of_threads;
#ifdef __AVX512BF16__
  return rate(STEPS * SUMS * 64.0, dot_bf16);
#else
  return 0;
#endif
}

#ifdef __AMX_BF16__
// Six tiles of sums, 16 x 16 float32 each, and one tile of 16 x 32 bf16 for either factor.
static const struct {
  unsigned char palette, start, reserved[14];
  unsigned short bytes_a_row[16];
  unsigned char rows[16];
} config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static void tiles(int thread) {
  (void)thread;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (long i = 0; i < STEPS / 10; ++i) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  _tile_release();
}

static int tiles_allowed(void) {  // the kernel gives out the tile registers on request
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
}
#endif

double amx_peak(int number_of_threads) {
  threads = number_of_threads;
#ifdef __AMX_BF16__
  if (tiles_allowed()) return rate(STEPS / 10 * 6 * 16384.0, tiles);
#endif
  return 0;
}

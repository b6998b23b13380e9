/* A CUDA driver on host memory, for tests of the adapter's calls: arguments arrive in the widths that NVIDIA declares,
   and what was called in which order can be read back. It executes nothing: the "device" is malloc. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
static size_t limit = 1 << 20, used;
static int capturing, launches, live;
static char order[4096];
static size_t sizes[1024];
static void *blocks[1024];

static void note(char c) { size_t n = strlen(order); if (n + 1 < sizeof order) order[n] = c; }
const char *fake_order(void) { return order; }
int fake_launches(void) { return launches; }
int fake_live(void) { return live; }
void fake_reset(size_t bytes) { limit = bytes; used = 0; launches = live = capturing = 0; memset(order, 0, sizeof order); }

CUresult cuInit(unsigned flags) { return flags ? 1 : 0; }
CUresult cuDeviceGetCount(int *n) { *n = 1; return 0; }
CUresult cuDeviceGet(int *d, int ordinal) { *d = 7; return ordinal; }
CUresult cuDeviceGetName(char *name, int length, int d) { strncpy(name, "Fake RTX", (size_t)length); return d != 7; }
CUresult cuDriverGetVersion(int *v) { *v = 13010; return 0; }
CUresult cuDeviceGetAttribute(int *v, int which, int d) { *v = which == 75 ? 8 : 6; return d != 7; }
CUresult cuDevicePrimaryCtxRetain(void **c, int d) { *c = &limit; live++; return d != 7; }
CUresult cuDevicePrimaryCtxRelease_v2(int d) { live--; return d != 7; }
CUresult cuCtxSetCurrent(void *c) { return c != &limit; }
CUresult cuStreamCreate(void **s, unsigned flags) { *s = malloc(1); live++; note('s'); return flags != 1; }
CUresult cuStreamDestroy_v2(void *s) { free(s); live--; return 0; }
CUresult cuStreamSynchronize(void *s) { note('w'); return s == NULL; }
CUresult cuMemGetInfo_v2(size_t *f, size_t *t) { *f = limit - used; *t = limit; return 0; }
CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t n) {
  if (used + n > limit) return 2;
  void *block = malloc(n);
  for (int i = 0; i < 1024; i++) if (!blocks[i]) { blocks[i] = block; sizes[i] = n; break; }
  used += n; live++; *p = (CUdeviceptr)(uintptr_t)block; return 0;
}
CUresult cuMemFree_v2(CUdeviceptr p) {
  for (int i = 0; i < 1024; i++) if (blocks[i] == (void *)(uintptr_t)p) { blocks[i] = NULL; used -= sizes[i]; }
  free((void *)(uintptr_t)p); live--; return 0;
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr d, const void *h, size_t n, void *s) {
  memcpy((void *)(uintptr_t)d, h, n); note('>'); return s == NULL;
}
CUresult cuMemcpyDtoHAsync_v2(void *h, CUdeviceptr d, size_t n, void *s) {
  memcpy(h, (void *)(uintptr_t)d, n); note('<'); return s == NULL;
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr d, const void *h, size_t n) { memcpy((void *)(uintptr_t)d, h, n); return 0; }
CUresult cuMemcpyDtoH_v2(void *h, CUdeviceptr d, size_t n) { memcpy(h, (void *)(uintptr_t)d, n); return 0; }
CUresult cuCtxSynchronize(void) { return 0; }
CUresult cuEventCreate(void **e, unsigned flags) { *e = malloc(1); live++; return flags; }
CUresult cuEventRecord(void *e, void *s) { note('e'); return e == NULL || s == NULL; }
CUresult cuEventSynchronize(void *e) { return e == NULL; }
CUresult cuEventElapsedTime(float *ms, void *a, void *b) { *ms = 0.25f; return a == b; }
CUresult cuEventDestroy_v2(void *e) { free(e); live--; return 0; }
CUresult cuStreamBeginCapture_v2(void *s, int mode) { capturing = 1; note('['); return s == NULL || mode != 1; }
CUresult cuStreamEndCapture(void *s, void **g) { capturing = 0; note(']'); *g = malloc(1); live++; return s == NULL; }
CUresult cuGraphInstantiateWithFlags(void **x, void *g, unsigned long long flags) {
  *x = malloc(1); live++; return g == NULL || flags != 0;
}
CUresult cuGraphDestroy(void *g) { free(g); live--; return 0; }
CUresult cuGraphExecDestroy(void *x) { free(x); live--; return 0; }
CUresult cuGraphLaunch(void *x, void *s) { launches++; note('g'); return x == NULL || s == NULL; }
CUresult cuGetErrorString(CUresult status, const char **text) { *text = status == 2 ? "out of memory" : "invalid"; return 0; }

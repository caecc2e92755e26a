/* The plain C interface of the core, which memo_runtime/native/library.py loads with ctypes.
 *
 * Functions that return int32_t return a status (0: ok; see failure.hpp); memo_core_error then has the text, per
 * thread. Functions that submit return a ticket, or minus a status. Handles are numbers; a stale one is an error.
 * Every function may be called from any thread.
 */
#ifndef MEMO_CORE_C_INTERFACE_H
#define MEMO_CORE_C_INTERFACE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MEMO_CORE_INTERFACE_VERSION 3
#define MEMO_CORE_EXPORT __attribute__((visibility("default")))

typedef struct {
  int64_t slab;
  uint64_t base;
  uint64_t size;   /* usable bytes */
  uint64_t mapped; /* usable bytes to the page: what is pinned */
  int32_t pinned;
  int32_t on_node; /* the kernel took the wish for a NUMA node */
} memo_core_slab_info;

typedef struct {
  uint64_t host;
  uint64_t device;
  uint64_t width;  /* bytes of one run */
  uint64_t height; /* runs */
  uint64_t host_pitch;
  uint64_t device_pitch;
} memo_core_copy;

/* Behind it in memory: `count` of memo_core_copy. One piece of memory for all arguments, since each argument of a call
 * costs a caller in Python about as much as the call. */
typedef struct {
  int64_t engine;
  int64_t ticket;    /* chosen by the caller, above 0 and not used before */
  uint64_t stream;   /* the copies start when it has reached this point */
  int32_t direction; /* 0 to the host, 1 to the device */
  int32_t count;
} memo_core_request;

MEMO_CORE_EXPORT int32_t memo_core_interface_version(void);
/* Copies the text of this thread's last error, cut to `size` with its end; returns its length. */
MEMO_CORE_EXPORT int64_t memo_core_error(char* text, int64_t size);

/* Opens CUDA device `ordinal` through the driver library at `path`. */
MEMO_CORE_EXPORT int32_t memo_core_device_open(const char* path, int32_t ordinal, int64_t* device);
MEMO_CORE_EXPORT int32_t memo_core_device_close(int64_t device);
/* The NUMA node of the device; -1 where the system does not say. */
MEMO_CORE_EXPORT int32_t memo_core_device_numa_node(int64_t device, int32_t* node);

/* Host memory, pinned for `device` unless that is 0. `chunk`: bytes per registration (0: one for all). `numa_node`: -1
 * for the kernel's choice. `allow_partial`: after a refusal keep what was pinned; memo_core_slab_refusal says why. */
MEMO_CORE_EXPORT int32_t memo_core_slab_create(int64_t device, uint64_t size, uint64_t chunk, int32_t threads,
                                               int32_t numa_node, int32_t allow_partial, memo_core_slab_info* info);
MEMO_CORE_EXPORT int32_t memo_core_slab_refusal(int64_t slab, char* text, int64_t size);
/* `offset`: -1 where nothing fits. What is written there is written before the call returns: whoever owns it can give
 * the slot back whatever happens next. */
MEMO_CORE_EXPORT int32_t memo_core_slab_take(int64_t slab, uint64_t size, uint64_t alignment, int64_t* offset);
/* `offset` becomes -1. */
MEMO_CORE_EXPORT int32_t memo_core_slab_give(int64_t slab, int64_t* offset);
MEMO_CORE_EXPORT int32_t memo_core_slab_in_use(int64_t slab, uint64_t* size);
/* Waits for copies under way and unpins; the memory stays readable until it is destroyed. */
MEMO_CORE_EXPORT int32_t memo_core_slab_close(int64_t slab);
/* Closes and unmaps. */
MEMO_CORE_EXPORT int32_t memo_core_slab_destroy(int64_t slab);

/* `device` 0: `threads` threads copy within host memory. */
MEMO_CORE_EXPORT int32_t memo_core_engine_create(int64_t device, int32_t threads, int64_t* engine);
MEMO_CORE_EXPORT int32_t memo_core_engine_destroy(int64_t engine);
MEMO_CORE_EXPORT int32_t memo_core_engine_drain(int64_t engine);
/* The handle of the stream of a direction; 0 where threads copy. */
MEMO_CORE_EXPORT int32_t memo_core_engine_stream(int64_t engine, int32_t direction, uint64_t* stream);
MEMO_CORE_EXPORT int32_t memo_core_engine_num_open(int64_t engine, int64_t* count);

/* Starts the copies of `request`; returns its ticket. `name`: for the error, should one fail; it may have a line for
 * each copy. The caller vouches for the device ends: that they are memory of the engine's device. */
MEMO_CORE_EXPORT int64_t memo_core_submit(const memo_core_request* request, const char* name);
MEMO_CORE_EXPORT int32_t memo_core_wait(int64_t engine, int64_t ticket, uint64_t stream);
MEMO_CORE_EXPORT int32_t memo_core_cancel(int64_t engine, int64_t ticket, uint64_t stream, int32_t* prevented);
/* `memo_core_cancel` for whoever owns both ends and is about to die: says nothing. `who` is ignored. */
MEMO_CORE_EXPORT void memo_core_drop(int64_t engine, int64_t ticket, uint64_t stream, const void* who);
MEMO_CORE_EXPORT int32_t memo_core_done(int64_t engine, int64_t ticket, int32_t* done);

#ifdef __cplusplus
}
#endif

#endif

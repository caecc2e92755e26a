/* The planned allocator as functions, for ctypes. Those that return a status give 0, or a number of memo_runtime's
   allocator/library.py; memo_alloc_error then has the text. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MEMO_ALLOC_INTERFACE_VERSION 3

/* 1000 * major + minor of the torch that this was built for. */
int32_t memo_alloc_torch(void);
int32_t memo_alloc_interface_version(void);
int64_t memo_alloc_error(char* text, int64_t size);

/* In front of the native allocator from now on; `torch` is the version that is running, as above. */
int32_t memo_alloc_install(int32_t torch);

/* `slots`: `count` times (lower, upper, size, offset, stream, least, most), in order of `lower`. From the next step on. */
int32_t memo_alloc_arm(int32_t device, const uint64_t* slots, uint64_t count, uint64_t size);
/* `alive` receives the bytes of tensors that still live in arenas. */
int32_t memo_alloc_disarm(int32_t device, uint64_t* alive);

int32_t memo_alloc_begin_step(int32_t device);
int32_t memo_alloc_end_step(int32_t device);

/* As allocator/library.py's Statistics: arena.hpp's, then bytes of the arena, requests that went to private pools, times
   that the arena was given back since memory ran out, and whether a plan is there. */
int32_t memo_alloc_statistics(int32_t device, uint64_t* values, int64_t count);
/* (slot, bytes) of requests of the last step that had another size than planned, at most `capacity` of them; `count`
   receives how many. */
int32_t memo_alloc_misfits(int32_t device, uint64_t* values, uint64_t capacity, uint64_t* count);
/* Whether planned memory is at `address`. */
int32_t memo_alloc_holds(int32_t device, uint64_t address, int32_t* holds);

#ifdef __cplusplus
}
#endif

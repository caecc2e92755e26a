// The minor of torch that this is built for, as 1000 * major + minor.
#pragma once

#if __has_include(<torch/headeronly/version.h>)
#include <torch/headeronly/version.h>
#else
#include <torch/version.h>
#endif

#define MEMO_TORCH (1000 * TORCH_VERSION_MAJOR + TORCH_VERSION_MINOR)

#if MEMO_TORCH < 2011 || MEMO_TORCH > 2014
#error "the planned allocator knows the allocator interface of torch 2.11, 2.12, 2.13 and 2.14 only"
#endif

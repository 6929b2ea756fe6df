// PARE_CLONES before a function: it is compiled for several instruction sets, and the machine's own is chosen when the
// program is loaded; without a resolver (static or exotic platforms) the baseline serves. Include only from .cpp files.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#define PARE_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define PARE_CLONES
#endif

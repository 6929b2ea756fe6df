#define PARE_VNNI_CODING kAvxVnniLong
#include "runtime/kernels_avxvnni.cpp"

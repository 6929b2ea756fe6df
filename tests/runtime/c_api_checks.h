#ifndef PARE_TESTS_C_API_CHECKS_H
#define PARE_TESTS_C_API_CHECKS_H
#ifdef __cplusplus
extern "C" {
#endif
/* Uses a compact file from C. Returns 0, or the line in c_api_checks.c of the first check that failed. */
int c_api_checks(const char* compact_file, const char* absent_file, const char* state_file);
#ifdef __cplusplus
}
#endif
#endif

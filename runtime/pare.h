/* C interface of the pare runtime: open a compact file, tokenize, feed, read logits, sample. Plain C11.
 *
 * Every function that can fail returns a status: PARE_OK, or the number that the `pare` program would exit with;
 * functions that return a handle return NULL and functions that return a count return -1. pare_last_error() then tells,
 * per thread, what was wrong. A model may be shared by threads; a session or a sampler belongs to one thread at a time.
 * Handles keep what they need alive: a model may be closed while its sessions are still open. Closing NULL does
 * nothing.
 */
#ifndef PARE_H
#define PARE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PARE_API_VERSION 1

enum pare_status {
  PARE_OK = 0,
  PARE_FAILURE = 1, /* I/O, out of memory, logits that are not finite */
  PARE_USAGE = 2,   /* an argument is out of its range */
  PARE_INPUT = 3,   /* the file, the text or a token id is invalid; the context is full */
  PARE_RESOURCES = 5
};

typedef struct pare_model pare_model;
typedef struct pare_session pare_session;
typedef struct pare_sampler pare_sampler;

typedef struct pare_options {
  int threads;           /* 0: all cores */
  const char* kernels;   /* NULL: the best here; "plain", "avx2", "avxvnni", "avx512vnni", "neon", "dotprod", "i8mm" */
  int float_activations; /* 0: int8 activations with quantized weights, a cache of halves; 1: float, both */
} pare_options;

/* Version of the project, such as "0.1.0"; static storage. */
const char* pare_version(void);
/* PARE_API_VERSION of the library that is linked. */
int pare_api_version(void);
/* Text of this thread's last failure, "" if there was none; valid until the next call in this thread. */
const char* pare_last_error(void);

/* options may be NULL. The file is mapped, not copied, and must not change while the model is open. */
pare_model* pare_open(const char* path, const pare_options* options);
void pare_close(pare_model* model);
int64_t pare_vocab_size(const pare_model* model);
int64_t pare_context_size(const pare_model* model);   /* positions the model was made for */
int pare_is_end(const pare_model* model, int32_t id); /* 1 for an end-of-text token */

/* Number of ids of the text (UTF-8, `bytes` long, need not end with 0); the first `capacity` are written to ids.
 * add_special: put what the tokenizer puts before a text (such as a begin token). -1 on failure. */
int64_t pare_tokenize(const pare_model* model, const char* text, size_t bytes, int add_special, int32_t* ids,
                      int64_t capacity);
/* Number of bytes of the text of `count` ids; as many as fit in `capacity` are written, with a final 0 if there is
 * room. -1 on failure. */
int64_t pare_detokenize(const pare_model* model, const int32_t* ids, int64_t count, char* text, int64_t capacity);

/* max_positions 0: pare_context_size(), which models with learned positions never exceed. Memory of the key/value cache
 * grows with use. */
pare_session* pare_session_open(const pare_model* model, int64_t max_positions);
void pare_session_close(pare_session* session);
int pare_session_reset(pare_session* session);
int64_t pare_session_position(const pare_session* session);
/* Appends ids. On failure the position is as before. */
int pare_feed(pare_session* session, const int32_t* ids, int64_t count);
/* Logits of rows [first, first + count) of the last pare_feed(): out is [count, vocab size]; row i predicts what
 * follows id i. */
int pare_logits(pare_session* session, int64_t first, int64_t count, float* out);

/* temperature 0: the likeliest token (lowest id among equals). top_p in (0, 1]. */
pare_sampler* pare_sampler_open(double temperature, double top_p, uint64_t seed);
void pare_sampler_close(pare_sampler* sampler);
/* The id drawn from `count` logits, -1 on failure. */
int32_t pare_sample(pare_sampler* sampler, const float* logits, int64_t count);

/* Called for every new token with the text that has become certain (possibly ""); return nonzero to stop. */
typedef int (*pare_on_token)(void* user, int32_t id, const char* text);
/* Continues after what was fed (at least one id) until an end token, `max_tokens` or the end of the context. Returns
 * the number of new tokens (the end token not counted), -1 on failure. on_token may be NULL. The session has then
 * seen all new tokens but the last. */
int64_t pare_generate(pare_session* session, pare_sampler* sampler, int64_t max_tokens, pare_on_token on_token,
                      void* user);

#ifdef __cplusplus
}
#endif
#endif

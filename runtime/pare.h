/* C interface of the pare runtime: open a compact file, tokenize, feed, read logits, sample. Plain C11.
 *
 * Functions that can fail return a status: PARE_OK, or the number that the `pare` program would exit with. Functions
 * that return a handle return NULL, and functions that return a count or an id return minus the status.
 * pare_last_status() and pare_last_error() then tell, per thread, what was wrong.
 *
 * Threads: a model may be shared by them. A session or a sampler belongs to one thread at a time; pare_cancel() alone
 * may come from others.
 * Handles keep what they need alive: a model may be closed while its sessions are still open. Closing NULL does
 * nothing. After fork(), the child must not use handles of its parent.
 */
#ifndef PARE_H
#define PARE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PARE_API_VERSION 2

enum pare_status {
  PARE_OK = 0,
  PARE_FAILURE = 1,   /* I/O, logits that are not finite */
  PARE_USAGE = 2,     /* an argument is out of its range */
  PARE_INPUT = 3,     /* a file, a state, the text or a token id is invalid; the context is full */
  PARE_RESOURCES = 5, /* out of memory */
  PARE_CANCELLED = 130
};

typedef struct pare_model pare_model;
typedef struct pare_session pare_session;
typedef struct pare_sampler pare_sampler;

/* Begin with PARE_OPTIONS_INIT; zero stands for the default of every field. Later versions add fields at the end: a
 * library takes shorter structs, and longer ones whose further bytes are zero. */
typedef struct pare_options {
  size_t size;           /* sizeof(pare_options) */
  int threads;           /* 0: all cores */
  int float_activations; /* 0: int8 activations with quantized weights; 1: float */
  const char* kernels;   /* "plain", "avx2", "avxvnni", "avx512vnni", "amx", "neon", "dotprod", "i8mm";
                            NULL: the best here. Where that is "amx", and with it by name, Linux is asked for the tiles'
                            state of the whole process: later signal stacks (sigaltstack) have to hold it, about 11 KiB
                            (getauxval(AT_MINSIGSTKSZ)). A name below it asks for nothing. */
  const char* kv;        /* keys and values: "f32", "f16", "mixed" (keys f16, values bf16) or "q8"; NULL: mixed with int8
                            activations, f32 with float */
} pare_options;
#define PARE_OPTIONS_INIT {sizeof(pare_options), 0, 0, NULL, NULL}

/* Version of the project, such as "0.1.0"; static storage. */
const char* pare_version(void);
/* PARE_API_VERSION of the library that is linked. */
int pare_api_version(void);
/* Text and status of this thread's last failure, "" and PARE_OK if there was none; the text is valid until the next
 * call in this thread. */
const char* pare_last_error(void);
int pare_last_status(void);

/* options may be NULL. The file is mapped, not copied, and must not change while the model is open. Its structure is
 * checked, its hashes are not. */
pare_model* pare_open(const char* path, const pare_options* options);
void pare_close(pare_model* model);
/* Reads the whole file and compares its hashes: PARE_INPUT names what was changed. */
int pare_verify(const pare_model* model);
int64_t pare_vocab_size(const pare_model* model);
int64_t pare_context_size(const pare_model* model);   /* positions the model was made for */
int pare_is_end(const pare_model* model, int32_t id); /* 1 for an end-of-text token */

/* Number of ids of the text (UTF-8, `bytes` long, need not end with 0); the first `capacity` are written to ids.
 * add_special: put what the tokenizer puts before a text (such as a begin token). */
int64_t pare_tokenize(const pare_model* model, const char* text, size_t bytes, int add_special, int32_t* ids,
                      int64_t capacity);
/* Number of bytes of the text of `count` ids; as many as fit in `capacity` are written, with a final 0 if there is
 * room. */
int64_t pare_detokenize(const pare_model* model, const int32_t* ids, int64_t count, char* text, int64_t capacity);

/* max_positions 0: pare_context_size(), which models with learned positions never exceed. Memory of the key/value cache
 * grows with use. */
pare_session* pare_session_open(const pare_model* model, int64_t max_positions);
void pare_session_close(pare_session* session);
int pare_session_reset(pare_session* session);
/* Forgets the positions from `position` on; pare_logits() has no rows then. PARE_USAGE beyond the position;
 * PARE_FAILURE where a sliding window no longer keeps what lies so far back (288 positions back it always does). */
int pare_session_truncate(pare_session* session, int64_t position);
int64_t pare_session_position(const pare_session* session);
/* Appends ids. On failure the position is as before, and of the rows before at least the last one is left (as row 0 of
 * one) if there was any. */
int pare_feed(pare_session* session, const int32_t* ids, int64_t count);
/* Logits of rows [first, first + count) of the last pare_feed(): out is [count, vocab size]; row i predicts what
 * follows id i. */
int pare_logits(pare_session* session, int64_t first, int64_t count, float* out);

/* Several sequences in one pass, which reads the weights once: appends ids[i] to sessions[i], with the bits that
 * pare_feed() has for each alone. They are different sessions of one model, PARE_MOST_SESSIONS at most. On failure all
 * are as before. */
#define PARE_MOST_SESSIONS 288
int pare_feed_each(pare_session* const* sessions, const int32_t* ids, int64_t count);
/* The last row of each: out is [count, vocab size]. */
int pare_logits_each(pare_session* const* sessions, int64_t count, float* out);

/* From any thread: makes the pare_feed(), pare_feed_each() or pare_generate() that the session is in return
 * PARE_CANCELLED, at the next of the model's blocks. If it is in none, the next one will, unless
 * pare_cancel_clear() takes the request back. One request fails one call. The session may be used as after any other
 * failure; pare_generate() keeps the tokens that on_token got. */
void pare_cancel(pare_session* session);
void pare_cancel_clear(pare_session* session);

/* State of a session: its ids, keys and values, and the last row of logits, so that a session of the same file with the
 * same kind of cache (pare_options.kv) goes on with the same bits. Anything else is refused (PARE_INPUT): states of other
 * models, caches or versions, more positions than the session may have, bytes that are missing or changed. A session that
 * could not load is as before.
 * pare_session_save() replaces the file as a whole or not at all. */
int pare_session_save(const pare_session* session, const char* path);
int pare_session_load(pare_session* session, const char* path);
/* Size of the state in bytes, which are written if `capacity` suffices. */
int64_t pare_session_pack(const pare_session* session, void* state, int64_t capacity);
int pare_session_unpack(pare_session* session, const void* state, size_t bytes);

/* temperature 0: the likeliest token (lowest id among equals). top_p in (0, 1]. */
pare_sampler* pare_sampler_open(double temperature, double top_p, uint64_t seed);
void pare_sampler_close(pare_sampler* sampler);
/* The id drawn from `count` logits. */
int32_t pare_sample(pare_sampler* sampler, const float* logits, int64_t count);

/* Called for every new token with the text that has become certain (possibly ""); return nonzero to stop. */
typedef int (*pare_on_token)(void* user, int32_t id, const char* text);
/* Continues after what was fed (at least one id) until an end token, `max_tokens` or the end of the context. Returns
 * the number of new tokens (the end token not counted). on_token may be NULL. The session has then seen all new tokens
 * but the last, also where it was cancelled. */
int64_t pare_generate(pare_session* session, pare_sampler* sampler, int64_t max_tokens, pare_on_token on_token,
                      void* user);

#ifdef __cplusplus
}
#endif
#endif

/* The C interface, used from C. */
#include "tests/runtime/c_api_checks.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/pare.h"

#define CHECK(condition)               \
  do {                                 \
    if (!(condition)) return __LINE__; \
  } while (0)

struct seen {
  int64_t tokens;
  int64_t stop_after;
  pare_session* session;
  char text[4096];
};

static int cancel_at_second(void* user, int32_t id, const char* text) {
  struct seen* seen = user;
  (void)id;
  (void)text;
  if (++seen->tokens == 2) pare_cancel(seen->session);
  return 0;
}

static int on_token(void* user, int32_t id, const char* text) {
  struct seen* seen = user;
  (void)id;
  seen->tokens++;
  strncat(seen->text, text, sizeof seen->text - strlen(seen->text) - 1);
  return seen->stop_after > 0 && seen->tokens >= seen->stop_after;
}

/* Several sessions in one pass, requests to stop, and states. */
static int c_api_more_checks(const char* compact_file, const char* state_file) {
  pare_options options = PARE_OPTIONS_INIT;
  options.threads = 2;
  options.kv = "q8";
  pare_model* model = pare_open(compact_file, &options);
  CHECK(model != NULL);
  options.kv = "mixed";
  pare_model* halves = pare_open(compact_file, &options);
  CHECK(halves != NULL);
  const size_t vocab = (size_t)pare_vocab_size(model);
  pare_session *a = pare_session_open(model, 0), *b = pare_session_open(model, 0), *c = pare_session_open(halves, 0);
  float *pair = malloc(2 * vocab * sizeof(float)), *one = malloc(vocab * sizeof(float));
  CHECK(a != NULL && b != NULL && c != NULL && pair != NULL && one != NULL);
  const int32_t ids[] = {5, 6, 7, 8};
  pare_session* both[] = {a, b};
  CHECK(pare_feed(a, ids, 2) == PARE_OK);
  CHECK(pare_feed_each(both, ids + 2, 2) == PARE_OK);
  CHECK(pare_session_position(a) == 3 && pare_session_position(b) == 1);
  CHECK(pare_logits_each(both, 2, pair) == PARE_OK);
  CHECK(pare_logits(b, 0, 1, one) == PARE_OK);
  CHECK(memcmp(one, pair + vocab, vocab * sizeof(float)) == 0);
  CHECK(pare_feed_each(NULL, ids, 1) == PARE_USAGE);
  CHECK(pare_feed_each(both, NULL, 2) == PARE_USAGE);
  CHECK(pare_feed_each(both, ids, -1) == PARE_USAGE);
  CHECK(pare_feed_each(both, ids, PARE_MOST_SESSIONS + 1) == PARE_USAGE);
  CHECK(pare_feed_each(both, ids, 0) == PARE_OK);
  both[1] = a;
  CHECK(pare_feed_each(both, ids, 2) == PARE_USAGE);
  both[1] = c;
  CHECK(pare_feed_each(both, ids, 2) == PARE_USAGE); /* of another model */
  both[1] = NULL;
  CHECK(pare_feed_each(both, ids, 2) == PARE_USAGE);
  CHECK(pare_session_position(a) == 3);

  /* A request to stop fails one call and moves nothing. */
  pare_cancel(NULL);
  pare_cancel_clear(NULL);
  pare_cancel(a);
  CHECK(pare_feed(a, ids, 4) == PARE_CANCELLED && pare_last_status() == PARE_CANCELLED);
  CHECK(pare_session_position(a) == 3);
  CHECK(pare_logits(a, 0, 1, one) == PARE_OK);
  CHECK(memcmp(one, pair, vocab * sizeof(float)) == 0);
  pare_cancel(a);
  pare_cancel_clear(a);
  CHECK(pare_feed(a, ids + 3, 1) == PARE_OK);
  pare_sampler* sampler = pare_sampler_open(1.0, 1.0, 3);
  struct seen seen = {0, 0, a, ""};
  const int64_t cancelled = pare_generate(a, sampler, 100, cancel_at_second, &seen);
  CHECK(seen.tokens < 2 || (cancelled == -PARE_CANCELLED && pare_session_position(a) == 5));
  pare_cancel_clear(a);

  /* There and back, through memory and a file. */
  CHECK(pare_feed(a, ids, 1) == PARE_OK);
  CHECK(pare_logits(a, 0, 1, one) == PARE_OK);
  const int64_t size = pare_session_pack(a, NULL, 0);
  CHECK(size > 0);
  char* state = malloc((size_t)size);
  CHECK(state != NULL);
  CHECK(pare_session_pack(a, state, size - 1) == size);
  CHECK(pare_session_pack(a, state, size) == size);
  CHECK(pare_session_unpack(b, state, (size_t)size) == PARE_OK);
  CHECK(pare_session_position(b) == pare_session_position(a));
  CHECK(pare_logits(b, 0, 1, pair) == PARE_OK);
  CHECK(memcmp(one, pair, vocab * sizeof(float)) == 0);
  CHECK(pare_session_unpack(c, state, (size_t)size) == PARE_INPUT);
  CHECK(pare_session_unpack(b, state, (size_t)size - 1) == PARE_INPUT);
  CHECK(pare_session_unpack(b, NULL, 0) == PARE_INPUT);
  CHECK(pare_session_unpack(b, NULL, 5) == PARE_USAGE);
  CHECK(pare_session_position(b) == pare_session_position(a));
  CHECK(pare_session_save(a, state_file) == PARE_OK);
  CHECK(pare_session_reset(b) == PARE_OK);
  CHECK(pare_session_load(b, state_file) == PARE_OK);
  CHECK(pare_session_load(c, state_file) == PARE_INPUT);
  CHECK(pare_session_load(b, compact_file) == PARE_INPUT);
  CHECK(pare_logits(b, 0, 1, pair) == PARE_OK);
  CHECK(memcmp(one, pair, vocab * sizeof(float)) == 0);

  free(state);
  free(pair);
  free(one);
  pare_sampler_close(sampler);
  pare_session_close(a);
  pare_session_close(b);
  pare_session_close(c);
  pare_close(model);
  pare_close(halves);
  return 0;
}

int c_api_checks(const char* compact_file, const char* absent_file, const char* state_file) {
  CHECK(pare_api_version() == PARE_API_VERSION);
  CHECK(strlen(pare_version()) >= 5);

  /* Failures tell what and never crash. */
  CHECK(pare_open(absent_file, NULL) == NULL);
  CHECK(strstr(pare_last_error(), absent_file) != NULL);
  CHECK(pare_open(NULL, NULL) == NULL);
  CHECK(pare_last_status() == PARE_USAGE);
  pare_options bad = PARE_OPTIONS_INIT;
  bad.kernels = "no such kernels";
  CHECK(pare_open(compact_file, &bad) == NULL);
  CHECK(strstr(pare_last_error(), "no such kernels") != NULL);
  bad = (pare_options)PARE_OPTIONS_INIT;
  bad.kv = "f8";
  CHECK(pare_open(compact_file, &bad) == NULL);
  CHECK(strstr(pare_last_error(), "f8") != NULL);
  bad = (pare_options){0};
  CHECK(pare_open(compact_file, &bad) == NULL && pare_last_status() == PARE_USAGE);
  struct {
    pare_options known;
    int later[2];
  } longer = {PARE_OPTIONS_INIT, {0, 0}};
  longer.known.size = sizeof longer;
  pare_model* of_longer = pare_open(compact_file, &longer.known);
  CHECK(of_longer != NULL);
  CHECK(pare_verify(of_longer) == PARE_OK);
  pare_close(of_longer);
  longer.later[1] = 1;
  CHECK(pare_open(compact_file, &longer.known) == NULL && pare_last_status() == PARE_USAGE);
  CHECK(pare_sampler_open(-1.0, 1.0, 0) == NULL);
  CHECK(pare_session_open(NULL, 0) == NULL);
  CHECK(pare_feed(NULL, NULL, 0) == PARE_USAGE);
  pare_close(NULL);
  pare_session_close(NULL);
  pare_sampler_close(NULL);

  pare_options options = PARE_OPTIONS_INIT;
  options.threads = 1;
  options.float_activations = 1;
  pare_model* model = pare_open(compact_file, &options);
  CHECK(model != NULL);
  const int64_t vocab = pare_vocab_size(model);
  CHECK(vocab > 256);
  CHECK(pare_context_size(model) == 300);
  CHECK(pare_is_end(model, 2) == 1 && pare_is_end(model, 3) == 0);

  /* Text to ids and back; too little room gives the size that is needed. */
  const char* text = "once upon a time, h\xc3\xa4nsel";
  int32_t ids[64];
  const int64_t count = pare_tokenize(model, text, strlen(text), 1, ids, 64);
  CHECK(count > 3 && count < 64);
  int32_t few[2];
  CHECK(pare_tokenize(model, text, strlen(text), 1, few, 2) == count);
  CHECK(few[0] == ids[0] && few[1] == ids[1]);
  CHECK(pare_tokenize(model, NULL, 0, 1, NULL, 0) >= 0);
  char back[64];
  CHECK(pare_detokenize(model, ids, count, back, sizeof back) == (int64_t)strlen(text));
  CHECK(strcmp(back, text) == 0);
  CHECK(pare_detokenize(model, ids, count, back, 4) == (int64_t)strlen(text));
  CHECK(memcmp(back, text, 4) == 0);

  /* Sessions outlive the handle of their model; two of them do not disturb each other. */
  pare_session* session = pare_session_open(model, 40);
  pare_session* other = pare_session_open(model, 0);
  pare_close(model);
  CHECK(session != NULL && other != NULL);
  float* logits = malloc(sizeof(float) * (size_t)(vocab * count));
  float* again = malloc(sizeof(float) * (size_t)vocab);
  CHECK(logits != NULL && again != NULL);
  CHECK(pare_logits(session, 0, 1, logits) == PARE_USAGE);
  CHECK(pare_feed(session, ids, count) == PARE_OK);
  CHECK(pare_session_position(session) == count);
  CHECK(pare_logits(session, 0, count, logits) == PARE_OK);
  for (int64_t i = 0; i < count; ++i) {
    CHECK(pare_feed(other, ids + i, 1) == PARE_OK);
    CHECK(pare_logits(other, 0, 1, again) == PARE_OK);
    CHECK(memcmp(again, logits + i * vocab, sizeof(float) * (size_t)vocab) == 0);
  }
  CHECK(pare_logits(session, count, 1, logits) == PARE_USAGE);
  const int32_t wrong = (int32_t)vocab;
  CHECK(pare_feed(session, &wrong, 1) == PARE_INPUT);
  CHECK(strlen(pare_last_error()) > 0);
  CHECK(pare_session_position(session) == count);

  /* Greedy by hand and by pare_generate agree. */
  pare_sampler* greedy = pare_sampler_open(0.0, 1.0, 0);
  CHECK(greedy != NULL);
  int32_t made[8];
  for (int i = 0; i < 8; ++i) {
    CHECK(pare_logits(other, 0, 1, again) == PARE_OK);
    made[i] = pare_sample(greedy, again, vocab);
    CHECK(made[i] >= 0 && made[i] < vocab);
    CHECK(pare_feed(other, &made[i], 1) == PARE_OK);
  }
  struct seen seen = {0, 0, NULL, ""};
  const int64_t generated = pare_generate(session, greedy, 8, on_token, &seen);
  CHECK(generated >= 0 && generated <= 8);
  CHECK(seen.tokens == generated);

  /* Steps back. */
  const int64_t there = pare_session_position(session);
  CHECK(pare_session_truncate(session, there + 1) == PARE_USAGE);
  CHECK(pare_session_truncate(session, -1) == PARE_USAGE);
  CHECK(pare_session_truncate(NULL, 0) == PARE_USAGE);
  CHECK(pare_session_position(session) == there);
  CHECK(pare_session_truncate(session, 1) == PARE_OK);
  CHECK(pare_session_position(session) == 1);
  CHECK(pare_feed(session, ids + 1, count - 1) == PARE_OK);
  CHECK(pare_session_position(session) == count);

  /* The end of the context ends it; a callback may end it earlier. */
  CHECK(pare_session_reset(session) == PARE_OK);
  CHECK(pare_session_position(session) == 0);
  CHECK(pare_generate(session, greedy, 5, NULL, NULL) == -PARE_USAGE);
  CHECK(pare_feed(session, ids, count) == PARE_OK);
  pare_sampler* sampler = pare_sampler_open(1.0, 0.95, 7);
  CHECK(sampler != NULL);
  seen = (struct seen){0, 0, NULL, ""};
  const int64_t until_end = pare_generate(session, sampler, 1000, on_token, &seen);
  CHECK(until_end >= 0 && until_end <= 41 - count);
  CHECK(pare_session_position(session) <= 40);
  CHECK(pare_session_reset(session) == PARE_OK);
  CHECK(pare_feed(session, ids, count) == PARE_OK);
  seen = (struct seen){0, 1, NULL, ""};
  CHECK(pare_generate(session, greedy, 10, on_token, &seen) <= 1);

  CHECK(pare_sample(sampler, again, 0) == -PARE_USAGE);
  again[0] = NAN;
  CHECK(pare_sample(sampler, again, vocab) == -PARE_FAILURE);
  CHECK(strlen(pare_last_error()) > 0);

  free(logits);
  free(again);
  pare_sampler_close(greedy);
  pare_sampler_close(sampler);
  pare_session_close(session);
  pare_session_close(other);
  return c_api_more_checks(compact_file, state_file);
}

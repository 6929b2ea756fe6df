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
  char text[4096];
};

static int on_token(void* user, int32_t id, const char* text) {
  struct seen* seen = user;
  (void)id;
  seen->tokens++;
  strncat(seen->text, text, sizeof seen->text - strlen(seen->text) - 1);
  return seen->stop_after > 0 && seen->tokens >= seen->stop_after;
}

int c_api_checks(const char* compact_file, const char* absent_file) {
  CHECK(pare_api_version() == PARE_API_VERSION);
  CHECK(strlen(pare_version()) >= 5);

  /* Failures tell what and never crash. */
  CHECK(pare_open(absent_file, NULL) == NULL);
  CHECK(strstr(pare_last_error(), absent_file) != NULL);
  CHECK(pare_open(NULL, NULL) == NULL);
  pare_options bad = {0, "no such kernels", 0};
  CHECK(pare_open(compact_file, &bad) == NULL);
  CHECK(strstr(pare_last_error(), "no such kernels") != NULL);
  CHECK(pare_sampler_open(-1.0, 1.0, 0) == NULL);
  CHECK(pare_session_open(NULL, 0) == NULL);
  CHECK(pare_feed(NULL, NULL, 0) == PARE_USAGE);
  pare_close(NULL);
  pare_session_close(NULL);
  pare_sampler_close(NULL);

  pare_options options = {1, NULL, 1};
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
  struct seen seen = {0, 0, ""};
  const int64_t generated = pare_generate(session, greedy, 8, on_token, &seen);
  CHECK(generated >= 0 && generated <= 8);
  CHECK(seen.tokens == generated);

  /* The end of the context ends it; a callback may end it earlier. */
  CHECK(pare_session_reset(session) == PARE_OK);
  CHECK(pare_session_position(session) == 0);
  CHECK(pare_generate(session, greedy, 5, NULL, NULL) == -1);
  CHECK(pare_feed(session, ids, count) == PARE_OK);
  pare_sampler* sampler = pare_sampler_open(1.0, 0.95, 7);
  CHECK(sampler != NULL);
  seen = (struct seen){0, 0, ""};
  const int64_t until_end = pare_generate(session, sampler, 1000, on_token, &seen);
  CHECK(until_end >= 0 && until_end <= 41 - count);
  CHECK(pare_session_position(session) <= 40);
  CHECK(pare_session_reset(session) == PARE_OK);
  CHECK(pare_feed(session, ids, count) == PARE_OK);
  seen = (struct seen){0, 1, ""};
  CHECK(pare_generate(session, greedy, 10, on_token, &seen) <= 1);

  CHECK(pare_sample(sampler, again, 0) == -1);
  again[0] = NAN;
  CHECK(pare_sample(sampler, again, vocab) == -1);
  CHECK(strlen(pare_last_error()) > 0);

  free(logits);
  free(again);
  pare_sampler_close(greedy);
  pare_sampler_close(sampler);
  pare_session_close(session);
  pare_session_close(other);
  return 0;
}

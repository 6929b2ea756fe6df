/* Continues a text with a compact file: continue MODEL.pare "Once upon a time" 40
 * Text on stdout, the ids of its tokens on stderr. */
#include <pare.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int show(void* user, int32_t id, const char* text) {
  (void)user;
  fputs(text, stdout);
  fprintf(stderr, "%d ", (int)id);
  return 0; /* anything else would stop here */
}

static int failed(void) {
  fprintf(stderr, "%s\n", pare_last_error());
  return pare_last_status();
}

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  pare_model* model = pare_open(argv[1], NULL);
  if (model == NULL) return failed();
  const int64_t count = pare_tokenize(model, argv[2], strlen(argv[2]), 1, NULL, 0);
  if (count < 0) return failed();
  int32_t* ids = malloc(sizeof *ids * (size_t)(count + 1));
  pare_session* session = pare_session_open(model, 0);
  pare_sampler* greedy = pare_sampler_open(0.0, 1.0, 0);
  if (ids == NULL || session == NULL || greedy == NULL) return failed();
  pare_tokenize(model, argv[2], strlen(argv[2]), 1, ids, count);
  if (pare_feed(session, ids, count) != PARE_OK) return failed();
  if (pare_generate(session, greedy, atoll(argv[3]), show, NULL) < 0) return failed();
  putchar('\n');
  free(ids);
  pare_sampler_close(greedy);
  pare_session_close(session);
  pare_close(model);
  return 0;
}

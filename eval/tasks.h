// Multiple choice, last-word prediction and minimal pairs from jsonl files, scored by the rules of
// lm-evaluation-harness (api/task.py and api/model.py there).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/context.h"
#include "core/tokenizer.h"
#include "eval/logits_source.h"
#include "eval/statistics.h"

namespace pare {

enum class TaskKind { kMultipleChoice, kContinuation, kMinimalPair };

// One question as (context, continuation) pairs. Multiple choice has a pair per choice, a minimal pair two, with an
// empty context and the good sentence first; a continuation one.
struct TaskItem {
  struct Pair {
    std::string context, continuation;
    std::int64_t characters = 0;  // Unicode characters of the choice as written in the file: what acc_norm divides by
  };
  std::vector<Pair> pairs;
  std::int64_t gold = 0;
};

struct Task {
  std::string name;  // file name without extension
  TaskKind kind = TaskKind::kMultipleChoice;
  std::vector<TaskItem> items;
};

// One JSON object a line; blank lines are skipped; every line has the kind of the first:
//   {"query", "choices": [..], "gold": index}                 multiple choice; a blank goes before each choice that has
//   none
//   {"sentence" with "_", "option1", "option2", "label": 0|1} multiple choice over contexts (WinoGrande)
//   {"context", "continuation"}                               continuation (LAMBADA); a blank goes before it
//   {"sentence_good", "sentence_bad"}                         minimal pair (BLiMP), sentences as they stand
// Other keys are ignored. limit > 0: only the first items. Errors: exit 3 with file and line; an empty file: exit 3.
Task read_task(const fs::path& jsonl, std::int64_t limit = 0);

struct TaskOptions {
  std::int64_t context = 0;                 // most ids a model sees at once; longer contexts lose their beginning
  std::vector<std::int32_t>
      prefix_ids;  // what stands in for an empty context: BOS, or the end-of-text id; may be empty
  std::int64_t rows_per_block = 0;          // 0: chosen so that a block of logits is about 16 MiB
};

struct TaskResult {
  std::string name;
  TaskKind kind = TaskKind::kMultipleChoice;
  std::int64_t items = 0;
  Estimate accuracy;                        // continuation: every token is the greedy choice
  std::optional<Estimate> accuracy_norm;    // multiple choice: argmax of log-probability / characters
  std::optional<Estimate> perplexity;       // continuation: exp(-mean log-probability of the whole continuation)
  std::vector<std::int64_t> picks;          // per item: index chosen (continuation: 1 greedy, 0 not); ties: the first
  std::optional<Estimate> agreement;        // share of items with the picks of another model
};

// Errors: exit 3 when a continuation is empty or longer than the context, exit 1 for NaN logits.
TaskResult score_task(LogitsSource& model, const Tokenizer& tokenizer, const Task& task, const TaskOptions& options,
                      Progress& progress);

// Fills result.agreement from the picks of the same task under another model.
void set_agreement(TaskResult& result, const TaskResult& original);

void add_rows(const TaskResult& result, const TaskResult* original, const std::string& stage, Report& report);
Json to_json(const TaskResult& result);

}  // namespace pare

// Multiple choice, last-word prediction, minimal pairs and running text from jsonl files, scored by the rules of
// lm-evaluation-harness 0.4.13 (api/task.py, api/model.py and utils.py there), on the same ids.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/context.h"
#include "core/tokenizer.h"
#include "eval/logits_source.h"
#include "eval/statistics.h"

namespace pare {

enum class TaskKind { kMultipleChoice, kContinuation, kMinimalPair, kText };

// One question as (context, continuation) pairs. Multiple choice has a pair per choice, a minimal pair two, with an
// empty context and the good sentence first; a continuation one, and a text one, with an empty context.
struct TaskItem {
  struct Pair {
    std::string context, continuation;
    // Of the choice as written in the file (of a WinoGrande, the context with its option): what acc_norm and acc_bytes
    // divide by. Words: white space and one.
    std::int64_t characters = 0, bytes = 0, words = 0;
  };
  std::vector<Pair> pairs;
  std::int64_t gold = 0;
};

struct Task {
  std::string name;  // file name without extension
  TaskKind kind = TaskKind::kMultipleChoice;
  std::vector<TaskItem> items;
  fs::path file;
  std::int64_t items_in_file = 0;  // without a limit
};

// One JSON object a line; blank lines are skipped; every line has the kind of the first:
//   {"query", "choices": [..], "gold": index}                 multiple choice; a blank goes before each choice
//   {"sentence" with "_", "option1", "option2", "label": 0|1} multiple choice over contexts (WinoGrande)
//   {"context", "continuation"}                               continuation (LAMBADA); a blank goes before it where it
//                                                             has none
//   {"sentence_good", "sentence_bad"}                         minimal pair (BLiMP); a blank goes before each
//   {"text"}                                                  text, scored to its end in windows
// Other keys are ignored. limit > 0: only the first items. Errors: exit 3 with file and line; an empty file: exit 3.
Task read_task(const fs::path& jsonl, std::int64_t limit = 0);

struct TaskOptions {
  std::int64_t context = 0;                 // most ids a model sees at once; longer contexts lose their beginning
  // What stands in for an empty context: BOS, or the end-of-text id; may be empty, but not for a text.
  std::vector<std::int32_t> prefix_ids;
  std::int64_t rows_per_block = 0;          // 0: chosen so that a block of logits is about 16 MiB
};

struct TaskResult {
  std::string name;
  TaskKind kind = TaskKind::kMultipleChoice;
  std::int64_t items = 0;
  fs::path file;                            // of the task, and all items in it
  std::int64_t items_in_file = 0;
  std::optional<Estimate> accuracy;         // continuation: every token is the greedy choice; not of a text
  std::optional<Estimate> accuracy_norm;    // multiple choice: argmax of log-probability / characters
  std::optional<Estimate> accuracy_bytes;   // multiple choice: argmax of log-probability / bytes
  std::optional<Estimate> perplexity;       // continuation: exp(-mean log-probability of the whole continuation)
  std::optional<double> word_perplexity, byte_perplexity, bits_per_byte;  // text, of all items together
  std::vector<std::int64_t> picks;          // per item: index chosen (continuation: 1 greedy, 0 not); ties: the first;
                                            // none of a text
  std::optional<Estimate> agreement;        // share of items with the picks of another model
};

// Errors: exit 3 when a continuation is empty or longer than the context, exit 1 for NaN logits.
TaskResult score_task(LogitsSource& model, const Tokenizer& tokenizer, const Task& task, const TaskOptions& options,
                      Progress& progress);

// Calls see(name, value, unit) for everything a result may say, in the order of reports; what it does not say is
// nullopt.
void each_metric(const TaskResult& result,
                 const std::function<void(const char* name, const std::optional<Estimate>&, const char* unit)>& see);

// Fills result.agreement from the picks of the same task under another model.
void set_agreement(TaskResult& result, const TaskResult& original);

void add_rows(const TaskResult& result, const TaskResult* original, const std::string& stage, Report& report);
Json to_json(const TaskResult& result);

}  // namespace pare

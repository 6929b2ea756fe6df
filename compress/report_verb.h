// `pare report`: curves and tables of any run, as one page.
#pragma once

#include <string>

#include "core/file.h"
#include "core/options.h"

namespace pare {

// What lies in `run`, a folder (its own files and those of folders inside, three levels deep) or one file: curves of
// train.jsonl, rows of every JSON file that holds some (report.json, what `--json` printed, what `pare eval --output`
// wrote in either form), settings of prune.json and quantize.json. The same files give the same bytes.
// Errors: exit 3 with file and line for what cannot be read, and where there is nothing to show.
std::string run_page(const fs::path& run);

Command report_command();

}  // namespace pare

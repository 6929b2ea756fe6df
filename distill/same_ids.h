// Do teacher and student mean the same by an id?
#pragma once

#include "core/file.h"
#include "core/tokenizer.h"

namespace pare {

// The student's tokenizer, which gives every id the teacher's meaning: the same file, or the same piece at every id
// that both have and the same ids for a set of probing texts. Errors: exit 3 naming the first difference.
Tokenizer shared_tokenizer(const fs::path& teacher_folder, const fs::path& student_folder);

// Rows of the output head that both have: where the vocabularies differ, the larger one's further rows are padding.
// Error: exit 3 where the tokenizer has ids beyond either.
std::int64_t shared_vocabulary(const Tokenizer& tokenizer, const fs::path& teacher_folder, std::int64_t teacher_vocab,
                               const fs::path& student_folder, std::int64_t student_vocab);

}  // namespace pare

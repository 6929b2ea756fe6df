// What errors in the columns of a matrix cost: the mean squares of its inputs, as llama-imatrix writes them.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "core/file.h"

namespace pare {

class Importances {
 public:
  // A GGUF file of llama-imatrix: of every matrix "<name>.in_sum2", F32 [parts, columns], and "<name>.counts", F32
  // [parts, 1]; an expert is a part. Errors: exit 3 for another file, for sums or counts that are missing, of other
  // shapes, negative or not finite.
  static Importances read(const fs::path& path);

  // Whether the file has the GGUF tensor `name`. Errors: exit 3 where its sizes are others than those of the matrix.
  bool has(const std::string& name, std::int64_t parts, std::int64_t columns) const;
  // [columns] of one part; null: the file has not the tensor, or that part never had an input.
  const float* of(const std::string& name, std::int64_t part, std::int64_t columns) const;

 private:
  struct Matrix {
    std::int64_t parts = 0, columns = 0;
    std::vector<float> means;
    std::vector<bool> seen;  // of the parts
  };
  std::string place_;
  std::map<std::string, Matrix> matrices_;
};

}  // namespace pare

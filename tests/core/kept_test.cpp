// Files of every past format version stay readable: tests/kept holds one for each codec family, and their unpacked
// weights are the bytes that were written then.
#include <gtest/gtest.h>

#include <cstdlib>
#include <vector>

#include "core/compact.h"

namespace pare {
namespace {

struct Kept {
  const char* file;
  const char* weights;  // XXH3-128 of all quantized tensors, unpacked to float32, in file order
};

class KeptFile : public testing::TestWithParam<Kept> {};

TEST_P(KeptFile, OpensVerifiesAndUnpacksToTheBytesOfThen) {
  const CompactFile file(fs::path(PARE_SOURCE_DIR) / "tests/kept" / GetParam().file);
  EXPECT_EQ(file.version(), 1);
  EXPECT_TRUE(file.verify().empty());
  EXPECT_TRUE(file.embedded("tokenizer.json").has_value());
  Hasher weights;
  int quantized = 0;
  for (const CompactTensor& tensor : file.tensors()) {
    if (tensor.codec.is_float()) continue;
    const QuantizedTensor codes =
        unpack_payload(tensor.codec, tensor.shape[0], tensor.shape[1], tensor.payload, tensor.name);
    std::vector<float> values(static_cast<std::size_t>(codes.rows * codes.cols));
    codes.unpack(values.data());
    weights.update(std::as_bytes(std::span(values)));
    ++quantized;
  }
  EXPECT_EQ(quantized, 8);
  EXPECT_EQ(weights.hex(), GetParam().weights);
}

INSTANTIATE_TEST_SUITE_P(Version1, KeptFile,
                         testing::Values(Kept{"version1_q4.pare", "a7a5d1617f662bad52166770f35421b0"},
                                         Kept{"version1_q4a.pare", "1dc1b1bfc3b0c6d55328542d872699b2"},
                                         Kept{"version1_q4m.pare", "389b7d50501be626d265f8ecf2534fdf"},
                                         Kept{"version1_q8.pare", "ab4d83aa232c9023e144d8ac01385e36"},
                                         Kept{"version1_q3.pare", "0fbec6cc74e83fca54a01a589d79e462"},
                                         Kept{"version1_q2.pare", "b5325a74cf5258fd708de928abeceb35"},
                                         Kept{"version1_w8a8.pare", "63d442490b201da628c85ce71bd50eef"}),
                         [](const auto& given) { return fs::path(given.param.file).stem().string(); });

}  // namespace
}  // namespace pare

// What the machine's processor calls itself.
#pragma once

#include <string>

namespace pare {

std::string processor_name();  // "unknown" where the system does not say

}  // namespace pare

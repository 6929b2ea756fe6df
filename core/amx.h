// Matrix tiles of x86 processors (AMX).
#pragma once

namespace pare {

// The processor has tiles for bytes or for bfloat16, and the system knows them.
bool has_amx_int8();
bool has_amx_bf16();

// Lets this process keep the state of the tiles. For good, and every signal stack has to hold it from then on, so only
// where they are used.
bool permit_amx();

}  // namespace pare

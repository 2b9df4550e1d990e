// What the compiler's own question for features does not answer: whether AMX tiles may be used.
#pragma once

namespace mixtral {

// Whether this processor has tiles of int8 and bfloat16 and the system lets this process use them, which is asked for at
// the first call. In a build with MIXTRAL_EMULATE_AMX they are emulated on processors that have none.
bool has_amx();

}  // namespace mixtral

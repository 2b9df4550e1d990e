// AMX instructions on processors that have none, for the tests of kernels.
#pragma once

namespace mixtral::amx {

// From now on a tile instruction, which such a processor takes for a fault (SIGILL), is executed by a signal handler. What
// Intel's manual calls a fault, such as a shape that does not fit, ends the process with a message. Other faults go to
// whoever handled them before. Every call puts the handler back in front.
void emulate();

}  // namespace mixtral::amx

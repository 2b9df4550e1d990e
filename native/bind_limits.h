// What bind_limits.cpp adds to the Python module.
#pragma once

#include <nanobind/nanobind.h>

void bind_limits(nanobind::module_& module);

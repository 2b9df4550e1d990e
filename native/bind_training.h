// What bind_training.cpp adds to the Python module.
#pragma once

#include <nanobind/nanobind.h>

void bind_training(nanobind::module_& module);

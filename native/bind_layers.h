// What bind_layers.cpp adds to the Python module.
#pragma once

#include <nanobind/nanobind.h>

void bind_layers(nanobind::module_& module);

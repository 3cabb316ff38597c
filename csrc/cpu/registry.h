// The built-in instruction sets: named, listable, forcible.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernel_table.h"

namespace fastattn {

// The tables that are built in and that this machine can run, best first.
const std::vector<const KernelTable*>& supported_kernels();

// Chooses the table for all later calls: "" takes the best. Throws std::invalid_argument, naming what could be chosen,
// and keeps the earlier choice.
void select_kernels(const std::string& name);

// The chosen table.
const KernelTable& kernels();

// Whether a dot product of bf16 pairs is as fast as an FMA here, and so twice as much work.
bool has_fast_bf16_dot();

}  // namespace fastattn

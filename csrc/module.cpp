// The Python module logquant._C: what was built and what this machine runs. Importing it registers the operators.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "format.h"

#ifndef LOGQUANT_CUDA_ARCHITECTURES
#define LOGQUANT_CUDA_ARCHITECTURES ""  // built without CUDA
#endif

namespace py = pybind11;
namespace cpu = logquant::cpu;

namespace {

std::vector<std::string> names(const std::vector<const cpu::Kernels*>& sets) {
  std::vector<std::string> out;
  for (const cpu::Kernels* set : sets) out.emplace_back(set->name);
  return out;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, ',');) parts.push_back(part);
  return parts;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled operators of logquant; see logquant.ops.";
  m.attr("__version__") = LOGQUANT_VERSION;
  m.attr("format_version") = logquant::kFormatVersion;
  m.attr("compiler") = "" __VERSION__;
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("cuda_architectures") = py::cast(split(LOGQUANT_CUDA_ARCHITECTURES));
  m.def(
      "compiled_cpu_isas", [] { return names(cpu::compiled_kernels()); },
      "Names of the CPU instruction sets that kernels were compiled for.");
  m.def(
      "available_cpu_isas", [] { return names(cpu::available_kernels()); },
      "Names of those that this machine runs; the last is in use where none is asked for.");
  m.def("cpu_isa", [] { return std::string(cpu::kernels().name); }, "Name of the one in use.");
  m.def("use_cpu_isa", &cpu::use_kernels, py::arg("name"),
        "Use another one from now on, for tests and benchmarks; the environment variable LOGQUANT_CPU_ISA chooses one "
        "for a whole run. Raises RuntimeError if this machine does not run it.");
}

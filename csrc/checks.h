// Checks of operator arguments, shared by every device: each message names the argument, what it needs and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "format.h"

// STD_TORCH_CHECK would put the file, line and function of this source before the message.
#define LOGQUANT_CHECK(condition, ...)                                                  \
  do {                                                                                  \
    if (!(condition)) throw std::runtime_error(::logquant::error_message(__VA_ARGS__)); \
  } while (false)

namespace logquant {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string error_message(const Parts&... parts) {
  std::ostringstream out;
  out << "logquant: ";
  (out << ... << parts);
  return out.str();
}

inline std::string shape_text(const int64_t* sizes, int64_t dims) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < dims; ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
  return out.str();
}

inline std::string shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return shape_text(sizes.data(), t.dim());
}

struct Named {
  const char* name;
  const Tensor* tensor;
};
struct NamedOptional {
  const char* name;
  const std::optional<Tensor>* tensor;
};

// Kernels follow the first tensor to its device; the data of others must lie there too.
inline void check_same_device(const Tensor& first, const char* first_name, std::initializer_list<Named> others,
                              std::initializer_list<NamedOptional> optional) {
  const auto check = [&](const char* name, const Tensor& t) {
    LOGQUANT_CHECK(t.is_cpu() == first.is_cpu() && t.get_device_index() == first.get_device_index(), name,
                   " must be on the device of ", first_name, ", and is not");
  };
  for (const Named& other : others) check(other.name, *other.tensor);
  for (const NamedOptional& other : optional) {
    if (*other.tensor) check(other.name, **other.tensor);
  }
}

inline bool is_kernel_dtype(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType type) {
  LOGQUANT_CHECK(t.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
                 torch::headeronly::toString(t.scalar_type()));
}

inline void check_same_dtype(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  LOGQUANT_CHECK(t.scalar_type() == other.scalar_type(), name, " must have the dtype of ", other_name, ", got ",
                 torch::headeronly::toString(t.scalar_type()), " and ",
                 torch::headeronly::toString(other.scalar_type()));
}

inline void check_leading_dims(const Tensor& t, const char* name, const Tensor& other, const char* other_name,
                               int64_t dims) {
  for (int64_t i = 0; i < dims; ++i) {
    LOGQUANT_CHECK(t.size(i) == other.size(i), name, " must have the first ", dims, " sizes of ", other_name, ", got ",
                   shape_of(t), " and ", shape_of(other));
  }
}

// [batch, heads, tokens, channels] in one of the kernels' dtypes.
inline void check_tokens(const Tensor& t, const char* name, int64_t channels) {
  LOGQUANT_CHECK(t.dim() == 4 && t.size(3) == channels, name, " must have shape [batch, heads, tokens, ", channels,
                 "], got ", shape_of(t));
  LOGQUANT_CHECK(is_kernel_dtype(t.scalar_type()), name, " must be float32, float16 or bfloat16, got ",
                 torch::headeronly::toString(t.scalar_type()));
}

inline void check_pages(const Tensor& t, const PageFormat& format, int64_t dims) {
  LOGQUANT_CHECK(t.dim() == dims && t.size(dims - 1) == format.words(), "pages must have shape ",
                 dims == 4 ? "[batch, heads, pages, " : "[blocks, heads, ", format.words(), "], got ", shape_of(t));
  check_dtype(t, "pages", ScalarType::Int);
}

inline void check_shape(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == shape.begin()[i];
  LOGQUANT_CHECK(same, name, " must have shape ", shape_text(shape.begin(), shape.size()), ", got ", shape_of(t));
  check_dtype(t, name, type);
}

// As check_shape, but every dimension but the last may have size 1 and then stands for all.
inline void check_broadcast(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  const auto dims = static_cast<int64_t>(shape.size());
  bool same = t.dim() == dims;
  for (int64_t i = 0; same && i < dims; ++i) {
    same = t.size(i) == shape.begin()[i] || (i + 1 < dims && t.size(i) == 1);
  }
  LOGQUANT_CHECK(same, name, " must have shape ", shape_text(shape.begin(), shape.size()),
                 " (or 1 in a dimension before the last), got ", shape_of(t));
  check_dtype(t, name, type);
}

// The eleven integers of a format (format.h), from an operator call.
inline PageFormat checked_format(const std::vector<int64_t>& fields) {
  // Version 1 has no fine_values, and nothing else differs.
  const int count = !fields.empty() && fields[0] == 1 ? kFormatFields - 1 : kFormatFields;
  LOGQUANT_CHECK(fields.size() == static_cast<size_t>(count), "format must have ", count, " fields, got ",
                 fields.size());
  LOGQUANT_CHECK(fields[0] == 1 || fields[0] == kFormatVersion, "format version must be 1 or ", kFormatVersion,
                 ", got ", fields[0]);
  for (const int64_t field : fields) {
    LOGQUANT_CHECK(field >= 0 && field <= (1 << 20), "format fields must lie between 0 and 2^20, got ", field);
  }
  PageFormat format;
  int* const members[] = {&format.head_dim,         &format.value_dim,   &format.page_tokens, &format.key_bits,
                          &format.value_bits,       &format.key_columns, &format.value_group, &format.key_param_bits,
                          &format.value_param_bits, &format.fine_values};
  for (int i = 0; i < count - 1; ++i) *members[i] = static_cast<int>(fields[i + 1]);
  const char* error = format_error(format);
  LOGQUANT_CHECK(error == nullptr, error);
  return format;
}

}  // namespace logquant

// The layouts of tensor-core fragments as NVIDIA's CuTe states them, for emulated_layouts.cu to compare with ours.
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

#include "fragment_layouts.h"

namespace layouts {

using Mma = cute::MMA_Traits<cute::SM80_16x8x16_F32F16F16F32_TN>;

Position a(int lane, int element) {
  const int at = typename Mma::ALayout{}(lane, element);
  return {at % 16, at / 16};
}
Position b(int lane, int element) {
  const int at = typename Mma::BLayout{}(lane, element);
  return {at / 8, at % 8};
}
Position c(int lane, int element) {
  const int at = typename Mma::CLayout{}(lane, element);
  return {at % 16, at / 16};
}
Position ldmatrix(int lane, int element) {
  const int bit = typename cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>::DstLayout{}(lane, 16 * element);
  return {bit / 128, bit % 128 / 16};
}
Position ldmatrix_trans(int lane, int element) {
  const int bit = typename cute::Copy_Traits<cute::SM75_U16x8_LDSM_T>::DstLayout{}(lane, 16 * element);
  return {bit / 128, bit % 128 / 16};
}

}  // namespace layouts

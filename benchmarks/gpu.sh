#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command of less than ten minutes on a machine with a CUDA build of torch:
# in the order of what is worth most: subnormal operands, build, tests, attention against torch SDPA, FlashAttention and
# FlashInfer, a decode step in CUDA graphs, and compute-sanitizer.
# Results: benchmarks/results/gpu_*.json, and what was printed in gpu.log beside them.
#
#   benchmarks/gpu.sh             needs a GPU, nvcc, and a Python with a CUDA build of torch ($PYTHON, or python3); no
#                                 network where that Python has what $needs names
#   benchmarks/gpu.sh --emulate   the same script on tiny shapes without a GPU: kernels on the emulator, times of the CPU
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results}
emulate=false
case "${1:-}" in
  --emulate) emulate=true ;;
  "") ;;
  *) echo "usage: $0 [--emulate]" >&2; exit 2 ;;
esac
mkdir -p "$results" build
results=$(cd "$results" && pwd)
failed=()
needs="numpy ninja pybind11 setuptools pytest hypothesis typer rich"
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
# A step that fails does not keep the others from telling what they can; the script fails at its end.
try() {
  local name=$1
  shift
  "$@" || { echo "FAILED: $name"; failed+=("$name"); }
}
bench() {
  local name=$1
  shift
  try "bench $name" "$python" -m logquant bench attend --device "$device" --json "$results/gpu_$name.json" "$@"
}

main() {
  if $emulate; then
    device=cpu
    backend=emulated
    contexts=600
    rounds=3
  else
    device=cuda
    backend=cuda
    contexts=2048,8192,32768,131072
    rounds=20
    TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    export TORCH_CUDA_ARCH_LIST LOGQUANT_CUDA=1
  fi

  step "do tensor cores keep fp16 subnormals?"
  if $emulate; then
    try subnormals "$python" -m tests.helpers.emulated subnormals
  else
    try subnormals nvcc -std=c++20 -arch=native csrc/tests/subnormals.cu -o build/subnormals
    try subnormals build/subnormals
  fi

  step "build"
  if ! $emulate; then
    "$python" -c "import ${needs// /, }" || "$python" -m pip install --quiet $needs
    "$python" setup.py --quiet build_ext --inplace > build/gpu_build.log || { tail -20 build/gpu_build.log; exit 1; }
  fi
  "$python" -m logquant info --json "$results/gpu_info.json"

  step "tests on the $backend backend"
  if $emulate; then
    try tests "$python" -m pytest -q -p no:cacheprovider tests/ops/test_ops.py -k "$backend and (evict or extreme)"
  else
    tests="tests/ops/test_ops.py tests/ops/test_choose_leaving.py"
    try tests env LOGQUANT_HYPOTHESIS=brief "$python" -m pytest -q -p no:cacheprovider $tests -k "$backend"
  fi

  step "attention"
  # Larger batches of the longest contexts would not leave room for what the fused operator is compared with.
  bench gqa4 --heads 32 --kv-heads 8 --context "$contexts" --batch 1 --rounds "$rounds"
  if ! $emulate; then
    bench gqa4_batch8 --heads 32 --kv-heads 8 --context 2048,8192,32768 --batch 8 --rounds "$rounds"
    bench gqa4_batch64 --heads 32 --kv-heads 8 --context 2048,8192 --batch 64 --rounds "$rounds"
  fi
  bench gqa8 --heads 64 --kv-heads 8 --context "$contexts" --batch 1 --rounds "$rounds"
  bench mha --heads 32 --kv-heads 32 --context "${contexts%,131072}" --batch 1 --rounds "$rounds"
  bench dim64 --heads 32 --kv-heads 8 --dim 64 --context "$contexts" --batch 1 --rounds "$rounds"

  step "a decode step, in CUDA graphs and without"
  if $emulate; then
    try "decode step" "$python" benchmarks/decode_step.py --device cpu --tiny --layers 2 --contexts 300 --rounds 2 --steps 8 --json "$results/gpu_step.json"
  else
    try "decode step" "$python" benchmarks/decode_step.py --device cuda --json "$results/gpu_step.json"
    try "decode step, batch 8" "$python" benchmarks/decode_step.py --device cuda --batch 8 --contexts 8192 --json "$results/gpu_step_batch8.json"
  fi

  step "compute-sanitizer on a sample"
  if $emulate; then
    echo "left out: the emulated kernels run under ASan, UBSan and TSan in make sanitize"
  elif sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1); [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck; do
      try "$tool" env LOGQUANT_HYPOTHESIS=brief "$sanitizer" --tool "$tool" --error-exitcode 9 \
        "$python" -m pytest -q -x -p no:cacheprovider tests/ops/test_ops.py tests/ops/test_choose_leaving.py \
        -k "$backend and (extreme or page_table or sinks or many_tokens)"
    done
  else
    echo "left out: compute-sanitizer was not found"
  fi

  step "done"
  if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    return 1
  fi
}

main 2>&1 | tee "$results/gpu.log"

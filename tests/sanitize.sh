#!/usr/bin/env bash
# The kernels under compute-sanitizer, on a GPU: the C++ tests in their small form, and a few of the tests in Python.
# Before that, on any machine, the emulated kernels under the host compiler's checks for undefined behaviour, misaligned
# loads among them.
#
#   bash tests/sanitize.sh [folder for builds, build/sanitize by default]
#
# Exits with 77 where there is no compute-sanitizer or no GPU and all that could run has passed.
set -euo pipefail
cd "$(dirname "$0")/.."

build=${1:-build/sanitize}
failed=0

# A command's output is shown where it fails.
attempt() {
    local name=$1 status=0
    shift
    "$@" > "$build/log" 2>&1 || status=$?
    case $status in
        0)
            if grep -Eq '^[0-9]+ skipped' "$build/log"; then # pytest, and nothing has passed
                echo "skipped  $name"
            else
                echo "passed   $name"
            fi
            ;;
        77) echo "skipped  $name" ;;
        *)
            failed=1
            echo "FAILED   $name"
            cat "$build/log"
            ;;
    esac
}

mkdir -p "$build"
flags='-fsanitize=undefined -fno-sanitize-recover=all'
cmake -S . -B "$build/emulated" -DCSPD_CUDA=OFF -DCMAKE_CXX_FLAGS="$flags" > /dev/null
cmake --build "$build/emulated" --parallel 2 > "$build/log" 2>&1 || { cat "$build/log"; exit 1; }
for program in "$build"/emulated/test_*; do
    attempt "undefined behaviour: $(basename "$program")" "$program" small
done

skip() {
    echo "not run: compute-sanitizer, as there is $1"
    [ "$failed" = 0 ] || exit 1
    exit 77
}

sanitizer=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer") ||
    skip "none on PATH or in CUDA_HOME; it comes with the CUDA toolkit"
nvidia-smi -L 2> /dev/null | grep -q GPU || skip "no GPU"
command -v nvcc > /dev/null || [ -n "${CUDA_HOME:-}" ] || skip "no nvcc on PATH or in CUDA_HOME"

cmake -S . -B "$build/cuda" > /dev/null
cmake --build "$build/cuda" --parallel > "$build/log" 2>&1 || { cat "$build/log"; exit 1; }

# initcheck is left to the tests in Python: the arrays of the C++ tests are filled with NaNs, which show by themselves
# what is read too early. racecheck is about shared memory; blocks of the persistent kernel pass words through global
# memory, relaxed and whole.
check=("$sanitizer" --error-exitcode 1 --require-cuda-init no --target-processes all)
for program in "$build"/cuda/test_kernels_*; do
    case $program in *_emulated) continue ;; esac
    for tool in memcheck racecheck synccheck; do
        attempt "$tool: $(basename "$program")" "${check[@]}" --tool "$tool" "$program" small
    done
done

# Without PyTorch's caching of memory a tool sees where each tensor ends. One token runs the persistent kernel where the
# table of the fastest names it; 33 always run the layered ones.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
python=(python3 -m pytest -q -p no:cacheprovider -m gpu)
for backend in cuda triton; do
    for tool in memcheck racecheck synccheck initcheck; do
        attempt "$tool: denoise, $backend" "${check[@]}" --tool "$tool" \
            "${python[@]}" tests/kernels/test_gpu.py -k "test_denoise_agrees_with_float64 and $backend]"
        attempt "$tool: verdicts, $backend" "${check[@]}" --tool "$tool" \
            "${python[@]}" tests/kernels/test_gpu_verdict.py -k "test_verdicts_of_every_width and $backend- and dtype0-16]"
        attempt "$tool: sweeps, $backend" "${check[@]}" --tool "$tool" \
            python3 -m pytest -q -p no:cacheprovider tests/kernels/test_sweep_kernels.py \
            -k "test_sweep_by_sweep and $backend"
    done
done
exit "$failed"

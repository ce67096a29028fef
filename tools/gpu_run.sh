#!/usr/bin/env bash
# Checks and benchmarks on a GPU, in one command of nine minutes that needs no package index.
#
#     tools/gpu_run.sh OUT [WHEELS]
#
# OUT receives, as soon as they are there: run.log (what ran, and when), smoke.log (one kernel against its reference),
# check.log and check.xml (every kernel, and tests/test_gpu.py), bench.log, and results/<device>/gpu.json, which the
# benchmark writes after each case. Nothing else runs if the first kernel fails.
#
# WHEELS is a folder of wheels that go in front of the installed packages; by default `added`, where
# tools/gpu_pack.py puts them. WHEELS/triton.tar.xz, of `make warm-cache`, saves compiling. PY is the interpreter, JOBS the number
# of test processes, LIMIT the seconds after which all ends.
set -uo pipefail

[ $# -ge 1 ] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
wheels=$(realpath -m "${2:-$(dirname "$0")/../added}")
cd "$(dirname "$0")/.."
py=${PY:-python3}
limit=${LIMIT:-530}

: > "$out/run.log"
say() { echo "$SECONDS s: $*" | tee -a "$out/run.log"; }
# run NAME SECONDS COMMAND...: output into NAME.log; interrupted, so that it says what it has, after the seconds or LIMIT.
run() {
    local name=$1 left=$((limit - SECONDS > 1 ? limit - SECONDS : 1)) seconds
    seconds=$(($2 < left ? $2 : left))
    say "$name, $seconds s at most"
    # Not into a pipe, which a child that is left over would keep open.
    timeout --signal=INT --kill-after=10 "$seconds" "${@:3}" > "$out/$name.log" 2>&1
    local status=$?
    tail -n 200 "$out/$name.log"
    say "$name ended with $status"
    return "$status"
}

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for wheel in "$wheels"/*.whl; do
    [ ! -e "$wheel" ] || "$py" -m zipfile -e "$wheel" "$site" || exit  # a wheel is a zip file; pip may be missing
done
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [ -e "$wheels/triton.tar.xz" ]; then
    mkdir "$site/triton-cache"
    "$py" -m tarfile -e "$wheels/triton.tar.xz" "$site/triton-cache" || exit
    export TRITON_CACHE_DIR="$site/triton-cache"
fi

run smoke 90 "$py" -c '
import sys, torch, triton, diffusers, transformers
from diffusers_sana import SanaPipeline
from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.rms_norm import rms_norm

print(torch.cuda.get_device_name(), *(f"{m.__name__} {m.__version__}" for m in (torch, triton, diffusers, transformers)))
x, weight = torch.randn(64, 2240, device="cuda"), torch.randn(2240, device="cuda")
with kernel_mode("triton"):
    actual = rms_norm(x, weight)
with kernel_mode("torch"):
    expected = rms_norm(x, weight)
error = ((actual - expected).norm() / expected.norm()).item()
print(f"one kernel errs {error:.1e}")
sys.exit(not error < 1e-5)
' || exit

run check 150 "$py" -m pytest tests/kernels tests/test_gpu.py -n "${JOBS:-12}" --dist worksteal \
    --tb=short --no-showlocals -p no:cacheprovider --junitxml="$out/check.xml" \
    --ignore tests/kernels/test_compile_kernels.py --ignore tests/kernels/cpu/test_int8_linear.py
checked=$?

minutes=$(awk "BEGIN { print ($limit - $SECONDS - 15) / 60 }")
run bench "$limit" "$py" -m benchmarks.bench_gpu --minutes "$minutes" --results "$out/results"
benched=$?
say "the end: checks $checked, benchmark $benched"
exit $((checked || benched))

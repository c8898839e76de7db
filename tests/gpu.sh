#!/usr/bin/env bash
# What only a GPU can show, in pieces: its tests, the bench, the fast run. After the time given nothing new is begun,
# training stops, and the next call goes on, until one says "done". The box needs torch, torchvision, lightly, pytest, pandas, scikit-learn
# and seaborn, neither Jupyter nor a network, and CIFAR-10 (`python -m bagssl.cli data add cifar10 PATH`).
#
#   bash tests/gpu.sh [SECONDS, 540 by default]
#   REHEARSE=1 bash tests/gpu.sh      the same commands at tiny size, on any machine
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
seconds=${1:-540}
bench=() fast=(fast-cifar10 --profile paper)
if [ -n "${REHEARSE:-}" ]; then
    bench=(--quick --dataset synthetic) fast=(fast-run --profile smoke)
else
    "$python" -m bagssl.cli data check cifar10 || exit
fi
left() { echo "$((seconds > SECONDS ? seconds - SECONDS : 1))s"; }

# Only the files that hold such tests: others need what is not on the box.
timeout "$(left)" "$python" -m pytest -p no:cacheprovider -q -m gpu $(grep -l "mark\.gpu" tests/test_*.py); tests=$?
"$python" -m bagssl.cli bench "${bench[@]}" --time-limit "$(left)" || exit
"$python" -m bagssl.cli reproduce "${fast[@]}" --bare --time-limit "$(left)" || exit
echo "done; the tests ended with $tests"
exit "$tests"

#!/usr/bin/env bash
# What only a GPU can show, in pieces: its tests, the bench, the fast run. Each call ends within the time given and
# the next one goes on, until it says "done". The box needs torch, torchvision, lightly, pytest, pandas, scikit-learn
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

"$python" -m pytest -p no:cacheprovider -q -m gpu tests; tests=$?
"$python" -m bagssl.cli bench "${bench[@]}" --time-limit "$(left)" || exit
"$python" -m bagssl.cli reproduce "${fast[@]}" --bare --time-limit "$(left)" || exit
echo "done; the tests ended with $tests"
exit "$tests"

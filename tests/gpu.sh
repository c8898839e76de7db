#!/usr/bin/env bash
# What only a GPU can show, on a box that is gone afterwards: the tests that need one (a minute at most); the models and
# measurements of the paper profile, the most wanted first, none begun that cannot end; packs of what is new, to be
# taken along; the bench in what time is left. Called again, or on the next box with the packs in the same folder, it
# goes on; when nothing is left to do it says "done". The box needs torch, torchvision, lightly, pytest, pandas,
# scikit-learn and seaborn, neither Jupyter nor a network, and CIFAR-10 (`python -m bagssl.cli data add cifar10 PATH`).
#
#   bash tests/gpu.sh [SECONDS, 540 by default] [FOLDER of the packs, results/packs by default]
#   REHEARSE=1 bash tests/gpu.sh      the same at tiny size, on any machine; PACE=crops a second, so that time runs out
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
seconds=${1:-540} packs=${2:-${BAGSSL_RESULTS:-results}/packs}
reserve=20  # seconds to pack what is new
profile=paper bench=()
if [ -n "${REHEARSE:-}" ]; then
    profile=smoke bench=(--quick --dataset synthetic coding-rate probes)
    export BAGSSL_PACE=${PACE:-1000}
else
    "$python" -m bagssl.cli data check cifar10 || exit
fi
left() { echo $((seconds - reserve > SECONDS ? seconds - reserve - SECONDS : 1)); }
at_most() { [ "$1" -lt "$2" ] && echo "$1" || echo "$2"; }

mkdir -p "$packs"
runs=${BAGSSL_RUNS:-${BAGSSL_RESULTS:-results}/runs}
export BAGSSL_RECORD=${BAGSSL_RECORD-}  # what a record has without weights is trained here: that is what the box is for
if compgen -G "$packs/*.bagssl" >/dev/null; then
    "$python" -m bagssl.cli runs import "$packs" || exit
    cp "$packs/whole.json" "$runs/" 2>/dev/null  # which entries are done
fi
# Only the files that hold such tests: others need what is not on the box.
timeout "$(at_most 60 "$(left)")" "$python" -m pytest -p no:cacheprovider -q -m gpu $(grep -l "mark\.gpu" tests/test_*.py)
tests=$?
"$python" -m bagssl.cli reproduce --profile "$profile" --bare --whole --time-limit "$(left)s"
results=$?
"$python" -m bagssl.cli runs export "$packs" --new || exit
cp "$runs/whole.json" "$packs/" 2>/dev/null
timeout --signal=INT "$(left)" "$python" -m bagssl.cli bench "${bench[@]}" --time-limit "$(left)s"
bench=$?
echo "tests: $tests, results: $results, bench: $bench (0: done, 3: not all of it fitted, 124: cut off)"
[ "$results$bench" = 00 ] && echo "done"
exit "$results"

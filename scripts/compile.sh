#!/bin/sh
# Compile the pure core and the simulated cluster with mypyc: the same sources, about twice as fast.
# What travels to worker processes (sliders, SLO, policy, tallies) stays as it is: compiled classes cannot be pickled.
# usage: scripts/compile.sh [FOLDER]   then PYTHONPATH=FOLDER taichi search ...   (default build/compiled)
set -eu
python=${PYTHON:-python}
out=${1:-build/compiled}
rm -rf "$out"
mkdir -p "$out"
cp -r src/taichi_serve "$out/"
cd "$out"
latency=taichi_serve/latency
"$python" -m mypyc --no-incremental \
    taichi_serve/messages.py taichi_serve/request.py taichi_serve/instance.py \
    $latency/curve.py $latency/model.py $latency/predict.py $latency/profiled.py \
    $(ls taichi_serve/scheduling/*.py | grep -vE '(policy|fleet|narrow|matched).py') taichi_serve/cluster/simulated/*.py

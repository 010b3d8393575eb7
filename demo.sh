#!/usr/bin/env bash
# Installs the project into .venv, trains the tiny model on videos it makes, samples and scores it.
#   bash demo.sh [config]        config: tiny (default, two CPU cores) or small (one GPU)
#   PYTHON=python3.12 bash demo.sh        another interpreter;  EXTRA=cuda13 for a GPU
set -euo pipefail
cd "$(dirname "$0")"
config=${1:-tiny}
run=runs/$config
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv
fi
.venv/bin/python -m pip install -qq --upgrade pip
.venv/bin/python -m pip install -qq -e ".${EXTRA:+[$EXTRA]}"
.venv/bin/python train.py --config="configs/$config.py" --workdir="$run"
.venv/bin/python sample.py --config="configs/$config.py" --workdir="$run" \
  --prompts=configs/prompts_shapes.txt --out="$run/clips"
.venv/bin/python -m lact_jax.evaluate --samples="$run/clips" --out="$run/evaluation.json"
.venv/bin/python -m lact_jax.loss_ratio "$run"
echo "Look at $run/clips/index.html, $run/clips/contact_sheet.png and $run/loss.png"

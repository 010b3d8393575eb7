#!/usr/bin/env bash
# Installs the project with its test extras into a virtual environment and runs the tests.
#   bash test.sh [pytest arguments]
#   PYTHON=python3.12 VENV=.venv-test312 PARITY= bash test.sh     without the PyTorch peers
set -euo pipefail
cd "$(dirname "$0")"
venv=${VENV:-.venv-test}
extras=dev${PARITY-,parity}
if [ ! -x "$venv/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
fi
"$venv/bin/python" -m pip install -qq --upgrade pip
# The peers need any PyTorch; this one is a small CPU build where the default is a CUDA one.
if [ "$extras" != dev ] && ! "$venv/bin/python" -c "import torch" 2>/dev/null; then
  "$venv/bin/python" -m pip install --quiet "torch==${TORCH:-2.13.0}"
fi
"$venv/bin/python" -m pip install -qq -e ".[$extras]"
"$venv/bin/ruff" check .
peers=()
[ "$extras" = dev ] && peers=(--ignore-glob="*test_peer_*")
"$venv/bin/python" -m pytest -n "${WORKERS:-auto}" --maxprocesses=8 --dist=loadfile "${peers[@]}" "$@"

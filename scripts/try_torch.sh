#!/usr/bin/env bash
# Runs tests with another version of torch, or of Python: scripts/try_torch.sh WHEEL TORCH [ARGUMENTS OF PYTEST...]
#
#   pip wheel --no-deps -w dist . && scripts/try_torch.sh dist/deep_ep_py-*.whl 2.14.1
#   PYTHON=python3.12 scripts/try_torch.sh dist/deep_ep_py-*cp312*.whl 2.13.0 tests/test_conformance_v2.py
#
# WHEEL and torch==TORCH are installed into a new environment; the tests run there in a copy of the tree without
# deep_ep_py/. Without arguments those that depend on torch most: operators, autograd, the compiler, the layer, streams
# and processes. torch as PyPI has it takes 5.5 GB for a version with CUDA. All is written to a temporary folder
# (TMPDIR), which is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
wheel=$(realpath "$1") torch=$2
shift 2
if [ $# -eq 0 ]; then
  set -- -n 2 --dist loadfile tests/test_{autograd,autograd_compile,autograd_order,autograd_refused,autograd_steps,conformance_v1,conformance_v2,devices,events,lifetimes,nn_experts,nn_moe,nn_router,nn_wrappers,collective_processes,examples,train_example}.py
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==$torch" "$wheel[test]"
tar -cf - --exclude=deep_ep_py --exclude=build --exclude=.git --exclude=.venv . | tar -xf - -C "$work"
"$work/venv/bin/python" -c 'import sys, torch; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")'
cd "$work" && PATH=$work/venv/bin:$PATH pytest -q "$@"

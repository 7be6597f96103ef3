#!/usr/bin/env bash
# Everything CI checks: lint, format, types, tests. Run by `make test`; arguments are pytest's.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .

# Static checkers cannot see through an editable install; these links give them the namespace (never imported at run time).
mkdir -p build/types/rung
for package in kernels data model pretrain finetune analysis launch; do
  ln -sfn "../../../$package" "build/types/rung/$package"
done
mypy

# Two halves at once: tests that start ranks mostly wait for processes, the others mostly compute.
tests() {
  local status=0
  python -m pytest -q -m "slow or not slow" --durations=10 "$@" || status=$?
  [ $status -eq 5 ] || return $status # 5: the arguments select none of this half
}
set -m # else a process in the background would ignore the Ctrl-C that some tests send
tests tests/launch tests/pretrain "$@" >build/ranks.log 2>&1 &
ranks=$!
trap 'kill -INT -- -$ranks 2>/dev/null || true' EXIT
status=0
# One thread: two, beside the ranks' processes, would mostly wait for each other.
OMP_NUM_THREADS=1 tests --ignore=tests/launch --ignore=tests/pretrain "$@" || status=$?
wait $ranks || status=$?
cat build/ranks.log
exit $status

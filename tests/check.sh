#!/usr/bin/env bash
# Everything CI checks: lint, format, types, tests. Run by `make test`.
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

python -m pytest -q -m "slow or not slow" --durations=10 "$@"

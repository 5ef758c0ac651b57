#!/usr/bin/env bash
# README, guides and the API reference as a site, in out/docs/<version>. A warning, such as a link that
# leads nowhere or an argument that a docstring names wrongly, is an error.
#
# Docstrings are read, not imported: .venv-docs has neither torch nor Megatron.
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for python in $MCORE_PACKING_PYTHON python3 python3.13 python3.12 python3.11 ""; do
    "$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && break
done
[ -n "$python" ] || { echo "docs.sh: there is no Python of 3.11 or newer" >&2; exit 2; }
stamp=$(cat scripts/constraints.txt scripts/docs.sh | cksum)
if [ "$(cat .venv-docs/stamp 2>/dev/null)" != "$stamp" ]; then
    mkdir -p out
    {
        "$python" -m venv --clear .venv-docs && .venv-docs/bin/python -m pip install -q \
            --disable-pip-version-check -c scripts/constraints.txt mkdocs mkdocstrings-python ruff
    } >out/docs.log 2>&1 || { echo "docs.sh: pip could not fill .venv-docs: see out/docs.log" >&2; exit 2; }
    echo "$stamp" >.venv-docs/stamp
fi
# Not --quiet: what that hides is not counted either.
.venv-docs/bin/python -m mkdocs build --strict 2>&1 | sed "/^INFO /d"
echo "wrote $(ls -t out/docs/*/index.html | head -1)"

# The other scripts source this file in the root folder of the repository. It makes sure that there
# is a virtual environment with the packages of requirements.txt: the active one, or else .venv,
# which is created if needed. PYTHON names the interpreter for it (3.11 or newer; default: python3).
set -euo pipefail
if [ -z "${VIRTUAL_ENV:-}" ]; then
    PYTHON=${PYTHON:-python3}
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $PYTHON is older than Python 3.11; set PYTHON" >&2; exit 2; }
    [ -d .venv ] || "$PYTHON" -m venv .venv
    source .venv/bin/activate
fi
if ! python -c 'import torch, transformers, datasets, sympy, matplotlib, pytest, xdist, hypothesis, nbclient, ipykernel, ruff' 2>/dev/null; then
    # On Linux, PyPI's torch is the CUDA build of several GB. Without a GPU, use the CPU build if
    # its index can be reached.
    if [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        pip install -q --retries 0 torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu 2>/dev/null || pip install -q torch==2.13.0
    fi
    pip install -q -r requirements.txt
fi

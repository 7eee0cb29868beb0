#!/usr/bin/env bash
# The papers' claims about PRIME, tried again on the built-in world with five seeds. Without its last
# additions it took 96 minutes on two cores that did other things as well.
#     bash runs/claims.sh
#     bash runs/claims.sh --quick            # three seeds and the main claims
#
# If it is interrupted, the same command goes on. Writes claims.md, claims.json and claims.png to
# out/claims. To start over:
#     rm -r out/claims
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

python bench/claims.py "$@"

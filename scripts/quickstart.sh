#!/usr/bin/env bash
# Sets up and runs the main job on real text: dense -> record -> masks -> pruned -> BLEU -> report.
# Full size where there is a GPU; else a small model, in at most eight minutes on two CPU cores. A second run skips what
# is done. Options are those of examples/libreoffice_help/run.sh.
set -euo pipefail
extras=""
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec bash "$root/examples/libreoffice_help/run.sh" "$@"

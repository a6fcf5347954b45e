#!/usr/bin/env bash
# Sets up and runs the main job on real text: dense -> record -> masks -> pruned -> BLEU -> report.
# Full size where there is a GPU; a small model otherwise. A second run skips what is done.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec bash "$root/examples/libreoffice_help/run.sh" "$@"

#!/usr/bin/env bash
# Builds the LibreOffice-help corpus of a language pair, down to fairseq's data-bin folders.
#
#   examples/libreoffice_help/prepare.sh [SRC TGT] [--out DIR] [--bpe-size N] [--page-tokens N] [--deb-dir DIR] ...
#
# Default: en de into examples/libreoffice_help/data/en-de. `prepare.sh --help` lists all options.
# Runs in the active Python environment, the one in which ap-fairseq is installed. Finished steps are not repeated.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if ! command -v python3 >/dev/null; then
    echo "prepare.sh: error: no python3 on PATH; activate the environment in which ap-fairseq is installed" >&2
    exit 1
fi
exec python3 "$here/prepare.py" "$@"

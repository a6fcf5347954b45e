#!/usr/bin/env bash
# Builds the data, down to fairseq's data-bin folders; `prepare.sh --help` lists the options. Finished steps are skipped.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/python.sh"
exec python3 "$here/sections.py" "$@"

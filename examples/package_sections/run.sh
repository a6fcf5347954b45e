#!/usr/bin/env bash
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/python.sh"
exec python3 "$here/run.py" "$@"

#!/usr/bin/env bash
exec bash "$(dirname "${BASH_SOURCE[0]}")/../common/recipe.sh" "$(dirname "${BASH_SOURCE[0]}")" run "$@"

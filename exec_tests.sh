#!/bin/sh
# Runs the tests; arguments go to pytest: sh exec_tests.sh -m "not slow".
cd "$(dirname "$0")" || exit 1
requirements="requirements.txt requirements-dev.txt requirements-chat.txt"
. ./exec_setup.sh

exec "$PYTHON" -m pytest \
    "$@"

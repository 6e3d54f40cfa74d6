#!/usr/bin/env bash
# The whole of the teacher's training, one process at a time; every stage resumes, so a stopped chain is simply
# started again. Leave it running: setsid nohup nice -n 10 bash examples/mini_world/train_all.sh >chain.txt 2>&1 &
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # spinning threads starve beside any other busy process
work="${ECHODISTILL_WORK:-$HOME/.cache/echodistill/mini-world}"
nouns="${NOUNS:-12}"
minutes="${TEACHER_MINUTES:-600}"
stage() { "${PYTHON:-.venv/bin/python}" -m examples.mini_world.train "$@" --work "$work" --nouns "$nouns"; }

if [ ! -e "$work/vae/finished" ]; then
    stage vae --minutes "${VAE_MINUTES:-16}"
    stage vae --minutes "${VAE_ANNEAL_MINUTES:-12}" --anneal
    touch "$work/vae/finished" # from here on the VAE is never trained again: the latents belong to it
fi
if [ ! -e "$work/latents-$nouns/finished" ]; then
    stage latents --shards "${CENTRED_SHARDS:-2}" --centred
    stage latents --shards "${SCENE_SHARDS:-12}"
    touch "$work/latents-$nouns/finished"
fi
stage teacher --minutes "$minutes"

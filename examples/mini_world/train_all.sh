#!/usr/bin/env bash
# Every weight of the embedded pair and the benchmark's judge, from seeds, one process at a time. Each stage resumes, so a
# stopped chain is simply started again: setsid nohup nice -n 10 bash examples/mini_world/train_all.sh >chain.txt 2>&1 &
# About three hours on two cores; DEVICE=cuda moves it to a GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # spinning threads starve beside any other busy process
work="${ECHODISTILL_WORK:-$HOME/.cache/echodistill/mini-world}"
nouns="${NOUNS:-12}"
stage() { "${PYTHON:-.venv/bin/python}" -m examples.mini_world.train "$@" --work "$work" --nouns "$nouns"; }
network() { stage "$@" --device "${DEVICE:-cpu}"; }

# once NAME COMMAND...: a step that is done is not done again.
once() {
    local mark="$work/$1.finished"
    shift
    if [ ! -e "$mark" ]; then
        "$@"
        touch "$mark"
    fi
}

mkdir -p "$work"
# After its last session the VAE is never trained again: the latents belong to it.
[ -e "$work/vae/finished" ] && touch "$work/vae.finished" "$work/vae-anneal.finished"
once vae network vae --samples 58000
once vae-anneal network vae --samples 45000 --anneal
[ -e "$work/latents-$nouns/finished" ] && touch "$work/latents-centred.finished" "$work/latents.finished"
once latents-centred stage latents --shards "${CENTRED_SHARDS:-2}" --centred
once latents stage latents --shards "${SCENE_SHARDS:-12}"
once teacher network teacher --samples "${TEACHER_SAMPLES:-340000}"
once teacher-anneal network teacher --samples 116000 --anneal
once pairs network pairs --shards "${PAIR_SHARDS:-9}"
# One thread of a CPU with AVX-512 takes 54 samples/s in the regression and 36 once the critic joins: 63 minutes in all.
# STUDENT_START=FOLDER starts from an exported student of an earlier edition, which shortens the regression.
regression="${REGRESSION_SAMPLES:-85000}"
student() { network student --regression-samples "$regression" ${STUDENT_START:+--start "$STUDENT_START"} "$@"; }
once student student --samples "$regression" --rate 5e-4
once student-anneal student --samples "${CRITIC_SAMPLES:-78000}" --rate 3e-4 --anneal
# Then its distribution is matched to the teacher's: 12 samples/s, 90 minutes.
once student-export "${PYTHON:-.venv/bin/python}" -m examples.mini_world.export_pair "$work/regressed" --part student --work "$work"
once matched network matched --start "$work/regressed" --samples "${MATCHED_SAMPLES:-67000}" --rate 2.5e-4 --anneal
once identity network identity --samples 85000 --anneal
once backbone-vit network backbone-vit --samples 57000 --anneal
once backbone-clip network backbone-clip --samples 36000 --anneal
once judge network judge --samples 122000 --anneal

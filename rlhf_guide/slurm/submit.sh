#!/bin/bash
# Submit the run as a chain: each job starts when the one before it has ended well.
#
#   bash submit.sh --profile paper --run-dir runs/paper [--set dpo_beta=0.05]
#
# NODES (default 1) is the number of nodes of a training job, TASKS (default 8) the number of tasks
# that draw or score an iteration's answers. After a failure mend the cause and give the same command
# again: finished stages are found in the run folder and end within minutes, unfinished ones go on.
# Notebook 07 comes last: it validates the policies, for whose training nothing is left to do.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
nodes=${NODES:-1}
tasks=${TASKS:-8}
last=""

submit() {
    local after=()
    if [ -n "$last" ]; then
        after=("--dependency=afterok:$last" --kill-on-invalid-dep=yes)
    fi
    last=$(sbatch --parsable "${after[@]}" "$@")
    last=${last%%;*} # Slurm may add the cluster's name
    echo "job $last: ${*/#$here\//}"
}

notebook() {
    submit "$here/notebooks.sbatch" "${arguments[@]}" --one-of-several --only "$1"
}

train() {
    submit "--nodes=$nodes" "$here/training.sbatch" "$@" "${arguments[@]}"
}

answers() {
    submit "--array=0-$((tasks - 1))" "$here/generation.sbatch" "$@" "${arguments[@]}"
    submit "$here/collect.sbatch" "$@" "${arguments[@]}"
}

iteration() {
    answers generation --iteration "$1"
    answers annotation --iteration "$1"
    train online_stages --iteration "$1"
}

arguments=("$@")
notebook 01
train sft
notebook 02
train reward_model
notebook 03
train preference_model
notebook 04-05
train dpo
iteration 1
iteration 2
iteration 3
notebook 06-08

#!/bin/sh
# Makes .data/sft, .data/rm and .data/pref from a data set of graded or compared responses.
cd "$(dirname "$0")" || exit 1
. ./exec_setup.sh

exec "$PYTHON" load_dataset.py \
    --seed=42 \
    --data_dir=.data \
    --sft_ratio=0.1 \
    --rm_ratio=0.1 \
    --train_ratio=0.8 \
    --dataset=openbmb/UltraFeedback \
    --language=en \
    --min_score_gap=0.0 \
    --sft_responses=all \
    --max_samples=0 \
    "$@"

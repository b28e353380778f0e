#!/bin/sh
# Every stage on the bundled toy world: data, SFT, reward model, PPO and DPO, and a report on what
# they brought. Needs no network after the install. Arguments go to the report.
cd "$(dirname "$0")" || exit 1
. ./exec_setup.sh
set -e
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # matrices this small gain nothing from threads

data=.data/toyworld
model=.model/toyworld

step() {
    echo
    echo "== $*"
}

step "1/6 a world of 24 words: prompts, graded responses, and a GPT-2 of random weights"
"$PYTHON" -m toyworld \
    --out_dir=$data

step "2/6 load_dataset.py: one data set for SFT, one for the reward model, one for PPO and DPO"
"$PYTHON" load_dataset.py \
    --dataset=$data/ultrafeedback.jsonl \
    --data_dir=$data \
    --language=any \
    --sft_ratio=0.25 \
    --rm_ratio=0.25

step "3/6 run_sft.py: learn to answer at all"
"$PYTHON" run_sft.py \
    --model_id=$data/gpt2-toy \
    --data_dir=$data/sft \
    --ckpt_dir=$model/sft \
    --max_len=64 \
    --batch_size=32 \
    --num_epochs=5 \
    --learning_rate=2e-3 \
    --log_step=100

step "4/6 run_rm.py: learn to judge"
"$PYTHON" run_rm.py \
    --sft_model_path=$model/sft/best \
    --data_dir=$data/rm \
    --ckpt_dir=$model/rm \
    --max_len=64 \
    --batch_size=32 \
    --num_epochs=6 \
    --learning_rate=1e-3 \
    --log_step=100

step "5/6 run_ppo.py: write what the reward model likes, and stay near the SFT model"
"$PYTHON" run_ppo.py \
    --sft_model_path=$model/sft/best \
    --rm_model_path=$model/rm/best \
    --data_dir=$data/pref \
    --ckpt_dir=$model/ppo \
    --max_len=64 \
    --max_new_tokens=4 \
    --temperature=1 \
    --top_k=0 \
    --batch_size=256 \
    --minibatch_size=64 \
    --num_outer_epoch=3 \
    --learning_rate=5e-4 \
    --log_step=5

step "6/6 run_dpo.py: learn from the pairs themselves, without a reward model"
"$PYTHON" run_dpo.py \
    --sft_model_path=$model/sft/best \
    --data_dir=$data/pref \
    --ckpt_dir=$model/dpo \
    --max_len=64 \
    --batch_size=16 \
    --num_epochs=1 \
    --learning_rate=2e-4 \
    --beta=1 \
    --log_step=10

step "report: the truth about the models, on prompts that none of them has seen"
exec "$PYTHON" -m toyworld.report \
    --data_dir=$data/pref \
    --rm_model_path=$model/rm/best \
    --out_dir=$model \
    --model=SFT=$model/sft/best \
    --model=PPO=$model/ppo/best \
    --model=DPO=$model/dpo/best \
    "$@"

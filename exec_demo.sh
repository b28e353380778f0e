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

step "1/8 a world of 24 words: prompts, graded responses, and a GPT-2 of random weights"
"$PYTHON" -m toyworld \
    --out_dir=$data

step "2/8 load_dataset.py: one data set for SFT, one for the reward model, one for PPO and DPO"
"$PYTHON" load_dataset.py \
    --dataset=$data/ultrafeedback.jsonl \
    --data_dir=$data \
    --language=any \
    --sft_ratio=0.35 \
    --rm_ratio=0.4

step "3/8 run_sft.py: learn to answer at all"
"$PYTHON" run_sft.py \
    --model_id=$data/gpt2-toy \
    --data_dir=$data/sft \
    --ckpt_dir=$model/sft \
    --max_len=64 \
    --batch_size=32 \
    --num_epochs=6 \
    --learning_rate=2e-3 \
    --log_step=100

train_rm() {
    "$PYTHON" run_rm.py \
        --sft_model_path=$model/sft/best \
        --max_len=64 \
        --batch_size=16 \
        --num_epochs=5 \
        --learning_rate=1e-3 \
        --log_step=500 \
        "$@"
}

train_ppo() {
    "$PYTHON" run_ppo.py \
        --sft_model_path=$model/sft/best \
        --data_dir=$data/pref \
        --max_len=64 \
        --max_new_tokens=4 \
        --temperature=1 \
        --top_k=0 \
        --batch_size=256 \
        --minibatch_size=64 \
        --log_step=5 \
        "$@"
}

train_dpo() {
    "$PYTHON" run_dpo.py \
        --sft_model_path=$model/sft/best \
        --num_epochs=1 \
        --log_step=20 \
        "$@"
}

step "4/8 run_rm.py: learn to judge"
train_rm \
    --data_dir=$data/rm \
    --ckpt_dir=$model/rm

step "5/8 run_ppo.py: write what the reward model likes, and stay near the SFT model"
train_ppo \
    --rm_model_path=$model/rm/best \
    --ckpt_dir=$model/ppo \
    --num_outer_epoch=5 \
    --learning_rate=5e-4

step "6/8 run_dpo.py: learn from pairs of best and worst responses, without a reward model"
train_dpo \
    --data_dir=$data/pref \
    --ckpt_dir=$model/dpo \
    --max_len=64 \
    --batch_size=16 \
    --learning_rate=2e-4 \
    --beta=1

# beta is 2 * 0.2 here, the annotator's certainty times the weight of the KL: then DPO's optimum is
# PPO's. max_len is 10 tokens of prompt and 4 of response, so that unfinished ones are cut again.
step "7/8 run_dpo.py again, on pairs of the SFT model's own responses, judged with some doubt"
"$PYTHON" -m toyworld.pairs \
    --sft_model_path=$model/sft/best \
    --data_dir=$data/pref \
    --out_dir=$data/pairs \
    --num_pairs=20000 \
    --temperature=1.25
train_dpo \
    --data_dir=$data/pairs \
    --ckpt_dir=$model/dpo-own \
    --max_len=14 \
    --batch_size=50 \
    --learning_rate=5e-4 \
    --beta=0.4

step "8/8 the same with a careless judge, who likes long answers, and hardly any KL penalty"
"$PYTHON" -m toyworld \
    --out_dir=$data/careless \
    --annotator=length-biased
"$PYTHON" load_dataset.py \
    --dataset=$data/careless/ultrafeedback.jsonl \
    --data_dir=$data/careless \
    --language=any \
    --sft_ratio=0.35 \
    --rm_ratio=0.4
train_rm \
    --data_dir=$data/careless/rm \
    --ckpt_dir=$model/rm-careless
train_ppo \
    --rm_model_path=$model/rm-careless/best \
    --ckpt_dir=$model/ppo-careless \
    --num_outer_epoch=6 \
    --learning_rate=2e-4 \
    --beta=0.02

step "report: the truth about the models, on prompts that none of them has seen"
exec "$PYTHON" -m toyworld.report \
    --data_dir=$data/pref \
    --rm_model_path=$model/rm/best \
    --out_dir=$model \
    --model=SFT=$model/sft/best \
    --model=PPO=$model/ppo/best \
    --model=DPO=$model/dpo/best \
    --model=DPO-own=$model/dpo-own/best \
    --model=PPO-careless=$model/ppo-careless/best \
    "$@"

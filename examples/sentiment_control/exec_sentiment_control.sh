#!/bin/sh
# PPO teaches a language model to follow a control token, [negative], [neutral] or [positive].
# Without arguments: on a small grammar, with no network. --hub, as the first one: on film reviews,
# with models from the Hugging Face Hub. Other arguments go to the report.
cd "$(dirname "$0")/../.." || exit 1
. ./exec_setup.sh
set -e

here=examples/sentiment_control
name=sentiment
[ "${1:-}" != --hub ] || name=sentiment-imdb
data=.data/$name
model=.model/$name
export SENTIMENT_DIR="$model" # for reward.py: its classifier, and its log

train_ppo() {
    "$PYTHON" run_ppo.py \
        --reward_fn=$here/reward.py:score \
        --data_dir=$data/ppo \
        --ckpt_dir=$model/ppo \
        --max_len=64 \
        --min_gen_len=20 \
        --max_new_tokens=20 \
        --missing_eos_penalty=0 \
        --temperature=1 \
        --top_k=0 \
        --top_p=1 \
        --gae_lambda=0.95 \
        --beta=0.05 \
        --batch_size=256 \
        --minibatch_size=64 \
        --log_step=1 \
        --keep=1 \
        "$@"
}

if [ "$name" = sentiment-imdb ]; then
    shift
    policy=$model/policy
    "$PYTHON" -m examples.sentiment_control.hub \
        --data_dir=$data \
        --model_dir=$model
    train_ppo \
        --sft_model_path=$policy \
        --num_outer_epoch=16 \
        --learning_rate=1.4e-5
else
    policy=$model/sft/best
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # matrices this small gain nothing from threads
    "$PYTHON" -m examples.sentiment_control.offline \
        --data_dir=$data \
        --model_dir=$model
    "$PYTHON" run_sft.py \
        --model_id=$model/gpt2-remarks \
        --chat_template=$here/raw.jinja \
        --data_dir=$data/sft \
        --ckpt_dir=$model/sft \
        --max_len=28 \
        --batch_size=64 \
        --num_epochs=3 \
        --learning_rate=3e-3 \
        --log_step=50 \
        --keep=1
    train_ppo \
        --sft_model_path=$policy \
        --num_outer_epoch=5 \
        --learning_rate=7e-4
fi

exec "$PYTHON" -m examples.sentiment_control.report \
    --before=$policy \
    --ckpt_dir=$model/ppo \
    --data_dir=$data/ppo \
    "$@"

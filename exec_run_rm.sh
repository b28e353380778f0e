#!/bin/sh
# Trains a reward model on the scores in .data/rm.
cd "$(dirname "$0")" || exit 1
. ./exec_setup.sh

exec "$PYTHON" run_rm.py \
    --seed=42 \
    --data_dir=.data/rm \
    --sft_model_path=.model/sft/best \
    --ckpt_dir=.model/rm \
    --gpu_id=0 \
    --max_len=1024 \
    --min_target_len=1 \
    --batch_size=16 \
    --num_epochs=3 \
    --learning_rate=1e-5 \
    --warmup_ratio=0.0 \
    --dropout=0.0 \
    --max_reward=5.0 \
    --loss=regression \
    --margin=false \
    --center_coeff=0.0 \
    --use_peft=false \
    --lora_r=16 \
    --lora_alpha=32 \
    --lora_dropout=0.05 \
    --lora_target_modules=all-linear \
    --dtype=auto \
    --micro_batch_size=0 \
    --gradient_checkpointing=false \
    --compile=false \
    --max_gradient_norm=1.0 \
    --log_step=10 \
    --max_steps=0 \
    --max_samples=0 \
    --report_to=none \
    --resume=auto \
    --save_every=10.0 \
    --keep=0 \
    "$@"

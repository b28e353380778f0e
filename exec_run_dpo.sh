#!/bin/sh
# Trains the policy on the pairs in .data/pref, without a reward model.
cd "$(dirname "$0")" || exit 1
. ./exec_setup.sh

exec "$PYTHON" run_dpo.py \
    --seed=42 \
    --sft_model_path=.model/sft/best \
    --ckpt_dir=.model/dpo \
    --gpu_id=0 \
    --data_dir=.data/pref \
    --max_len=1024 \
    --min_gen_len=1 \
    --num_epochs=1 \
    --batch_size=16 \
    --learning_rate=1e-5 \
    --loss=dpo \
    --beta=auto \
    --label_smoothing=0.0 \
    --simpo_gamma=1.0 \
    --sft_coeff=auto \
    --use_peft=false \
    --lora_r=16 \
    --lora_alpha=32 \
    --lora_dropout=0.0 \
    --lora_target_modules=all-linear \
    --dtype=auto \
    --micro_batch_size=0 \
    --gradient_checkpointing=false \
    --compile=false \
    --max_gradient_norm=1.0 \
    --log_step=100 \
    --max_steps=0 \
    --max_samples=0 \
    --report_to=none \
    --resume=auto \
    --save_every=10.0 \
    --keep=0 \
    "$@"

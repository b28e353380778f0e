#!/bin/sh
# Trains the policy on the reward model, with PPO. --reward_fn=file.py:function replaces --rm_model_path.
cd "$(dirname "$0")" || exit 1
. ./exec_setup.sh

exec "$PYTHON" run_ppo.py \
    --seed=42 \
    --sft_model_path=.model/sft/best \
    --rm_model_path=.model/rm/best \
    --ckpt_dir=.model/ppo \
    --gpu_id=0 \
    --max_reward=5.0 \
    --data_dir=.data/pref \
    --max_len=1024 \
    --max_new_tokens=0 \
    --min_gen_len=1 \
    --do_sampling=true \
    --temperature=0.2 \
    --top_k=50 \
    --top_p=1.0 \
    --num_outer_epoch=1 \
    --num_inner_epoch=3 \
    --batch_size=16 \
    --num_responses=1 \
    --advantage=gae \
    --minibatch_size=0 \
    --learning_rate=1e-5 \
    --beta=0.2 \
    --kl_controller=fixed \
    --target_kl=6.0 \
    --max_kl_div=10.0 \
    --gae_lambda=0.9 \
    --gamma=1.0 \
    --epsilon=0.2 \
    --early_stop_kl=0.0 \
    --value_loss_coeff=0.1 \
    --value_clip=0.0 \
    --critic=separate \
    --missing_eos_penalty=1.0 \
    --normalize_reward=none \
    --eval_samples=256 \
    --use_peft=false \
    --lora_r=16 \
    --lora_alpha=32 \
    --lora_dropout=0.0 \
    --lora_target_modules=all-linear \
    --share_trunk=false \
    --dtype=auto \
    --micro_batch_size=0 \
    --gradient_checkpointing=false \
    --compile=false \
    --max_gradient_norm=1.0 \
    --log_step=1 \
    --max_steps=0 \
    --max_samples=0 \
    --report_to=none \
    --resume=auto \
    --save_every=10.0 \
    --keep=0 \
    "$@"

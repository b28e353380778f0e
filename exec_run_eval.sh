#!/bin/sh
# Compares checkpoints on the same prompts. The first one is the reference of the others.
# Models that are not there are left out.
cd "$(dirname "$0")" || exit 1
. ./exec_setup.sh

place=
if [ ! -e .model/sft/best ] && [ -e .model/toyworld/sft/best ]; then
    place=/toyworld # the demo's models, asked as they were trained, and judged by the truth too
    set -- --reward_fn=toyworld:gold_reward --temperature=1 --top_k=0 --max_new_tokens=4 --max_len=64 "$@"
fi

models=
for option in \
    --model_path=SFT=.model$place/sft/best \
    --model_path=PPO=.model$place/ppo/best \
    --model_path=DPO=.model$place/dpo/best \
    --rm_model_path=.model$place/rm/best
do
    if [ -e "${option##*=}" ]; then
        models="$models $option"
    else
        echo "exec_run_eval.sh: not there, and left out: $option" >&2
    fi
done
case "$models $*" in
    *--model_path*) ;;
    *) echo "exec_run_eval.sh: no model is left: name one, or train some by sh exec_demo.sh" >&2 ;;
esac

exec "$PYTHON" run_eval.py $models \
    --seed=42 \
    --prompts=.data$place/pref/eval.jsonl \
    --max_prompts=805 \
    --out_dir=.model$place/eval \
    --judge_timeout=60.0 \
    --judge_retries=5 \
    --judge_workers=16 \
    --gpu_id=0 \
    --dtype=auto \
    --max_len=1024 \
    --max_new_tokens=256 \
    --min_gen_len=1 \
    --do_sampling=true \
    --temperature=0.2 \
    --top_k=50 \
    --top_p=1.0 \
    "$@"

#!/bin/sh
# Talk to the models in the terminal, or with --web=true on a page in the browser.
# After the demo alone, to the demo's. Models that are not there are left out.
cd "$(dirname "$0")" || exit 1
for argument in "$@"; do
    case "$argument" in
        (--web=[Ff]* | --web=[Nn]* | --web=0) ;;
        (--web | --web=*) requirements="requirements.txt requirements-chat.txt" ;;
    esac
done
. ./exec_setup.sh

place=
if [ ! -e .model/sft/best ] && [ -e .model/toyworld/sft/best ]; then
    place=/toyworld # the demo's models, which have 64 positions
    set -- --max_len=64 "$@"
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
        echo "exec_run_chat.sh: not there, and left out: $option" >&2
    fi
done
case "$models $*" in
    *--model_path*) ;;
    *) echo "exec_run_chat.sh: no model is left: name one, or train some by sh exec_demo.sh" >&2 ;;
esac

exec "$PYTHON" run_chat.py $models \
    --web=false \
    --host=127.0.0.1 \
    --port=7860 \
    --feedback_dir=.data$place/chat \
    --temperature=0.7 \
    --top_k=50 \
    --top_p=1.0 \
    --max_new_tokens=256 \
    --max_len=1024 \
    --seed=42 \
    --gpu_id=0 \
    --dtype=auto \
    "$@"

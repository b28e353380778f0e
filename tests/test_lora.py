"""LoRA: an adapter is trained beside frozen weights, and everybody sees a whole checkpoint."""

import json
import math
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import run_dpo
import run_ppo
import run_rm
import run_sft
from rlhf.actors import critic_view
from rlhf.batches import Room
from rlhf.checkpoints import save_checkpoint, weights_fingerprint
from rlhf.disk import flaw_of
from rlhf.errors import InputError
from rlhf.experience import token_numbers
from rlhf.lora import (
    active,
    adapter_weights,
    add_adapter,
    lora_layers,
    merged_weights,
    trained_share,
)
from rlhf.models import (
    Critic,
    hidden_states,
    load_policy,
    load_reward_model,
    prepare_training,
    reward_logits,
)
from rlhf.trunk import (
    CRITIC,
    SharedRewardModel,
    recompute_as_run,
)
from tests.conftest import build_gpt2, write_jsonl
from tests.faults.world import content
from tests.test_experience import build as build_actors
from tests.test_resume import stop
from tests.test_scripts import PPO, epochs, rows, run

CPU = torch.device("cpu")
SCRIPTS = {"sft": run_sft, "rm": run_rm, "ppo": run_ppo, "dpo": run_dpo}
ADAPTER = {"r": 4, "alpha": 8, "dropout": 0.0, "targets": ["all-linear"]}
LORA = ["--use_peft", "--lora_r=4", "--lora_alpha=8"]
OPTIONS = {
    "sft": [*LORA, "--learning_rate=3e-3", "--num_epochs=2"],
    "rm": [*LORA, "--learning_rate=3e-3", "--num_epochs=2", "--batch_size=8"],
    "ppo": [*LORA, *PPO, "--learning_rate=1e-3", "--max_steps=2", "--eval_samples=4"],
    "dpo": [*LORA, "--learning_rate=1e-3", "--log_step=1"],
}
CONVERSATION = torch.arange(20)[None]


def stir(model, name="default", scale=0.1):
    """Give an adapter weights that do something; a new one does nothing."""
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for weight in adapter_weights(model, name).values():
            weight.normal_(0, scale, generator=generator)
    return model


def policy_with_adapter(tokenizer, **options):
    model = build_gpt2(tokenizer)
    torch.manual_seed(1)
    return add_adapter(model, **{**ADAPTER, **options})


@pytest.fixture(scope="module")
def lineage(tmp_path_factory, base_path, data_dir):
    """All four stages with adapters, each on the merged checkpoint of the one before."""
    root = tmp_path_factory.mktemp("lora")
    run("sft", root, data_dir, f"--model_id={base_path}", *OPTIONS["sft"])
    for stage in ("rm", "ppo", "dpo"):
        run(stage, root, data_dir, *OPTIONS[stage])
    return root


# What an adapter is


def test_a_new_adapter_changes_nothing_and_without_it_the_model_is_the_old_one(tokenizer):
    plain = build_gpt2(tokenizer)(CONVERSATION).logits
    model = policy_with_adapter(tokenizer)
    assert type(model) is type(build_gpt2(tokenizer))
    assert torch.equal(model(CONVERSATION).logits, plain)
    stir(model)
    assert not torch.allclose(model(CONVERSATION).logits, plain, atol=0.1)
    with active(model, None):
        assert torch.equal(model(CONVERSATION).logits, plain)
    assert not torch.allclose(model(CONVERSATION).logits, plain, atol=0.1)
    assert all(weight.requires_grad for weight in adapter_weights(model).values())


def test_gpt2_holds_its_weights_the_other_way_round(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of peft, which would set it right for us
        layers = lora_layers(policy_with_adapter(tokenizer)).values()
    assert layers and all(layer.fan_in_fan_out for layer in layers)


def test_adapter_is_drawn_from_the_global_seed(tokenizer):
    ours, same = (adapter_weights(policy_with_adapter(tokenizer)) for _ in range(2))
    assert all(torch.equal(ours[key], same[key]) for key in ours)
    other = adapter_weights(add_adapter(build_gpt2(tokenizer, seed=0), **ADAPTER))
    assert any(not torch.equal(ours[key], other[key]) for key in ours)


def test_only_the_adapter_is_trained(tokenizer):
    model = policy_with_adapter(tokenizer)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter_weights(model).values()}
    assert len(trained) == 2 * 2 * 4  # A and B of four linear layers in two blocks


def test_an_output_layer_of_its_own_is_frozen_and_the_head_of_a_reward_model_is_not(
    tokenizer, base_path
):
    config = build_gpt2(tokenizer).config
    config.tie_word_embeddings = False
    untied = add_adapter(GPT2LMHeadModel(config), **ADAPTER)
    assert not untied.lm_head.weight.requires_grad
    model = load_reward_model(base_path, flag="--x", device=CPU, pad_id=0)
    add_adapter(model, **ADAPTER)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 17 and "score.weight" in trained


def test_an_adapter_has_dropout_in_training_mode_alone(tokenizer):
    model = policy_with_adapter(tokenizer, dropout=0.5)
    assert not any(module.training for module in model.modules())
    stir(model)
    assert torch.equal(model(CONVERSATION).logits, model(CONVERSATION).logits)
    model.train()
    assert not torch.equal(model(CONVERSATION).logits, model(CONVERSATION).logits)


def test_targets_are_the_ends_of_names(tokenizer):
    model = policy_with_adapter(tokenizer, targets=["c_attn", "transformer.h.1.mlp.c_fc"])
    places = {key.removeprefix("base_model.model.transformer.") for key in adapter_weights(model)}
    names = ("h.0.attn.c_attn", "h.1.attn.c_attn", "h.1.mlp.c_fc")
    assert places == {f"{name}.lora_{x}.weight" for name in names for x in "AB"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_proj", "matches no linear layer; name layers of c_attn, c_fc, c_proj, or all-linear"),
        ("attn", "matches no linear layer"),
        ("", "matches no linear layer"),
        ("transformer", "matches no linear layer"),
        ("lm_head", "is the output layer"),
        ("wte", "is an embedding"),
    ],
)
def test_targets_that_cannot_be_are_told(tokenizer, target, message):
    with pytest.raises(InputError, match=f"--lora_target_modules={target}: {message}"):
        policy_with_adapter(tokenizer, targets=["c_attn", target])


def test_the_share_that_is_trained_is_told(tokenizer):
    told = trained_share(policy_with_adapter(tokenizer, r=1))
    # In each block 32 + 96, 32 + 32, 32 + 128 and 128 + 32 numbers at rank 1; of two blocks, 1024.
    whole = sum(p.numel() for p in build_gpt2(tokenizer).parameters())
    assert told == (
        f"LoRA: 1.02k of {whole / 1000:.3g}k weights are trained ({1024 / whole:.2%});"
        f" AdamW keeps 8.19 kB for them instead of {8 * whole / 1000:.3g} kB"
    )


# What a checkpoint holds


def test_layers_and_output_layers_of_another_family(tokenizer):
    """Llama's linear layers hold (out, in), and its output layer is not the embedding."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = stir(add_adapter(LlamaForCausalLM(config).eval(), **ADAPTER))
    assert len(adapter_weights(model)) == 2 * 2 * 7
    merged = LlamaForCausalLM(config).eval()
    merged.load_state_dict(merged_weights(model))
    expected = model(CONVERSATION).logits
    torch.testing.assert_close(merged(CONVERSATION).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["policy", "reward model"])
def test_a_checkpoint_is_merged_and_peft_loads_the_adapter_beside_it(
    kind, base_path, tokenizer, tmp_path
):
    torch.manual_seed(2)
    if kind == "policy":
        auto, options = AutoModelForCausalLM, {}
        model = load_policy(base_path, flag="--x", device=CPU)
    else:
        auto, options = AutoModelForSequenceClassification, {"num_labels": 1}
        model = load_reward_model(base_path, flag="--x", device=CPU, pad_id=0)
        assert model.score.weight.std() > 0
    stir(add_adapter(model, **ADAPTER))
    before = weights_fingerprint(model)
    save_checkpoint(tmp_path, "x", model=model, tokenizer=tokenizer, run={"parent": base_path})
    assert weights_fingerprint(model) == before  # saving touched nothing
    logits = model(CONVERSATION).logits
    merged = auto.from_pretrained(tmp_path / "x")
    assert "lora" not in str(merged)
    torch.testing.assert_close(merged(CONVERSATION).logits, logits, rtol=1e-5, atol=1e-5)
    base = auto.from_pretrained(base_path, pad_token_id=0, **options)
    with_adapter = PeftModel.from_pretrained(base, tmp_path / "x/adapter")
    torch.testing.assert_close(with_adapter(CONVERSATION).logits, logits, rtol=1e-5, atol=1e-5)
    facts = json.loads((tmp_path / "x/adapter/adapter_config.json").read_text())
    assert facts["base_model_name_or_path"] == base_path


def test_checksums_and_modes_cover_the_adapter(lineage):
    folder = (lineage / "rm/best").resolve()
    for file in folder.rglob("*"):
        assert file.is_dir() or file.stat().st_mode == (folder / "config.json").stat().st_mode
    assert flaw_of(folder) is None
    assert "adapter/adapter_model.safetensors" in (folder / "SHA256SUMS").read_text()


def test_a_damaged_adapter_is_told(lineage, data_dir, tmp_path):
    copy = shutil.copytree(lineage / "sft/best", tmp_path / "sft")
    with (copy / "adapter/adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"adapter/adapter_model\.safetensors has changed"):
        run("dpo", lineage, data_dir, f"--sft_model_path={copy}", ckpt_dir=tmp_path / "out")


def test_an_adapter_alone_is_refused_and_the_checkpoint_above_it_named(lineage, data_dir, tmp_path):
    path = lineage / "sft/best/adapter"
    with pytest.raises(InputError, match=f"is an adapter alone; .* such as {path.parent}"):
        run("dpo", lineage, data_dir, f"--sft_model_path={path}", ckpt_dir=tmp_path / "out")


# The four stages


def test_all_stages_run_and_only_the_adapter_moves(lineage, base_path):
    assert epochs(lineage / "sft", "eval_loss")[-1] < epochs(lineage / "sft", "eval_loss")[0]
    assert epochs(lineage / "rm", "eval_loss")[-1] < epochs(lineage / "rm", "eval_loss")[0]
    assert epochs(lineage / "dpo", "eval_loss")[-1] < 0.69
    parents = dict.fromkeys(("rm", "ppo", "dpo"), lineage / "sft/best")
    for stage, parent in {"sft": Path(base_path), **parents}.items():
        before = load_file(parent / "model.safetensors")
        after = load_file(lineage / stage / "best/model.safetensors")
        changed = {
            key for key in before.keys() & after.keys() if not torch.equal(before[key], after[key])
        }
        assert changed == {key for key in before if re.search(r"(attn|mlp)\.c_\w+\.weight", key)}


@pytest.mark.slow
def test_the_first_figures_are_those_of_the_model_without_an_adapter(lineage, data_dir, tmp_path):
    """Where an adapter starts is where full fine-tuning starts, reference included."""
    for stage in ("ppo", "dpo"):
        plain = [option for option in OPTIONS[stage] if option not in LORA]
        whole = run(stage, lineage, data_dir, *plain, "--max_steps=1", ckpt_dir=tmp_path / stage)
        ours, theirs = (
            next(row for row in rows(folder) if row.keys() & {"eval_loss", "eval_scores"})
            for folder in (lineage / stage, whole)
        )
        assert ours == theirs


def test_the_reference_is_the_policy_without_its_adapter_bit_for_bit(tokenizer):
    actors, rollout = build_actors(tokenizer)
    frozen = actors._replace(ref_policy=build_gpt2(tokenizer))
    expected = token_numbers(frozen, rollout, Room(0)).ref_logprobs
    policy = stir(add_adapter(actors.policy, **ADAPTER))
    numbers = token_numbers(actors._replace(policy=policy, ref_policy=None), rollout, Room(0))
    assert torch.equal(numbers.ref_logprobs, expected)
    assert (numbers.kl.abs() > 0.1).any()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_gradient_checkpointing_changes_no_gradient_of_an_adapter(
    stage, lineage, base_path, data_dir, tmp_path, monkeypatch
):
    seen = []
    real = SCRIPTS[stage].optimizer_step

    def watched(schedules, loss, **options):
        groups = [group for s in schedules for group in s.optimizer.param_groups]
        seen.append(torch.cat([p.grad.flatten() for g in groups for p in g["params"]]))
        return real(schedules, loss, **options)

    monkeypatch.setattr(SCRIPTS[stage], "optimizer_step", watched)
    options = [*OPTIONS[stage], "--lora_dropout=0", "--max_steps=1"]
    options += [f"--model_id={base_path}"] if stage == "sft" else []
    options += ["--num_inner_epoch=1"] if stage == "ppo" else []
    for name in ("plain", "checkpointed"):
        more = ["--gradient_checkpointing"] if name == "checkpointed" else []
        run(stage, lineage, data_dir, *options, *more, ckpt_dir=tmp_path / name)
    plain, checkpointed = seen
    assert plain.norm() > 0
    assert (checkpointed - plain).norm() <= 1e-6 * plain.norm()


MOMENTS = [pytest.param(*x, marks=pytest.mark.slow) for x in (("sft", 3), ("rm", 2), ("dpo", 2))]
MOMENTS += [pytest.param("ppo", 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "call"), MOMENTS)
def test_resumed_run_equals_uninterrupted_run(stage, call, lineage, base_path, data_dir, tmp_path):
    def start(stage, folder):
        more = {"sft": [f"--model_id={base_path}"], "ppo": ["--minibatch_size=8"]}.get(stage, [])
        return run(stage, lineage, data_dir, *OPTIONS[stage], *more, ckpt_dir=folder)

    assert stop(stage, start, tmp_path / "cut", "optimizer_step", call) == 143
    state = max((tmp_path / "cut/.resume").glob("state-*"))
    names = [x for x in load_file(state / "tensors.safetensors") if re.match("(mod|pol|cri)", x)]
    assert all("lora_" in x or x in ("model.score.weight",) or "head" in x for x in names), names
    start(stage, tmp_path / "cut")
    whole = start(stage, tmp_path / "whole")
    assert content(tmp_path / "cut") == content(whole)


@pytest.mark.slow
def test_full_rank_reaches_the_loss_of_full_fine_tuning(base_path, data_dir, tmp_path):
    """A model that knows the words learns new answers with them, from a loss of some nats.

    Rank 32 is all that a layer of width 32 can have, and alpha = 2 r. 0.01 was the best of three
    rates for both. Two answers to each prompt: neither loss can reach 0.
    """
    options = ["--batch_size=20", "--num_epochs=60", "--log_step=3", "--keep=1"]
    options += ["--learning_rate=1e-2"]
    model = f"--model_id={base_path}"
    run("sft", tmp_path, data_dir, model, *options, ckpt_dir=tmp_path / "base")
    for side in ("train", "eval"):
        lines = (data_dir / f"sft/{side}.jsonl").read_text().splitlines()
        scored = [json.loads(line) for line in lines]
        for row in scored:
            is_good = row["score"] > 5
            row["response"] = f"No, {row['prompt'][-3:]}." if is_good else "A please."
        write_jsonl(tmp_path / f"sft/{side}.jsonl", scored)
    (knows_words,) = (tmp_path / "base").glob("*_epoch=60_*")
    model = f"--model_id={knows_words}"
    full = run("sft", tmp_path, tmp_path, model, *options, ckpt_dir=tmp_path / "full")
    more = ["--use_peft", "--lora_r=32", "--lora_alpha=64", "--lora_dropout=0"]
    lora = run("sft", tmp_path, tmp_path, model, *options, *more, ckpt_dir=tmp_path / "lora")
    assert epochs(lora, "eval_loss")[0] > 2
    assert epochs(lora, "loss")[-1] <= 1.02 * epochs(full, "loss")[-1]


@pytest.mark.slow
def test_compiling_changes_no_adapter(lineage, data_dir, tmp_path):
    options = [*OPTIONS["ppo"], "--max_steps=1"]
    plain, compiled = (
        run("ppo", lineage, data_dir, *options, *more, ckpt_dir=tmp_path / str(len(more)))
        for more in ([], ["--compile"])
    )
    compare(compiled, plain)
    assert epochs(compiled, "eval_kl") == pytest.approx(epochs(plain, "eval_kl"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--critic=shared"], ["--dtype=bfloat16"], ["--dtype=bfloat16", "--share_trunk"]]
)
def test_ppo_variants_run(options, lineage, data_dir, tmp_path):
    folder = run("ppo", lineage, data_dir, *OPTIONS["ppo"], *options, ckpt_dir=tmp_path)
    assert math.isfinite(epochs(folder, "eval_scores")[-1])


# Wrong uses


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("ppo", ["--use_peft", "--lora_dropout=0.1"], "--lora_dropout=0.1: must be 0 here"),
        ("dpo", ["--use_peft", "--lora_dropout=0.1"], "--lora_dropout=0.1: must be 0 here"),
        ("sft", ["--lora_r=4"], "--lora_r=4 needs --use_peft"),
        ("rm", ["--lora_target_modules=c_attn"], "--lora_target_modules=c_attn needs --use_peft"),
        ("sft", ["--use_peft", "--lora_r=0"], "--lora_r"),
        ("ppo", ["--share_trunk"], "--share_trunk needs --use_peft"),
        ("ppo", ["--share_trunk", "--use_peft", "--critic=shared"], "leave --critic=shared out"),
        ("ppo", ["--share_trunk", "--use_peft", "--compile"], "--compile"),
    ],
)
def test_wrong_arguments_take_one_line(stage, options, message, capsys):
    parents = {"sft": [], "ppo": ["--sft_model_path=x", "--rm_model_path=y"]}
    with pytest.raises(SystemExit) as caught:
        SCRIPTS[stage].parse_args([*parents.get(stage, ["--sft_model_path=x"]), *options])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error


def test_a_target_that_is_not_there_stops_a_run_before_it_writes(lineage, data_dir, tmp_path):
    with pytest.raises(InputError, match="--lora_target_modules=q_proj: matches no linear layer"):
        run(
            "dpo",
            lineage,
            data_dir,
            "--use_peft",
            "--lora_target_modules=c_attn, q_proj",
            ckpt_dir=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


# One trunk for all


def shared(lineage, path=None):
    """A policy of the SFT model, with the critic's and the reward model's adapters on it."""
    policy = load_policy(str(lineage / "sft/best"), flag="--x", device=CPU)
    stir(add_adapter(policy, **ADAPTER))
    path = str(path or lineage / "rm/best")
    critic = critic_view(policy, path, lora=ADAPTER)
    return policy, critic, SharedRewardModel(policy, path, flag="--x")


def test_shared_reward_model_scores_as_the_merged_one(lineage, batch):
    _, critic, reward_model = shared(lineage)
    merged = load_reward_model(str(lineage / "rm/best"), flag="--x", device=CPU, pad_id=0)
    expected = reward_logits(merged, batch, pad_id=0)
    ours = reward_logits(reward_model, batch, pad_id=0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    states = hidden_states(merged, batch)
    torch.testing.assert_close(hidden_states(critic, batch), states, rtol=1e-4, atol=1e-5)


def test_adapters_on_one_trunk_stay_apart(lineage, batch):
    policy, critic, reward_model = shared(lineage)
    alone = load_policy(str(lineage / "sft/best"), flag="--x", device=CPU)
    with active(policy, None):
        assert torch.equal(hidden_states(policy, batch), hidden_states(alone, batch))
    expected = hidden_states(stir(add_adapter(alone, **ADAPTER)), batch)
    hidden_states(critic, batch)
    reward_logits(reward_model, batch, pad_id=0)
    assert torch.equal(hidden_states(policy, batch), expected)
    assert not any(p.requires_grad for p in reward_model.parameters())
    assert all(p.requires_grad for p in critic.parameters()) and len([*critic.parameters()]) == 16
    hidden_states(critic, batch).sum().backward()
    assert all(p.grad is None for p in adapter_weights(policy).values())
    # Its own dropout, 0.05 by default, stayed with the reward model.
    assert not any(isinstance(x, torch.nn.Dropout) and x.p > 0 for x in policy.modules())
    merged, own = merged_weights(policy), merged_weights(alone)
    assert merged.keys() == own.keys()
    assert all(torch.equal(merged[key], own[key]) for key in own)


def test_each_optimiser_has_an_adapter_of_its_own(lineage):
    policy, trunk, _ = shared(lineage)
    critic = Critic(trunk, 32, 0.0)
    args = run_ppo.parse_args(["--sft_model_path=x", "--rm_model_path=y"])
    schedules = run_ppo.build_schedules(args, policy, critic, [[]])
    ours, theirs = (
        {id(p) for group in schedule.optimizer.param_groups for p in group["params"]}
        for schedule in schedules
    )
    assert ours == {id(p) for p in adapter_weights(policy).values()}
    head = {id(p) for p in critic.head.parameters()}
    assert theirs == {id(p) for p in adapter_weights(policy, CRITIC).values()} | head


def test_checkpointing_computes_again_with_the_adapter_that_was_active(lineage, batch):
    gradients = []
    for checkpointing in (False, True):
        policy, critic, _ = shared(lineage)
        stir(policy, CRITIC)
        prepare_training(policy, gradient_checkpointing=checkpointing, compile=False)
        recompute_as_run(policy)
        policy.train()
        loss = hidden_states(critic, batch).square().sum() + hidden_states(policy, batch).sum()
        loss.backward()
        own = [*critic.parameters(), *adapter_weights(policy).values()]
        gradients.append(torch.cat([p.grad.flatten() for p in own]))
    plain, checkpointed = gradients
    assert (checkpointed - plain).norm() <= 1e-6 * plain.norm()


def compare(ours, theirs):
    assert len(rows(ours)) == len(rows(theirs))
    for mine, other in zip(rows(ours), rows(theirs), strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"tokens_per_second"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    "critic",
    [
        ["--value_loss_coeff=0"],
        pytest.param(["--advantage=rloo", "--num_responses=2"], marks=pytest.mark.slow),
    ],
)
def test_a_run_on_one_trunk_equals_one_on_several(lineage, data_dir, tmp_path, critic):
    """With a critic that stays what it is: two adapters of one function learn differently."""
    options = [*OPTIONS["ppo"], *critic, "--max_steps=0", "--minibatch_size=8"]
    plain = run("ppo", lineage, data_dir, *options, ckpt_dir=tmp_path / "plain")
    shared = run("ppo", lineage, data_dir, *options, "--share_trunk", ckpt_dir=tmp_path / "shared")
    compare(shared, plain)
    ours, theirs = (load_file(x / "best/model.safetensors") for x in (shared, plain))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in theirs)


@pytest.mark.slow
def test_with_a_reward_function_the_critic_learns_alike_on_one_trunk(lineage, data_dir, tmp_path):
    options = [*OPTIONS["ppo"], "--reward_fn=tests.test_scripts:count_a", "--minibatch_size=8"]
    plain = run("ppo", lineage, data_dir, *options, ckpt_dir=tmp_path / "plain")
    more = ["--share_trunk", "--gradient_checkpointing"]
    shared = run("ppo", lineage, data_dir, *options, *more, ckpt_dir=tmp_path / "shared")
    compare(shared, plain)


@pytest.mark.slow
def test_the_critic_learns_on_one_trunk_and_resumes(lineage, data_dir, tmp_path):
    def start(stage, folder):
        options = [*OPTIONS[stage], "--share_trunk", "--minibatch_size=8"]
        return run(stage, lineage, data_dir, *options, ckpt_dir=folder)

    assert stop("ppo", start, tmp_path / "cut", "optimizer_step", 3) == 143
    state = max((tmp_path / "cut/.resume").glob("state-*"))
    names = load_file(state / "tensors.safetensors")
    assert any(".critic." in name for name in names)
    assert not any(".reward." in name for name in names)
    start("ppo", tmp_path / "cut")
    whole = start("ppo", tmp_path / "whole")
    assert content(tmp_path / "cut") == content(whole)


def test_a_trunk_is_shared_only_with_an_adapter_of_this_very_model(
    lineage, base_path, data_dir, tmp_path
):
    options = [*OPTIONS["ppo"], "--share_trunk"]
    whole = run("rm", lineage, data_dir, "--max_steps=1", ckpt_dir=tmp_path / "rm")
    with pytest.raises(InputError, match=r"has no adapter: train it by run_rm\.py --use_peft"):
        more = [*options, f"--rm_model_path={whole}/best"]
        run("ppo", lineage, data_dir, *more, ckpt_dir=tmp_path / "out")
    other = run("sft", lineage, data_dir, f"--model_id={base_path}", ckpt_dir=tmp_path / "sft")
    with pytest.raises(
        InputError, match=r"is an adapter of .*sft.*, which is not --sft_model_path"
    ):
        more = [*options, f"--sft_model_path={other}/best"]
        run("ppo", lineage, data_dir, *more, ckpt_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()

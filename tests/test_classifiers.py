"""Any text classifier as a judge: the logit that transformers' own pipeline gives."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    pipeline,
)

from rlhf.batches import Batch, Room, build_batch
from rlhf.classifiers import (
    encode_pairs,
    find_label,
    load_classifier,
    read_classifier,
    score_by_classifier,
)
from rlhf.errors import InputError
from rlhf.runtime import Runtime
from rlhf.tokens import Sample
from tests.conftest import build_base_tokenizer
from tests.families import LLAMA3, build_tokenizer

CPU = Runtime(torch.device("cpu"), "float32", "")
PROMPTS = ["Name a colour.", "Tell me of the sea and the cat, and of the dog too.", "Draw it", "No"]
RESPONSES = ["Blue.", "It was calm.", "The dog saw the cat on the mat. What did it see?", "x"]
NAMES = ["bad", "Good", "odd"]
SMALL = {"num_labels": 3, "id2label": dict(enumerate(NAMES)), "pad_token_id": 1}


def pair_tokenizer(**options) -> PreTrainedTokenizerFast:
    """As BERT's: [CLS] prompt [SEP] response [SEP], and which of the two a token is of."""
    tokenizer = build_base_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"})
    backend = tokenizer.backend_tokenizer
    ids = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **options,
    )


def save(folder: Path, model_class, config, tokenizer) -> str:
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def bert(folder: Path, **options) -> str:
    tokenizer = pair_tokenizer(**options)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 64}
    pad_id = tokenizer.pad_token_id
    config = BertConfig(vocab_size=len(tokenizer), **sizes, **(SMALL | {"pad_token_id": pad_id}))
    return save(folder, BertForSequenceClassification, config, tokenizer)


def gpt2(folder: Path, tokenizer: PreTrainedTokenizerFast, **options) -> str:
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=96, n_embd=32, n_layer=2, n_head=2, **options
    )
    return save(folder, GPT2ForSequenceClassification, config, tokenizer)


def scorer(path: str, label: str | None, runtime: Runtime = CPU):
    found = read_classifier(path, flag="--rm_model_path", label=label)
    found, model = load_classifier(found, flag="--rm_model_path", device=runtime.device)
    score = score_by_classifier(found, model, runtime=runtime)

    def of_texts(prompts, responses, room=Room(0)):  # noqa: B008
        batch: Batch = build_batch([Sample([5], [6])] * len(prompts), 0)  # it reads texts alone
        ended = torch.ones(len(prompts), dtype=torch.bool)
        return score(prompts, responses, batch, ended, room)

    return found, of_texts


def pipeline_logits(path: str, prompts, responses) -> torch.Tensor:  # (B, labels)
    judge = pipeline("text-classification", model=path, device="cpu")
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        told = judge(
            {"text": prompt, "text_pair": response},
            function_to_apply="none",
            top_k=None,
            truncation=True,
        )
        by_name = {entry["label"]: entry["score"] for entry in told}
        rows.append([by_name[name] for name in NAMES])
    return torch.tensor(rows)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_scores_are_the_logits_of_transformers_own_pipeline(padding_side, tmp_path):
    path = bert(tmp_path / "bert", padding_side=padding_side)
    expected = pipeline_logits(path, PROMPTS, RESPONSES)
    assert expected.std() > 0.1
    for label in range(3):
        for room in (Room(0), Room(1), Room(3)):
            _, score = scorer(path, str(label))
            scores = score(PROMPTS, RESPONSES, room)
            torch.testing.assert_close(scores, expected[:, label], atol=1e-5, rtol=0)


def test_distilbert_and_roberta_read_the_pair_too(tmp_path):
    tokenizer = pair_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    told = SMALL | {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    position = {"max_position_embeddings": 64 + tokenizer.pad_token_id + 1}
    kinds = {
        "distilbert": (
            DistilBertForSequenceClassification,
            DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=32, **told),
        ),
        "roberta": (
            RobertaForSequenceClassification,
            RobertaConfig(**sizes, intermediate_size=32, **position, **told),
        ),
    }
    for name, (model_class, config) in kinds.items():
        path = save(tmp_path / name, model_class, config, tokenizer)
        _, score = scorer(path, "good")
        expected = pipeline_logits(path, PROMPTS, RESPONSES)[:, 1]
        torch.testing.assert_close(score(PROMPTS, RESPONSES), expected, atol=1e-5, rtol=0)
    # Its positions begin behind the pad id: of a text that is too long, the first 64 tokens count.
    found, score = scorer(path, "good")
    assert found.config.max_position_embeddings > 400 and found.most_tokens == 64
    assert score(["The cat sat on the mat. " * 40], ["No."]).isfinite().all()


def test_a_text_that_is_too_long_is_cut_as_the_pipeline_cuts_it(tmp_path):
    path = bert(tmp_path / "bert", model_max_length=40)
    prompts, responses = ["Tell me a story. " * 20, "Draw"], ["Once upon a time. " * 9, "No."]
    found, score = scorer(path, "Good")
    expected = pipeline_logits(path, prompts, responses)[:, 1]
    torch.testing.assert_close(score(prompts, responses), expected, atol=1e-5, rtol=0)
    note = "reads 40 tokens, fewer than --max_len=64; what is longer is cut"
    assert note in found.told(max_len=64) and note[:8] not in found.told(max_len=40)
    # Without a limit of the tokenizer's, the positions are one.
    assert scorer(bert(tmp_path / "64"), "Good")[0].most_tokens == 64


def test_an_empty_response_is_still_the_second_of_two_texts(tmp_path):
    """transformers leaves it out where a text comes alone, and does not in a batch."""
    found, _ = scorer(bert(tmp_path / "bert"), "Good")
    [text] = encode_pairs(found, ["No"], [""])
    assert text.ids == found.tokenizer(["No"], [""]).input_ids[0]
    assert text.types == [0, 0, 0, 0, 1]


def test_special_tokens_in_a_text_are_text(tmp_path):
    found, _ = scorer(bert(tmp_path / "bert"), "Good")
    [text] = encode_pairs(found, ["a [SEP] b"], ["[PAD]"])
    sep, pad = found.tokenizer.convert_tokens_to_ids(["[SEP]", "[PAD]"])
    assert text.ids.count(sep) == 2 and pad not in text.ids


def test_a_chat_template_writes_the_text_if_there_is_one(tmp_path):
    tokenizer = build_tokenizer(
        LLAMA3,
        more=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        pad_token="<|pad|>",
    )
    path = gpt2(tmp_path / "chat", tokenizer, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    theirs, expected = AutoTokenizer.from_pretrained(path), []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]
        ids = theirs.apply_chat_template(messages, return_tensors="pt", return_dict=True).input_ids
        with torch.no_grad():
            expected.append(model(ids).logits[0, 0])
    found, score = scorer(path, None)
    for room in (Room(0), Room(1)):
        scores = score(PROMPTS, RESPONSES, room)
        torch.testing.assert_close(scores, torch.stack(expected), atol=1e-5, rtol=0)
    # What is too long loses its beginning, and keeps the response.
    short = found._replace(most_tokens=12)
    whole, cut = (encode_pairs(x, ["Tell me more. " * 9], ["Yes"])[0].ids for x in (found, short))
    assert len(whole) > 12 and cut == whole[-12:]
    # What a user writes never ends a turn.
    [plain], [quoted] = (encode_pairs(found, [x], ["Yes"]) for x in ("a", "a<|eot_id|>"))
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert plain.ids.count(end) == quoted.ids.count(end) == 2
    assert "by its chat template" in found.told(max_len=10)


def test_without_a_pad_token_each_text_is_read_alone(tmp_path):
    tokenizer = build_base_tokenizer()
    path = gpt2(tmp_path / "gpt2", tokenizer, num_labels=3, id2label=dict(enumerate(NAMES)))
    assert json.loads((tmp_path / "gpt2/config.json").read_text()).get("pad_token_id") is None
    found, score = scorer(path, "bad")
    expected = pipeline_logits(path, PROMPTS, RESPONSES)[:, 0]
    torch.testing.assert_close(score(PROMPTS, RESPONSES), expected, atol=1e-5, rtol=0)
    assert "one text at a time" in found.told(max_len=10)


def test_the_head_computes_in_float32(tmp_path):
    path = bert(tmp_path / "bert")
    half = Runtime(torch.device("cpu"), "bfloat16", "")
    found = read_classifier(path, flag="--x", label="Good")
    found, model = load_classifier(found, flag="--x", device=half.device)
    seen = []
    model.classifier.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    model.bert.encoder.layer[0].output.dense.register_forward_hook(
        lambda _, inputs, output: seen.append(output.dtype)
    )
    ended = torch.tensor([True])
    score = score_by_classifier(found, model, runtime=half)
    scores = score(["a"], ["b"], build_batch([Sample([5], [6])], 0), ended, Room(0))
    assert seen == [torch.bfloat16, torch.float32] and scores.dtype == torch.float32
    assert not model.training and not any(p.requires_grad for p in model.parameters())


NUMBERED = {0: "1", 1: "0"}


def test_a_label_is_found_by_name_or_number():
    names = dict(enumerate(NAMES))
    assert [find_label(names, x, flag="f") for x in ("BAD", "good", "2", "Odd")] == [0, 1, 2, 2]
    assert find_label({0: "LABEL_0"}, None, flag="f") == 0
    assert find_label(NUMBERED, "1", flag="f") == 0  # a name goes before a number


@pytest.mark.parametrize("label", [None, "goo", "3", "-1"])
def test_a_wrong_or_missing_label_is_told_with_those_that_are_there(label):
    with pytest.raises(InputError, match=r"--reward_label.* 0 \(bad\), 1 \(Good\), 2 \(odd\)$"):
        find_label(dict(enumerate(NAMES)), label, flag="--rm_model_path=x")


def test_names_that_differ_in_case_alone_are_told_by_number():
    with pytest.raises(InputError, match="--reward_label=yes"):
        find_label({0: "Yes", 1: "YES"}, "yes", flag="f")


def test_weights_that_need_unpickling_are_refused(tmp_path):
    path = Path(bert(tmp_path / "bert"))
    model = BertForSequenceClassification.from_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    found = read_classifier(str(path), flag="--rm_model_path", label="bad")
    with pytest.raises(InputError, match=r"--rm_model_path=.*: cannot be loaded") as caught:
        load_classifier(found, flag="--rm_model_path", device=CPU.device)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    path = bert(tmp_path / "bert")
    larger = pair_tokenizer()
    larger.add_tokens([f"new{i}" for i in range(3)])
    larger.save_pretrained(path)
    with pytest.raises(InputError, match="do not belong together"):
        read_classifier(path, flag="--rm_model_path", label="bad")


def test_a_template_that_fails_is_told(tmp_path):
    path = bert(tmp_path / "bert", chat_template="{{ raise_exception('no') }}")
    with pytest.raises(InputError, match=r"cannot write a prompt and a response: .*no") as caught:
        read_classifier(path, flag="--rm_model_path", label="bad")
    assert "run_sft" not in str(caught.value)

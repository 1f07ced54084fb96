"""Configs of the original's stages 1 and 2: every key is obeyed, without bearing, or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hmf_jax.priming import DistillConfig
from hmf_jax.training import RECIPES, original
from hmf_jax.training.schema import TrainConfig

COMMON: dict[str, Any] = {
    "model_name_or_path": "models/start", "dataset": "texts.jsonl", "output_dir": "models/end",
    "do_train": True, "finetuning_type": "full", "packing": True, "bf16": True, "pure_bf16": True,
    "per_device_train_batch_size": 1, "max_grad_norm": 1.0, "seed": 42, "logging_steps": 10,
    "save_steps": 1000, "deepspeed": "ds_z2_config.json", "flash_attn": "fa2",
    "disable_gradient_checkpointing": True, "report_to": "none", "resume_from_checkpoint": None,
    "overwrite_output_dir": False, "save_only_model": False, "plot_loss": False,
    "overwrite_cache": True, "cache_dir": "cache", "ddp_timeout": 180000000,
    "mix_strategy": "interleave_under", "preprocessing_num_workers": 32, "torch_compile": False,
    "dataloader_num_workers": 4, "preserve_tokenizer_config": True, "enable_liger_kernel": False,
    "tokenized_path": "to/be/written",
}  # fmt: skip
STAGE1 = {
    "stage": "hkd", "hybrid_lw_distill_target": "mixer", "hybrid_distill_pre_lm_head": True,
    "hybrid_learnable_params": "gka", "cutoff_len": 8192, "gradient_accumulation_steps": 4,
    "learning_rate": 1e-4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 720,
    "max_steps": 19000, "template": "qwen3_nothink_pt", "sequence_parallel_size": 1,
}  # fmt: skip
OVERRIDES = {"rope_parameters.rope_theta": 5000000, "max_position_embeddings": 131072}
LONG = {
    "stage": "pt", "hybrid_learnable_params": "gka,norm,self_attn", "cutoff_len": 131072,
    "gradient_accumulation_steps": 2, "learning_rate": 5e-5, "lr_scheduler_type": "cosine",
    "warmup_steps": 209, "max_steps": 4480, "sequence_parallel_size": 8,
    "config_overrides_json": json.dumps(OVERRIDES), "template": "qwen3_nothink_pt",
}  # fmt: skip
INSTRUCT = {
    "stage": "sft", "cutoff_len": 32768, "learning_rate": 5e-5, "lr_scheduler_type": "linear",
    "warmup_ratio": 0.03, "num_train_epochs": 2.0, "template": "qwen3",
    "gradient_accumulation_steps": 1,
}  # fmt: skip
REASONING = INSTRUCT | {
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "num_train_epochs": 1.0,
    "drop_exceed_length_data": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text('{"text": "a"}\n')


def load(values: dict[str, Any], cls: type[TrainConfig] = TrainConfig, *overrides: str) -> Any:
    Path("original.yaml").write_text(yaml.safe_dump(values))
    return cls.load("original.yaml", overrides)


@pytest.mark.parametrize(
    ("values", "recipe", "cls"),
    [
        (STAGE1, "distill", DistillConfig),
        (LONG, "long_context", TrainConfig),
        (INSTRUCT, "instruct", TrainConfig),
        (REASONING, "reasoning", TrainConfig),
    ],
)
def test_the_released_recipes(values, recipe, cls):
    """A file of the original says what our recipe of that name says."""
    config = load(COMMON | values, cls)
    for field in dataclasses.fields(RECIPES[recipe]):
        if field.name != "overlong":  # texts are split where the original splits them
            wanted = getattr(RECIPES[recipe], field.name)
            assert getattr(config, field.name) == wanted, field.name
    assert config.overlong == {"reasoning": "skip", "instruct": "cut"}.get(recipe, "split")
    assert (config.model, config.data, config.output) == (
        "models/start",
        "texts.jsonl",
        "models/end",
    )
    assert (config.per_device_batch_size, config.batch_size, config.seed) == (1, None, 42)
    assert config.dtype == "bfloat16" and config.remat == "none" and config.packing == "first_fit"
    assert config.sp == (8 if values is LONG else 1)
    assert (config.log_every, config.save_every, config.lora_rank) == (10, 1000, None)
    if cls is DistillConfig:
        assert (config.target, config.pre_lm_head) == ("mixer", True)


def test_defaults_are_the_originals():
    config = load({"model_name_or_path": "m", "dataset": "texts.jsonl", "output_dir": "o"})
    assert (config.seq_len, config.learning_rate, config.epochs) == (2048, 5e-5, 3)
    assert (config.schedule, config.warmup, config.seed) == ("linear", 0, 42)
    assert (config.lora_rank, config.lora_alpha, config.lora_modules) == (8, 16.0, "proj")
    assert config.trainable == "lora" and config.per_device_batch_size == 8
    assert (config.packing, config.overlong, config.dtype) == ("none", "cut", "float32")
    full = {"model_name_or_path": "m", "dataset": "texts.jsonl", "output_dir": "o", "stage": "hkd"}
    assert load(full | {"finetuning_type": "full"}, DistillConfig).trainable is None


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (dict(max_grad_norm=0), dict(max_grad_norm=None)),
        (dict(lr_scheduler_type="constant"), dict(schedule="constant", warmup=0)),
        (dict(adam_beta2=0.95, adam_epsilon=1e-6), dict(betas=(0.9, 0.95), eps=1e-6)),
        (dict(disable_shuffling=True), dict(shuffle=False)),
        (dict(disable_gradient_checkpointing=False), dict(remat="block")),
        (dict(enable_thinking=False), dict(template_options={"enable_thinking": False})),
        (dict(template="qwen3_nothink"), dict(template_options={"enable_thinking": False})),
        (dict(report_to=["tensorboard"]), dict(tensorboard=True)),
        (dict(packing=False), dict(packing="none")),
        (dict(packing=None), dict(packing="none")),
        (dict(packing=False, neat_packing=True), dict(packing="first_fit")),
        (dict(save_total_limit=5), dict(keep=5)),
        (dict(moe_aux_loss_coef=0.01), dict(router_aux_loss_coef=0.01)),
        (dict(max_steps=7), dict(steps=7, epochs=None)),
        (dict(bf16=False, pure_bf16=False), dict(dtype="float32")),
        (
            dict(eval_dataset="texts.jsonl", eval_steps=5, eval_strategy="steps",
                 load_best_model_at_end=True),
            dict(eval_data="texts.jsonl", eval_every=5, export="best"),
        ),
        (
            dict(finetuning_type="lora", lora_rank=4, lora_target="q_proj,v_proj",
                 quantization_bit=4),
            dict(lora_rank=4, lora_alpha=8.0, lora_modules="q_proj,v_proj", lora_quantize="nf4"),
        ),
        (dict(weight_decay=0.1, tp=2, fsdp=4), dict(weight_decay=0.1, tp=2, fsdp=4)),
    ],
)  # fmt: skip
def test_keys_that_are_obeyed(changes, wanted):
    config = load(COMMON | INSTRUCT | changes)
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stage="hkd"), "stage: hkd is for `hmf-jax prime distill`"),
        (dict(stage="dpo"), "stage: 'dpo' is none of pt, sft, hkd"),
        (dict(lr_scheduler_type="polynomial"), "lr_scheduler_type: 'polynomial' is none of"),
        (dict(warmup_steps=10), "warmup_steps and warmup_ratio: give one of them"),
        (dict(num_train_epochs=0.5), "num_train_epochs: 0.5 is no whole number"),
        (dict(optim="adafactor"), "optim: 'adafactor' is not supported here"),
        (dict(fp16=True), "fp16: True is not supported"),
        (dict(train_on_prompt=True), "train_on_prompt: True is not supported"),
        (dict(mask_history=True), "mask_history: True is not supported"),
        (dict(neftune_noise_alpha=5), "neftune_noise_alpha: 5 is not supported"),
        (dict(max_samples=100), "max_samples: 100 is not supported"),
        (dict(val_size=0.1), "val_size: 0.1 is not supported"),
        (dict(do_train=False), "do_train: False is not supported"),
        (dict(resume_from_checkpoint="x"), "resume_from_checkpoint: 'x' is not supported"),
        (dict(overwrite_output_dir=True), "overwrite_output_dir: True is not supported"),
        (dict(template="llama3"), "template: 'llama3' is not supported"),
        (dict(report_to="wandb"), "report_to: 'wandb' is not supported; see the field wandb"),
        (dict(dataset="pg19-sample"), "dataset: there is no file 'pg19-sample'"),
        (dict(tokenized_path="texts.jsonl"), "tokenized_path: 'texts.jsonl' was tokenised by"),
        (dict(finetuning_type="freeze"), "finetuning_type: 'freeze' is not supported"),
        (dict(lora_rank=4), "lora_rank needs finetuning_type: lora"),
        (dict(finetuning_type="lora", lora_dropout=0.1), "lora_dropout: 0.1 is not supported"),
        (dict(finetuning_type="lora", use_dora=True), "use_dora: True is not supported"),
        (dict(seq_len=8), "cutoff_len and seq_len say the same; give one of them"),
        (dict(model="m"), "model_name_or_path and model say the same"),
        (dict(steps=3), "num_train_epochs and steps say the same"),
        (dict(data="texts.jsonl"), "dataset and data say the same"),
        (dict(batch_size=4), "per_device_train_batch_size and batch_size say the same"),
        (dict(warmup=3), "warmup is also said by other keys of the original"),
        (dict(config_overrides_json="{"), "config_overrides_json: not JSON"),
        (dict(cutoff_lenn=8), "unknown field 'cutoff_lenn'; did you mean 'cutoff_len'?"),
        (dict(bf16="yes"), "bf16 must be bool, not 'yes'"),
        (dict(learning_rate=-1), "learning_rate=-1.0 must be"),
    ],
)
def test_keys_that_are_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        load(COMMON | INSTRUCT | changes)
    assert message.replace("-1.0", "-1") in str(caught.value), str(caught.value)
    assert str(caught.value).startswith("original.yaml: ") and "\n" not in str(caught.value)


def test_stage_1_needs_its_command_and_whole_mixers():
    with pytest.raises(ValueError, match="stage: sft is for `hmf-jax train`"):
        load(COMMON | INSTRUCT, DistillConfig)
    with pytest.raises(ValueError, match="write finetuning_type: full"):
        load(COMMON | STAGE1 | {"finetuning_type": None}, DistillConfig)


def test_overrides_in_both_spellings():
    config = load(COMMON | INSTRUCT, TrainConfig, "cutoff_len=64", "steps=5", "batch_size=6")
    assert (config.seq_len, config.steps, config.epochs) == (64, 5, None)
    assert (config.batch_size, config.per_device_batch_size) == (6, None)
    with pytest.raises(ValueError, match="seq_len and cutoff_len say the same"):
        load(COMMON | INSTRUCT, TrainConfig, "seq_len=3", "cutoff_len=64")


def test_named_datasets():
    Path("sets").mkdir()
    Path("sets/two.jsonl").write_text('{"text": "b"}\n')
    info = {"two": {"file_name": "two.jsonl"}, "other": {"file_name": "x", "ranking": True}}
    Path("sets/dataset_info.json").write_text(json.dumps(info))
    values = COMMON | INSTRUCT | {"dataset_dir": "sets", "mix_strategy": "concat"}
    assert load(values | {"dataset": "two"}).data == "sets/two.jsonl"
    assert load(values | {"dataset": "two, texts.jsonl"}).data == ["sets/two.jsonl", "texts.jsonl"]
    with pytest.raises(ValueError, match="says more of 'other' than file_name; use `data`"):
        load(values | {"dataset": "other"})
    with pytest.raises(ValueError, match="mix_strategy: 'interleave_under' is not supported for"):
        load(values | {"dataset": "two,texts.jsonl", "mix_strategy": "interleave_under"})
    config = load(values | {"dataset": "unknown"}, TrainConfig, "data=texts.jsonl")
    assert config.data == "texts.jsonl"


def test_no_key_is_in_two_lists():
    lists = [set(original.RENAMED), set(original.NO_BEARING), set(original._ONLY)]
    lists += [set(original._SAME), set(original._OTHER), set(original._OURS)]
    names = [name for keys in lists for name in keys]
    assert len(names) == len(set(names)), sorted(n for n in set(names) if names.count(n) > 1)
    fields = {f.name for f in dataclasses.fields(DistillConfig)}
    assert set(original.RENAMED.values()) | set(original._OURS) | set(original._SAME) <= fields

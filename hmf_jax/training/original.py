"""Stage-1 and stage-2 configs of the original (its training YAML), as fields of ours.

Every key of such a file is obeyed, has no bearing on the result (`NO_BEARING`), or is refused by
name. Where a key is absent, the original's default holds. What is computed differs in what
docs/priming.md lists: packed documents are isolated, and texts and chats are written by the
tokenizer's own template and end token.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hmf_jax.options import shown
from hmf_jax.training.fields import typed, unknown

Values = dict[str, Any]

# Keys with another name here, and nothing else to it.
RENAMED = {
    "model_name_or_path": "model",
    "output_dir": "output",
    "cutoff_len": "seq_len",
    "per_device_train_batch_size": "per_device_batch_size",
    "gradient_accumulation_steps": "accumulate",
    "adam_epsilon": "eps",
    "sequence_parallel_size": "sp",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "moe_aux_loss_coef": "router_aux_loss_coef",
    "hybrid_learnable_params": "trainable",
    "hybrid_lw_distill_target": "target",
    "hybrid_distill_pre_lm_head": "pre_lm_head",
}
_SAME = ("learning_rate", "weight_decay", "seed")

# Keys that say how, where or how loudly something is done, not what: whatever they hold.
NO_BEARING = frozenset(
    "attn_implementation bf16_full_eval buffer_size cache_dir data_shared_file_system "
    "dataloader_drop_last dataloader_num_workers dataloader_persistent_workers "
    "dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_bucket_cap_mb "
    "ddp_find_unused_parameters ddp_timeout deepspeed disable_tqdm do_eval double_quantization "
    "enable_liger_kernel eval_accumulation_steps flash_attn freeze_multi_modal_projector "
    "freeze_vision_tower fsdp_config full_determinism "
    "gradient_checkpointing_kwargs include_effective_tokens_per_second "
    "include_num_input_tokens_seen include_tokens_per_second infer_backend infer_dtype "
    "local_rank log_level log_level_replica log_on_each_node logging_dir logging_first_step "
    "logging_nan_inf_filter logging_strategy low_cpu_mem_usage offload_folder overwrite_cache "
    "packing_method per_device_eval_batch_size plot_loss preprocessing_batch_size "
    "preprocessing_num_workers preserve_tokenizer_config print_param_status ray_num_workers "
    "remove_unused_columns run_name save_max_shard_size save_on_each_node save_only_model "
    "save_safetensors sequence_parallel_mode shuffle_for_sequence_parallel skip_memory_metrics "
    "tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps "
    "use_cache use_deepspeed_mics use_fast_tokenizer use_kv_cache use_legacy_prediction_loop "
    "use_reentrant_gc use_unsloth use_unsloth_gc use_v1_kernels".split()
)

# Keys of what is not done here: only these values, with which the original does not do it either.
_ONLY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        "adapter_name_or_path add_special_tokens add_tokens additional_target data_seed "
        "default_system early_stopping_steps filter freeze_extra_modules hf_hub_token "
        "interleave_probs loraplus_lr_ratio max_merged_samples max_samples media_dir "
        "mixture_of_depths neftune_noise_alpha new_special_tokens_config "
        "ref_model resume_from_checkpoint reward_model rope_scaling tool_format".split(),
        (None,),
    ),
    **dict.fromkeys(
        "compute_accuracy create_new_adapter do_predict eval_on_each_dataset "
        "fp16 fp8 freeze_language_model group_by_length mask_history "
        "overwrite_output_dir pissa_convert pissa_init predict_with_generate resize_vocab "
        "shift_attn split_special_tokens streaming train_from_scratch train_on_prompt "
        "trust_remote_code upcast_layernorm upcast_lmhead_output use_adam_mini use_apollo "
        "use_badam use_dft_loss use_dora use_eaft_loss use_galore use_kt use_llama_pro use_muon "
        "use_rslora use_swanlab greater_is_better".split(),
        (False, None),
    ),
    "add_eos_token": (True, None),
    "do_train": (True,),
    "ignore_pad_token_for_loss": (True,),
    "label_smoothing_factor": (0, 0.0),
    "lora_dropout": (0, 0.0),
    "metric_for_best_model": ("eval_loss", "loss", None),
    "model_revision": ("main",),
    "optim": ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"),
    "quantization_method": ("bnb", "bitsandbytes", "BNB"),
    "quantization_type": ("nf4",),
    "save_strategy": ("steps",),
    "eval_strategy": ("steps", "no", None),
    "val_size": (0, 0.0, None),
}

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant_with_warmup": "constant"}
# Fields of ours, and the keys that say the same.
_SPELLED: dict[str, tuple[str, ...]] = {
    **{ours: (name,) for name, ours in RENAMED.items()},
    "data": ("dataset",),
    "eval_data": ("eval_dataset",),
    "steps": ("max_steps", "num_train_epochs"),
    "epochs": ("max_steps", "num_train_epochs"),
    "batch_size": ("per_device_train_batch_size",),
}
_STAGES = {"pt": "hmf-jax train", "sft": "hmf-jax train", "hkd": "hmf-jax prime distill"}


def renamed(values: Mapping[str, Any]) -> Values:
    """Fields by our names; ValueError if one is given in both spellings."""
    out: Values = {}
    for name, value in values.items():
        ours = RENAMED.get(name, name)
        if ours in out:
            other = next(n for n in values if RENAMED.get(n, n) == ours)
            raise ValueError(f"{other} and {name} say the same; give one of them")
        out[ours] = value
    return out


def translated(
    values: Values, stages: Collection[str], where: str, replaced: Collection[str] = ()
) -> Values:
    """The fields that a file of the original amounts to; a file of ours as it is.

    Args:
      values: what the file holds. It is the original's if it has `model_name_or_path` or `stage`.
      stages: those that are wanted: "pt" and "sft", or "hkd".
      where: the file, for errors.
      replaced: fields of ours that others will give: what the file says of them does not count.

    Raises:
      ValueError: a key that is not known, is refused, or is given in both spellings; another stage.
    """
    if not {"model_name_or_path", "stage"} & set(values):
        return values
    gone = {name for ours in replaced for name in (ours, *_SPELLED.get(ours, ()))}
    try:
        return _Translation({k: v for k, v in values.items() if k not in gone}).run(stages)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e


class _Translation:
    """Takes the keys one after the other; what is left at the end is not known."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        for ours, names in _SPELLED.items():
            if both := [name for name in names if name in values and ours in values]:
                raise ValueError(f"{both[0]} and {ours} say the same; give one of them")
        self._left = dict(values)
        self._out: Values = {}

    def run(self, stages: Collection[str]) -> Values:
        stage = self._take("stage", "sft", str)
        if stage not in _STAGES:
            raise ValueError(f"stage: {shown(stage)} is none of {', '.join(_STAGES)}")
        if stage not in stages:
            raise ValueError(f"stage: {stage} is for `{_STAGES[stage]}`")
        for name, ours in RENAMED.items():
            if self._left.get(name) is not None:
                self._out[ours] = self._left[name]
            self._left.pop(name, None)
        for name in _SAME:
            if self._left.get(name) is not None:
                self._out[name] = self._left[name]
            self._left.pop(name, None)
        defaults = {"seq_len": 2048, "learning_rate": 5e-5, "seed": 42, "trainable": None}
        self._out["recipe"] = None
        self._out = {**defaults, **self._out}
        if "batch_size" not in self._left:
            self._out.setdefault("per_device_batch_size", 8)
        if stage == "hkd":
            self._out = {"target": "none", "pre_lm_head": True, **self._out}
        self._length()
        self._schedule()
        self._optimizer()
        self._data(stage)
        self._precision()
        self._adapters(stage)
        self._validation()
        self._report()
        for name in list(self._left):
            if name in NO_BEARING:
                del self._left[name]
            elif name in _ONLY and self._left[name] in _ONLY[name]:
                del self._left[name]
            elif name in _ONLY:
                raise ValueError(f"{name}: {shown(self._left[name])} is not supported here")
        return {**self._out, **self._ours()}

    def _ours(self) -> Values:
        """What is left: fields of ours that the original does not have."""
        for name in self._left:
            if name in self._out:
                raise ValueError(f"{name} is also said by other keys of the original; give one")
            if name not in _OURS:
                known = [*RENAMED, *_SAME, *_ONLY, *NO_BEARING, *_OTHER, *_OURS]
                raise ValueError(unknown(name, sorted(known)))
        return self._left

    def _take(self, name: str, default: Any, kind: Any) -> Any:
        value = self._left.pop(name, None)
        return default if value is None else typed(name, value, kind)

    def _length(self) -> None:
        steps = self._take("max_steps", -1, int)
        epochs = self._take("num_train_epochs", 3.0, float)
        if {"steps", "epochs"} & set(self._left):
            return  # in our spelling
        if steps > 0:
            self._out["steps"] = steps
        elif epochs != int(epochs):
            raise ValueError(f"num_train_epochs: {epochs:g} is no whole number; give max_steps")
        else:
            self._out["epochs"] = int(epochs)

    def _schedule(self) -> None:
        name = self._take("lr_scheduler_type", "linear", str)
        if name == "constant":  # which warms nothing up
            self._take("warmup_steps", 0, float)
            self._take("warmup_ratio", 0.0, float)
            self._out |= {"schedule": "constant", "warmup": 0}
            return
        if name not in _SCHEDULES:
            known = ", ".join(["constant", *_SCHEDULES])
            raise ValueError(f"lr_scheduler_type: {shown(name)} is none of {known}")
        steps, ratio = self._take("warmup_steps", 0, int), self._take("warmup_ratio", 0.0, float)
        if steps and ratio:
            raise ValueError("warmup_steps and warmup_ratio: give one of them")
        self._out |= {"schedule": _SCHEDULES[name], "warmup": steps or ratio or 0}

    def _optimizer(self) -> None:
        betas = [self._take(f"adam_beta{i}", b, float) for i, b in ((1, 0.9), (2, 0.999))]
        norm = self._take("max_grad_norm", 1.0, float)
        self._out |= {"betas": betas, "max_grad_norm": norm or None}

    def _data(self, stage: str) -> None:
        self._take_files("dataset", "data")
        self._take_files("eval_dataset", "eval_data")
        self._left.pop("dataset_dir", None)
        packed = self._take("packing", stage != "sft", bool)
        packed = self._take("neat_packing", False, bool) or packed
        self._out["packing"] = "first_fit" if packed else "none"
        if self._take("drop_exceed_length_data", False, bool):
            self._out["overlong"] = "skip"
        else:  # texts are cut into rows, conversations cut off
            self._out["overlong"] = "cut" if stage == "sft" else "split"
        self._out["shuffle"] = not self._take("disable_shuffling", False, bool)
        strategy = self._take("mix_strategy", "concat", str)
        if strategy != "concat" and isinstance(self._out.get("data"), list):
            raise ValueError(
                f"mix_strategy: {shown(strategy)} is not supported for several files; they are "
                "concatenated and shuffled (concat)"
            )
        tokenized = self._take("tokenized_path", None, str)
        if tokenized is not None and Path(tokenized).expanduser().exists():
            raise ValueError(
                f"tokenized_path: {shown(tokenized)} was tokenised by the original and is not read "
                "here; leave it out, and name the texts or chats by `data`"
            )
        self._template()

    def _take_files(self, name: str, ours: str) -> None:
        given = self._left.pop(name, None)
        if given is None:
            return
        names = typed(name, given, str | list[str])
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else names
        folder = Path(typed("dataset_dir", self._left.get("dataset_dir") or "data", str))
        files = [self._file(name, folder, n) for n in names]
        self._out[ours] = files[0] if len(files) == 1 else files

    def _file(self, key: str, folder: Path, name: str) -> str:
        """A file of this name, or the one that dataset_info.json says."""
        info = folder.expanduser() / "dataset_info.json"
        for path in (folder.expanduser() / name, Path(name).expanduser()):
            if path.is_file():
                return str(path)
        entry: Any = {}
        if info.is_file():
            try:
                entry = json.loads(info.read_text(encoding="utf-8")).get(name, {})
            except (ValueError, AttributeError) as e:
                raise ValueError(f"{info} is not a JSON object: {e}") from e
        only = isinstance(entry, dict) and set(entry) <= {"file_name", "formatting"}
        if only and isinstance(entry.get("file_name"), str):
            return str(folder.expanduser() / entry["file_name"])
        if entry:
            raise ValueError(f"{key}: {info} says more of {shown(name)} than file_name; use `data`")
        raise ValueError(f"{key}: there is no file {shown(name)}; name the files by `data`")

    def _template(self) -> None:
        name = self._take("template", None, str)
        thinking = self._take("enable_thinking", None, bool)
        if name not in (None, "default", "qwen3", "qwen3_nothink", "qwen3_nothink_pt"):
            raise ValueError(
                f"template: {shown(name)} is not supported; conversations are written by the "
                "tokenizer's own chat template: leave it out if that is meant"
            )
        if thinking is False or name == "qwen3_nothink":
            self._out["template_options"] = {"enable_thinking": False}

    def _precision(self) -> None:
        half = self._take("bf16", False, bool)
        half = self._take("pure_bf16", False, bool) or half
        self._out["dtype"] = "bfloat16" if half else "float32"
        kept = self._take("disable_gradient_checkpointing", False, bool)
        self._left.pop("gradient_checkpointing", None)
        self._out["remat"] = "none" if kept else "block"
        overrides = self._take("config_overrides_json", None, str)
        if overrides is not None:
            try:
                self._out["config_overrides"] = json.loads(overrides)
            except ValueError as e:
                raise ValueError(f"config_overrides_json: not JSON: {e}") from e

    def _adapters(self, stage: str) -> None:
        given = [name for name in self._left if name.startswith(("lora_", "quantization_bit"))]
        kind = self._take("finetuning_type", "lora", str)
        rank, alpha = self._take("lora_rank", 8, int), self._take("lora_alpha", None, float)
        target = self._take("lora_target", "all", str)
        bits = self._take("quantization_bit", None, int)
        if kind == "full":
            if given:
                raise ValueError(f"{given[0]} needs finetuning_type: lora")
            return
        if stage == "hkd":
            raise ValueError(
                "finetuning_type: lora (the original's default) is not supported in stage hkd; "
                "write finetuning_type: full"
            )
        if kind != "lora":
            raise ValueError(f"finetuning_type: {shown(kind)} is not supported; use full or lora")
        if bits not in (None, 4, 8):
            raise ValueError(f"quantization_bit: {bits} is not supported; use 4 or 8")
        self._out |= {
            "lora_rank": rank,
            "lora_alpha": 2.0 * rank if alpha is None else alpha,
            "lora_modules": "proj" if target == "all" else target,
            "lora_quantize": {None: None, 4: "nf4", 8: "int8"}[bits],
        }
        if self._out["trainable"] is None:
            del self._out["trainable"]

    def _validation(self) -> None:
        if self._take("load_best_model_at_end", False, bool):
            self._out["export"] = "best"
        if self._left.get("eval_strategy") in ("no", None) or "eval_data" not in self._out:
            self._out.pop("eval_every", None)

    def _report(self) -> None:
        given = self._left.pop("report_to", None)
        for name in given if isinstance(given, list) else [given]:
            if name == "tensorboard":
                self._out["tensorboard"] = True
            elif name not in (None, "none"):
                raise ValueError(f"report_to: {shown(name)} is not supported; see the field wandb")


_OTHER = (
    "stage max_steps num_train_epochs lr_scheduler_type warmup_steps warmup_ratio adam_beta1 "
    "adam_beta2 max_grad_norm dataset eval_dataset dataset_dir packing neat_packing "
    "drop_exceed_length_data disable_shuffling mix_strategy tokenized_path template "
    "enable_thinking bf16 pure_bf16 disable_gradient_checkpointing config_overrides_json "
    "finetuning_type lora_rank lora_alpha lora_target quantization_bit load_best_model_at_end "
    "report_to"
).split()
# Fields of ours that such a file may have beside the original's keys.
_OURS = (
    "data eval_data steps epochs batch_size column master_weights on_bad padding_side num_iter "
    "impl chunk_size dp fsdp tp distributed wandb profile weighted"
).split()

"""Names that are elsewhere, and those of other libraries: asking for one says what to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn


def moved(module: str, names: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """The `__getattr__` of a module whose `names` are elsewhere: {name: the rest of the error}.

    The error is an ImportError: of an AttributeError `from module import name` keeps no word.
    """

    def find(name: str) -> NoReturn:
        if name in names:
            raise ImportError(f"{module}.{name} {names[name]}.")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


# What transformers, peft and vllm call it -> the rest of the error.
ELSEWHERE = {
    "AutoConfig": "is called HybridConfig here: hmf_jax.HybridConfig.from_json(directory)",
    "AutoModel": "is called from_pretrained here: model = hmf_jax.from_pretrained(directory)",
    "AutoModelForCausalLM": "is called from_pretrained here: "
    "model = hmf_jax.from_pretrained(directory)",
    "AutoTokenizer": "is called load_tokenizer here: hmf_jax.load_tokenizer(directory)",
    "GenerationConfig": "is called SamplingParams here: hmf_jax.SamplingParams(temperature=0.7)",
    "LLM": "is a function here: hmf_jax.generate(model, prompts, slots=64)",
    "LoraConfig": "is a function here: hmf_jax.training.apply_lora(model, rank=16)",
    "Trainer": "is a function here: hmf_jax.training.run.fine_tune(config)",
    "TrainingArguments": "is called TrainConfig here: hmf_jax.training.config.TrainConfig(...)",
    "get_peft_model": "is a function here: hmf_jax.training.apply_lora(model, rank=16)",
    "pipeline": "is a function here: hmf_jax.generate_text(model, prompts)",
}

_CAST = "model = model.astype({})"
_PLACE = "arrays are on JAX's default device; jax.device_put(model, device) moves them"
_GRAD = "parameters are plain arrays: take jax.grad of a function of the model"

# Methods of PyTorch's and transformers' models -> what to write instead.
TORCH_METHODS = {
    "bfloat16": _CAST.format("jnp.bfloat16"),
    "compile": "jax.jit(lambda model, tokens: model(tokens)[0])",
    "cpu": _PLACE,
    "cuda": _PLACE,
    "device": "jax.tree.leaves(model)[0].sharding says where a parameter is",
    "double": _CAST.format("jnp.float64"),
    "encode": "hmf_jax.load_tokenizer(model.source).encode(text)",
    "float": _CAST.format("jnp.float32"),
    "forward": "logits, state = model(tokens)",
    "gradient_checkpointing_enable": "training does so by itself; see `remat` of TrainConfig",
    "half": _CAST.format("jnp.float16"),
    "load_state_dict": "hmf_jax.parameters.with_params(model, params)",
    "named_parameters": "hmf_jax.parameters.flat_params(model).items()",
    "parameters": "hmf_jax.parameters.flat_params(model), or jax.tree.leaves(model)",
    "requires_grad_": _GRAD,
    "state_dict": "hmf_jax.parameters.flat_params(model)",
    "to": f"{_CAST.format('dtype')} casts; {_PLACE}",
    "tokenizer": "hmf_jax.load_tokenizer(model.source)",
    "zero_grad": _GRAD,
}

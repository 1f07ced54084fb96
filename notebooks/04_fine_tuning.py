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
# # Fine-tuning: LoRA on a chat file
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hmf-jax/hmf-jax/blob/main/notebooks/04_fine_tuning.ipynb)
#
# From a file of conversations to a model that has learnt them: adapters, training, a run that is
# interrupted and goes on, and an export that the original loads. The model is a tiny one with
# random weights that is built on the spot (so all it will ever know is that file), but every step
# is the one you take with a real model: replace `path` by `"amazon/GKA-primed-HQwen3-8B-Instruct"`
# or a local directory.

# %%
# On Colab, or wherever hmf-jax is not installed yet.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("hmf_jax") is None:
    source = "hmf-jax[notebooks,train] @ git+https://github.com/hmf-jax/hmf-jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)

# %%
import json
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import optax

import hmf_jax
from hmf_jax import training
from hmf_jax.demo import write_checkpoint
from hmf_jax.text import load_tokenizer

work = Path(tempfile.mkdtemp())
path = work / "tiny-hybrid"
write_checkpoint(path, layer_kinds=("GKA", "*"))
tokenizer = load_tokenizer(path)

# %% [markdown]
# ## The data
#
# JSONL (or Parquet) with a column `messages` in the usual form. Only what the assistant writes is
# trained on. `Batches` packs several conversations into a row of fixed length; segment ids keep
# them apart in every layer kind, recurrent ones included.

# %%
answers = {
    "What is the capital of France?": "Paris.",
    "What is the capital of Italy?": "Rome.",
    "What is the capital of Japan?": "Tokyo.",
    "Name a primary colour.": "Blue.",
    "Who found the filter?": "Kalman.",
    "How many layers have you?": "Two.",
}
file = work / "chats.jsonl"
with file.open("w") as f:
    for question, answer in answers.items():
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        f.write(json.dumps({"messages": turns}) + "\n")


def data():
    return training.Batches(file, tokenizer, length=128, batch_size=2, seed=0)


batch = next(data())
ids, mask = batch["segment_ids"][0], batch["loss_mask"][0]
print(f"{ids.max()} conversations, {(ids > 0).sum()} tokens of {len(ids)}, {mask.sum()} targets")
print(tokenizer.decode(batch["tokens"][0][ids == 1]))
print("trained on:", repr(tokenizer.decode(batch["tokens"][0][(ids == 1) & mask])))

# %% [markdown]
# ## Before


# %%
def ask(model):
    for question, answer in answers.items():
        chat = hmf_jax.ChatSession(model, max_new_tokens=12, capacity=256)
        print(f"{question:32} {chat.send(question).text.strip()!r:40} (file: {answer})")


base = hmf_jax.from_pretrained(path, progress=False)
ask(base)

# %% [markdown]
# ## Adapters
#
# `apply_lora` puts a trained product $\frac{\alpha}{r} A B$ of two thin matrices beside each
# projection $W$; the pattern chooses which (`"proj"` is all of them, `"gka"` those of the GKA
# layers, `"q_proj, v_proj"` and so on). The new model computes what the old one did, because $B$
# starts at zero. With `quantize="nf4"` the frozen $W$ take 4 bits each (QLoRA).


# %%
def start():
    model = hmf_jax.from_pretrained(path, progress=False)
    return training.apply_lora(model, rank=16, alpha=32, modules="proj")


optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, 100), weight_decay=0.0)
state = training.TrainState.create(start(), optimizer, trainable="lora")
count = {k: sum(p.size for p in getattr(state, k).values()) for k in ("params", "frozen")}
print(f"{count['params']:,} trained parameters beside {count['frozen']:,} frozen ones")

# %% [markdown]
# ## Training, interrupted and resumed
#
# One call runs the loop, writes `metrics.jsonl` and saves a checkpoint now and then. Here it stops
# after 40 steps, as if the machine had been taken away.

# %%
step = training.make_train_step(optimizer, max_grad_norm=1.0)
run = work / "run"


def go(state, steps):
    saved = training.Checkpoints(run / "checkpoints", base.config, every=20)
    return training.train(
        state, step, data(), steps=steps, checkpoints=saved, directory=run, progress=False
    )


state = go(state, steps=40)
print(sorted(p.name for p in (run / "checkpoints").iterdir()))

# %% [markdown]
# The same call, made from scratch, goes on where the last checkpoint stands: adapters, optimizer
# and the position in the data are restored exactly, on another mesh if you like.

# %%
state = training.TrainState.create(start(), optimizer, trainable="lora")
state = go(state, steps=100)
print("at step", int(state.step))

# %%
records = training.read_metrics(run)
plt.figure(figsize=(7, 3))
plt.plot([r["step"] for r in records], [r["loss"] for r in records])
plt.axvline(40, color="gray", linestyle=":", label="resumed here")
plt.xlabel("step"), plt.ylabel("nats per token"), plt.yscale("log"), plt.legend()
plt.show()

# %% [markdown]
# ## After

# %%
trained = state.model()
ask(trained)

# %% [markdown]
# ## Adapters alone, and a merged model
#
# `save_lora` writes the adapters in the files and names of PEFT. `merge_lora` adds them to the
# weights: a plain model, whose `save_pretrained` directory loads anywhere the base model does.

# %%
training.save_lora(trained, work / "adapters")
hmf_jax.save_pretrained(training.merge_lora(trained), work / "merged", progress=False)
for directory in ("adapters", "merged"):
    sizes = {p.name: p.stat().st_size for p in (work / directory).glob("*.safetensors")}
    print(directory, sizes)

# %%
loaded = training.load_lora(base, work / "adapters")
same = jax.tree.map(lambda a, b: bool((a == b).all()), loaded, trained)
print("adapters loaded onto the base model are what was trained:", all(jax.tree.leaves(same)))
merged = hmf_jax.from_pretrained(work / "merged", progress=False)
for name, model in (("with adapters", trained), ("merged", merged)):
    total, targets = training.next_token_loss(model, **batch)
    print(f"{name:15} {total / targets:.4f} nats per token")

# %% [markdown]
# From the shell the same is `hmf-jax train CONFIG.yaml`; `docs/training.md` has configs, meshes and
# what they take, and recipes for clusters.

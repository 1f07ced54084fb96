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
# # Serving: an OpenAI-compatible server, and what its prefix cache saves
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hmf-jax/hmf-jax/blob/main/notebooks/08_serving.ipynb)
#
# `hmf-jax serve DIR` is a server for the `openai` package and everything else that speaks its
# protocol. This notebook runs one in its own process, on the tiny trained hybrid that comes with
# the package: a conversation, several clients at a time, another number of solver iterations per
# request, and the time to the first token with and without the prefix cache.

# %%
# On Colab, or wherever hmf-jax is not installed yet.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("hmf_jax") is None:
    source = "hmf-jax[notebooks,serve,train] @ git+https://github.com/hmf-jax/hmf-jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source, "openai"], check=True)

# %%
import contextlib
import random
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import matplotlib.pyplot as plt
from openai import OpenAI

import hmf_jax
from hmf_jax import embedded
from hmf_jax.embedded import corpus
from hmf_jax.serving import running

model = hmf_jax.from_pretrained(embedded.directory("gka"), dtype=jnp.float32, progress=False)

# %% [markdown]
# ## A server
#
# `running` starts it and returns when it is ready; on the command line, `hmf-jax serve` does the
# same and stays. `prefix_cache="fast"` lets a prompt go on from wherever another one was left (the
# default, "exact", at multiples of a chunk, so that no bit of an answer changes).

# %%
stack = contextlib.ExitStack()  # in a program of yours: `with running(...) as server:`
settings = {"prefix_cache": "fast", "prefill_chunk": 512, "aliases": {"quick": {"num_iter": 1}}}
server = stack.enter_context(running(model, port=0, slots=8, **settings))
client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
print(server.url, [m.id for m in client.models.list().data])

# %% [markdown]
# ## A conversation
#
# The facts are in the system message, and something else follows them. A new turn finds the turns
# before it read: `cached_tokens` of its usage says how much came from the cache. Temperature 0
# takes the most likely token each time.

# %%
rng = random.Random(0)
facts, known = corpus.context(rng, 600, facts=4, gap=42)
print(facts[:150], "...")
messages = [{"role": "system", "content": facts}]
for name, *_ in known[:3]:
    messages.append({"role": "user", "content": f"{name}?"})
    reply = client.chat.completions.create(model="gka", messages=messages, temperature=0)
    messages.append({"role": "assistant", "content": reply.choices[0].message.content})
    cached = reply.usage.prompt_tokens_details.cached_tokens
    print(f"{messages[-1]['content']:15} {reply.usage.prompt_tokens} tokens, {cached} cached")

# %% [markdown]
# Streaming, as everywhere:

# %%
stream = client.chat.completions.create(
    model="gka",
    messages=[*messages, {"role": "user", "content": f"{known[3][0]}?"}],
    temperature=0,
    stream=True,
)
print([chunk.choices[0].delta.content for chunk in stream if chunk.choices])

# %% [markdown]
# ## Several clients at a time
#
# Requests share the decoding steps: twelve at once take less time than one after the other. Their
# answers are the same, bit for bit, since rows of a batch do not know each other.


# %%
def answer(messages: list[dict], **settings) -> str:
    settings = {"model": "gka", "max_tokens": 16, "temperature": 0, **settings}
    reply = client.chat.completions.create(messages=messages, **settings)
    return reply.choices[0].message.content


def answers(questions: list[list[dict]], **settings) -> list[str]:
    """All at once, each in a connection of its own."""
    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(lambda messages: answer(messages, **settings), questions))


questions = [[messages[0], {"role": "user", "content": f"{name}?"}] for name, *_ in 3 * known]
start = time.perf_counter()
one_by_one = [answer(question) for question in questions]
middle = time.perf_counter()
together = answers(questions)
end = time.perf_counter()
print(f"one by one {middle - start:.2f} s, together {end - middle:.2f} s")
print("the same answers:", one_by_one == together, "|", together[:4])

# %% [markdown]
# ## Solver iterations per request
#
# `num_iter` is a field of a request. Clients that cannot send it use another name of the model,
# which this server was given above. Requests with different numbers run in the same batch.

# %%
exam, right = [], []
for _ in range(16):
    text, known = corpus.context(rng, 256, facts=8, gap=42)
    name, _, number = rng.choice(known)
    exam.append([{"role": "system", "content": text}, {"role": "user", "content": f"{name}?"}])
    right.append(f"{name} has {number}.")


def recall(**settings) -> str:
    said = answers(exam, **settings)
    return f"{sum(a == b for a, b in zip(said, right, strict=True)) / len(right):.0%} right"


print("the model's own, 30:", recall(model="gka"))
print("the alias, 1:       ", recall(model="quick"))
print("num_iter 0:          ", recall(model="gka", extra_body={"num_iter": 0}))

# %% [markdown]
# ## Time to the first token
#
# Questions about the same text, for texts of growing length. The first request reads it; the second
# one shows where prompts part, so a copy of the states is kept there; from then on it is found. The
# last has a `cache_salt` of its own, by which it finds nothing: tenants who must not learn from
# latencies what others have sent use one each.


# %%
def first_token(text: str, question: str, **fields) -> tuple[float, int]:
    """Milliseconds to the first token, and how many tokens of the prompt were cached."""
    messages = [{"role": "system", "content": text}, {"role": "user", "content": question}]
    start, first, cached = time.perf_counter(), None, 0
    for chunk in client.chat.completions.create(
        model="gka",
        messages=messages,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=fields,
    ):
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = 1000 * (time.perf_counter() - start)
        if chunk.usage:
            cached = chunk.usage.prompt_tokens_details.cached_tokens
    return first, cached


lengths = [550, 1000, 1500, 1950]
read, found = [], []
for length in lengths:
    text, known = corpus.context(rng, length, facts=4, gap=42)
    for name, *_ in known[:2]:  # of a new length, these may wait for a compiler
        first_token(text, f"{name}?")
    found.append(first_token(text, f"{known[2][0]}?"))
    read.append(first_token(text, f"{known[3][0]}?", cache_salt="mine"))
print("cached:", [cached for _, cached in found], "with a salt:", [cached for _, cached in read])

fig, ax = plt.subplots(figsize=(6, 3.2))
ax.plot(lengths, [ms for ms, _ in read], "o-", label="the text is read")
ax.plot(lengths, [ms for ms, _ in found], "o-", label="the text is in the prefix cache")
ax.set(xlabel="tokens of the text", ylabel="ms to the first token", ylim=(0, None))
ax.set_title("First tokens do not wait for what was read before")
ax.legend()
plt.show()

# %% [markdown]
# Recurrent layers have no tokens to share, only a state after so many of them: the cache keeps a
# copy of the states where prompts part, or are likely to: at the end of the system message and of
# each turn. [Serving](../docs/serving.md) says where, and what it costs.
#
# ## Metrics
#
# Prometheus' format, with vLLM's names where there are such; docs/deploy has a dashboard.

# %%
metrics = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
wanted = ("prefix_cache_hits_total", "prefix_cache_queries_total", "num_iter_requests_total",
          "generation_tokens_total", "hmf:compiles_total")  # fmt: skip
for line in metrics.splitlines():
    if not line.startswith("#") and any(name in line for name in wanted):
        print(line)

# %%
stack.close()

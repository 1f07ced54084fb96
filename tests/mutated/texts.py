"""Ways to damage config.json and the files that concern text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.mutated.kinds import OTHER, REFUSED, SAME, Change, garbage, kind

# Keys of config.json whose value must be right for there to be a model.
NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "hybrid_override_pattern",
    "tie_word_embeddings",
    "model_type",
    "rope_parameters",
    "gka_config",
    "swa_config",
    "eos_token_id",
)


def edited(name: str, change: Callable[[Any, random.Random], Any]) -> Change:
    def apply(directory: Path, rng: random.Random) -> None:
        file = directory / name
        found = json.loads(file.read_text()) if file.exists() else {}
        changed = change(found, rng)
        text = changed if isinstance(changed, bytes) else json.dumps(changed or found).encode()
        file.write_bytes(text)

    apply.__name__ = change.__name__
    return apply


def config(change: Callable[[Any, random.Random], Any]) -> Change:
    return edited("config.json", change)


def no_json(rng: random.Random) -> bytes:
    return rng.choice(
        [b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe{\x00}\x00", b"\x00" * 100,
         b"[" * 10**5, b'{"a":' * 10**5, b'{"a": NaN}', b'{"a": 1e999}', b"<html>",
         b'{"a": 1, "a": 2}',
         b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
         b'{"a": "' + b"x" * (20 << 20) + b'"}', b'{"a": ' + b"9" * 9999 + b"}"]
    )  # fmt: skip


def a_bit(directory: Path, name: str, rng: random.Random) -> None:
    raw = bytearray((directory / name).read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    (directory / name).write_bytes(raw)


@kind("config", REFUSED)
@config
def config_is_no_object(found, rng):
    return no_json(rng)


@kind("config", SAME)
def config_bit(directory: Path, rng: random.Random) -> None:
    a_bit(directory, "config.json", rng)


@kind("config", SAME)
@config
def config_value(found, rng):
    """Any key; None may mean the default, and who reads a key may not care."""
    found[rng.choice(sorted(found))] = garbage(rng)


@kind("config", REFUSED)
@config
def config_needed_value(found, rng):
    values = [[], [[]], "\x1b[31m", -1, 10**30, -1e300]
    found[rng.choice(NEEDED)] = rng.choice(values)


@kind("config", SAME)
@config
def config_section_value(found, rng):
    section = found[rng.choice(["gka_config", "bmojo_config", "swa_config", "rope_parameters"])]
    section[rng.choice(sorted(section))] = garbage(rng)


@kind("config", SAME)
@config
def config_key_is_gone(found, rng):
    del found[rng.choice(sorted(found))]


@kind("config", SAME)
@config
def config_key_is_new(found, rng):
    found[rng.choice(["x", "\x1b[2J", "num_layers", "quantization_config", "auto_map"])] = garbage(
        rng
    )


@kind("config", REFUSED)
@config
def config_asks_for_much(found, rng):
    many = rng.choice([5, 200, 100_000])
    found["hybrid_override_pattern"] = "-".join(["GKA"] * many)
    found["num_hidden_layers"] = many
    found["layer_types"] = ["GKA"] * many


@kind("config", REFUSED)
@config
def config_of_another_size(found, rng):
    key = rng.choice(["hidden_size", "vocab_size", "intermediate_size", "num_attention_heads"])
    found[key] = rng.choice([4, 2 * found[key], 10**6, 10**9])


@kind("config", REFUSED)
@config
def config_pattern(found, rng):
    found["hybrid_override_pattern"] = rng.choice(
        ["", "-", "GKA", "SWA-SWA-GKA-GKA-GKA", "SWA-SWA-GKA-\x1b[2J", "*" * 1000,
         "GKA-GKA-SWA-SWA", "swa-swa-gka-gka", "SWA-SWA-GKA-GDN", "SWA-SWA-GKA-M2",
         "SWA,SWA,GKA,GKA"]
    )  # fmt: skip


@kind("tokenizer", OTHER)
def tokenizer_bit(directory: Path, rng: random.Random) -> None:
    a_bit(directory, "tokenizer.json", rng)


@kind("tokenizer", REFUSED)
def tokenizer_truncated(directory: Path, rng: random.Random) -> None:
    raw = (directory / "tokenizer.json").read_bytes().rstrip()
    (directory / "tokenizer.json").write_bytes(raw[: rng.randrange(len(raw))])


def tokenizer(change: Callable[[Any, random.Random], Any]) -> Change:
    return edited("tokenizer.json", change)


def tokenizer_config(change: Callable[[Any, random.Random], Any]) -> Change:
    return edited("tokenizer_config.json", change)


def generation_config(change: Callable[[Any, random.Random], Any]) -> Change:
    return edited("generation_config.json", change)


@kind("tokenizer", REFUSED)
@tokenizer
def tokenizer_is_no_object(found, rng):
    return no_json(rng)


@kind("tokenizer", OTHER)
@tokenizer
def tokenizer_value(found, rng):
    part = rng.choice([found, found["model"], found["added_tokens"][0], found["pre_tokenizer"]])
    part[rng.choice(sorted(part))] = garbage(rng)


@kind("tokenizer", OTHER)
@tokenizer
def tokenizer_vocabulary(found, rng):
    vocab = found["model"]["vocab"]
    vocab[rng.choice([*vocab, "\ud800", "", "x" * 10**5])] = rng.choice([-1, 0, 2**31, 2**40, "1"])


@kind("tokenizer", OTHER)
@tokenizer
def tokenizer_merges(found, rng):
    found["model"]["merges"] = rng.choice([["a"], [["a", "b", "c"]], "x", [["Z", "\u0645"]], [1]])


@kind("tokenizer", OTHER)
@tokenizer_config
def tokenizer_config_value(found, rng):
    keys = [*sorted(found), "chat_template", "additional_special_tokens", "added_tokens_decoder"]
    found[rng.choice(keys)] = garbage(rng)


@kind("tokenizer", OTHER)
@tokenizer_config
def tokenizer_config_is_no_object(found, rng):
    return no_json(rng)


@kind("tokenizer", OTHER)
@tokenizer_config
def tokenizer_class(found, rng):
    found["tokenizer_class"] = rng.choice(["x", "os.system", "BertTokenizer", "", "..", "\x1b[2J"])
    found["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}


@kind("generation_config", OTHER)
@generation_config
def generation_config_value(found, rng):
    found["do_sample"] = True
    key = rng.choice(["temperature", "top_k", "top_p", "min_p", "eos_token_id", "do_sample", "x"])
    found[key] = garbage(rng)


@kind("generation_config", REFUSED)
@generation_config
def generation_config_is_no_object(found, rng):
    return no_json(rng)


TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(10**12) %}x{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ 10**10**10 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch /tmp/touched-by-a-template') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ messages[9].content }}",
    "{{ messages.content.x.y }}",
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{% if %}",
    "{{",
    "{% for x in messages %}",
    "\ud800",
    "\x1b[2J{{ messages[0].content }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'x'.center(10**10) }}",
    "{% set x = messages.append(messages) %}{{ messages }}",
    "{{ strftime_now('%' * 10**6) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ ['x'] * 10**10 }}",
    "{{ lipsum(n=10**9) }}",
    "",
)


@kind("template", OTHER)
def template(directory: Path, rng: random.Random) -> None:
    text = rng.choice(TEMPLATES).encode("utf-8", "surrogatepass")
    (directory / "chat_template.jinja").write_bytes(text)


@kind("template", OTHER)
def template_bit(directory: Path, rng: random.Random) -> None:
    a_bit(directory, "chat_template.jinja", rng)


@kind("template", OTHER)
def template_of_bytes(directory: Path, rng: random.Random) -> None:
    raw = rng.choice([rng.randbytes(999), b"{{ x }}" * 10**6, b"{" * 10**6, b"\x00"])
    (directory / "chat_template.jinja").write_bytes(raw)

"""Uploading to the hub, against something that stands for it and writes to a directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

import hmf_jax
from hmf_jax import hub
from tests.util import random_model, tiny_config


class Hub:
    """The three calls of `huggingface_hub.HfApi` that are used, on a directory."""

    def __init__(self, root: Path, error: Exception | None = None):
        self.root, self.error, self.calls = root, error, []

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        if self.error is not None:
            raise self.error
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://hub/{repo_id}"

    def file_exists(self, repo_id, filename, *, revision):
        return (self.root / repo_id / filename).is_file()

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision):
        self.calls.append(("upload_folder", commit_message, revision))
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(("*", "GKA", "GKA")), jnp.bfloat16)


def test_what_arrives_loads_and_has_a_card(model, tmp_path):
    api = Hub(tmp_path)
    url = model.push_to_hub("me/tiny", private=True, license="mit", base_model="org/base", api=api,
                            commit_message="First", revision="dev", progress=False)  # fmt: skip
    assert url == "https://hub/me/tiny/commit/1"
    assert api.calls == [
        ("create_repo", "me/tiny", True, True),
        ("upload_folder", "First", "dev"),
    ]
    again = hmf_jax.from_pretrained(tmp_path / "me/tiny", progress=False)
    assert again.config.layer_kinds == model.config.layer_kinds and again.dtype == model.dtype
    card = huggingface_hub.ModelCard.load(tmp_path / "me/tiny/README.md")
    data = card.data.to_dict()
    assert (data["license"], data["base_model"]) == ("mit", "org/base")
    assert data["library_name"] == "hmf-jax" and {"gka", "self_attn"} <= set(data["tags"])
    for said in (
        "| 2 | Gated KalmaNet | 30 Chebyshev iterations |",
        "| 1 | full attention |",
        f"{model.num_parameters():,} parameters in bfloat16",
        'hmf_jax.from_pretrained("me/tiny")',
        "30 solver iterations",
    ):
        assert said in card.text, said


def test_a_readme_that_is_there_stays(model, tmp_path):
    (tmp_path / "me/tiny").mkdir(parents=True)
    (tmp_path / "me/tiny/README.md").write_text("mine")
    hmf_jax.push_to_hub(model, "me/tiny", api=Hub(tmp_path), progress=False)
    assert (tmp_path / "me/tiny/README.md").read_text() == "mine"
    assert (tmp_path / "me/tiny/config.json").is_file()


def test_what_a_card_knows_of_the_source(tmp_path):
    """The repository that it was downloaded from, and the license in its README.md."""
    model = random_model(tiny_config(("*",)), jnp.bfloat16)
    assert "license" not in hub.model_card(model, "me/x") and "Gated" not in hub.model_card(
        model, "me/x"
    )
    source = tmp_path / "models--org--base" / "snapshots" / "1a2b"
    source.mkdir(parents=True)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: older/one\n---\nHello")
    model.source = source
    card = hub.model_card(model, "me/x")
    assert "license: apache-2.0\n" in card and "base_model: org/base\n" in card
    (source / "README.md").write_bytes(b"---\n\xff: [\n---")  # not to be read: no reason to stop
    assert "license" not in hub.model_card(model, "me/x")
    moved = tmp_path / "mine"
    source.rename(moved)
    (moved / "README.md").write_text("---\nbase_model: older/one\n---\nHello")
    model.source = moved
    assert "base_model: older/one\n" in hub.model_card(model, "me/x")


def response(status: int) -> HfHubHTTPError:
    reply: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("no\nmore", response=reply)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (LocalTokenNotFoundError("Token is required\n..."), PermissionError, "hf auth login"),
        (response(401), PermissionError, "hf auth login"),
        (response(403), PermissionError, "write access"),
        (response(500), OSError, "huggingface.co says: no"),
        (TimeoutError("timed out"), ConnectionError, "check the network"),
    ],
)
def test_refusals_are_one_line(model, tmp_path, error, kind, message):
    with pytest.raises(kind, match=message) as caught:
        model.push_to_hub("me/tiny", api=Hub(tmp_path, error), progress=False)
    assert "\n" not in str(caught.value) and "me/tiny" in str(caught.value)


@pytest.mark.parametrize("name", ["", "./out", "a/b/c", "me/..", "me/ tiny"])
def test_bad_names(model, tmp_path, name):
    api = Hub(tmp_path)
    with pytest.raises(ValueError, match="save_pretrained writes to a directory"):
        model.push_to_hub(name, api=api)
    assert not api.calls


def test_nothing_is_created_for_a_model_that_cannot_be_saved(model, tmp_path):
    api, broken = Hub(tmp_path), model.astype("float32")
    broken.norm.weight[...] = jnp.full_like(broken.norm.weight[...], jnp.nan)
    with pytest.raises(ValueError, match="norm.weight"):
        broken.push_to_hub("me/tiny", api=api, progress=False)
    assert not api.calls

"""Uploading a model to the Hugging Face hub, with a model card."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from hmf_jax.loading import save_pretrained
from hmf_jax.memory import describe
from hmf_jax.mixers import KINDS, kinds_within, split_symbol
from hmf_jax.model import HybridLM

__all__ = ["model_card", "push_to_hub"]


def push_to_hub(
    model: HybridLM,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    license: str | None = None,
    base_model: str | None = None,
    source: str | Path | None = None,
    max_shard_size: int | str = "5GB",
    token: str | None = None,
    api: Any = None,
    for_original: bool = True,
    progress: bool = True,
) -> str:
    """Uploads a model, and a model card unless the repository has a README.md already.

    The model is first saved to a temporary directory (where TMPDIR points, of the model's size);
    nothing is created on the hub if that fails.

    Args:
      model: the model.
      repo_id: "user/name" or "organization/name"; created if it does not exist.
      private: whether a new repository is private; None: as the organization's settings say.
      revision: the branch to write to, which must exist; None: "main".
      commit_message: the first line of the commit.
      license, base_model: of the model card, see `model_card`.
      source, max_shard_size, for_original, progress: as in `hmf_jax.save_pretrained`.
      token: access token; None: the one that `hf auth login` has stored.
      api: a `huggingface_hub.HfApi`, or what stands for one.

    Returns:
      the address of the commit, or of the repository where the hub does not say.

    Raises:
      ValueError: a bad name, or what `save_pretrained` raises.
      PermissionError: no token, or one that must not write there.
      OSError: the hub cannot be reached, or refuses.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise ValueError(
            f"{repo_id!r} is no repository id such as 'user/name'; "
            "save_pretrained writes to a directory"
        ) from e
    api = huggingface_hub.HfApi(token=token) if api is None else api
    with tempfile.TemporaryDirectory(prefix="hmf-jax-") as scratch:
        folder = Path(scratch) / "model"
        save_pretrained(
            model,
            folder,
            source=source,
            max_shard_size=max_shard_size,
            for_original=for_original,
            progress=progress,
        )
        card = model_card(model, repo_id, license=license, base_model=base_model)
        try:
            created = api.create_repo(repo_id, private=private, exist_ok=True)
            if not api.file_exists(repo_id, "README.md", revision=revision):
                (folder / "README.md").write_text(card, encoding="utf-8")
            done = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
            )
        except Exception as e:
            raise _one_line(repo_id, e) from e
    return str(getattr(done, "commit_url", None) or created)


def model_card(
    model: HybridLM,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
) -> str:
    """The text of a README.md: metadata, a table of the layers, how to load the model.

    Args:
      model: the model.
      repo_id: where it will be.
      license: an identifier such as "apache-2.0"; default: what the README.md beside the model's
        source says, if there is one.
      base_model: the repository that it was made from; default: the one it was loaded from, or what
        the README.md beside its source says.
    """
    known = _metadata(model.source)
    kinds = kinds_within(model.config.student_kinds, model.config.sections)
    data = huggingface_hub.ModelCardData(
        library_name="hmf-jax",
        pipeline_tag="text-generation",
        license=license or known.get("license"),
        base_model=base_model or _repository(model.source) or known.get("base_model"),
        tags=["hmf-jax", "jax", "hybrid", *(kind.name for kind in kinds)],
    )
    sections = [
        f"# {repo_id.split('/')[-1]}",
        "A hybrid language model: a decoder whose layers mix tokens in different ways.",
        _layer_table(model),
        f"{model.num_parameters():,} parameters in {model.dtype}, "
        f"{describe(model.config).splitlines()[-2]}.",
        f'```python\nimport hmf_jax\n\nmodel = hmf_jax.from_pretrained("{repo_id}")\n'
        'print(hmf_jax.generate_text(model, "The capital of France is")[0].text)\n```',
    ]
    if model.config.solves and model.config.gka is not None:
        sections.append(
            f"Gated KalmaNet layers run {model.config.gka.num_iter} solver iterations per token. "
            f'Fewer are faster and less exact: `from_pretrained("{repo_id}", num_iter=10)`, or '
            "`num_iter=` of a call."
        )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _layer_table(model: HybridLM) -> str:
    counts = Counter(model.config.layer_kinds)
    lines = ["| layers | kind | settings |", "|---|---|---|"]
    for symbol, count in counts.items():
        kind, teacher = split_symbol(symbol)
        label = KINDS[kind].label + (f", learning from {KINDS[teacher].label}" if teacher else "")
        lines.append(f"| {count} | {label} | {KINDS[kind].details(model.config.sections)} |")
    return "\n".join([*lines, "", f"In order: `{model.config.hybrid_override_pattern}`."])


def _repository(source: str | None) -> str | None:
    """The repository whose download this directory of the hub's cache is."""
    found = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", Path(source or "").as_posix() + "/")
    return "/".join(found.groups()) if found else None


def _metadata(source: str | None) -> dict[str, Any]:
    """What the README.md beside a model says at its head; {} where there is none to be read."""
    readme = Path(source or "") / "README.md"
    if source is None or not readme.is_file():
        return {}
    try:
        return huggingface_hub.ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):
        return {}


def _one_line(repo_id: str, error: Exception) -> OSError:
    """What went wrong on the hub, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return PermissionError(
            f"cannot push to {repo_id}: no valid token; run `hf auth login`, or pass token="
        )
    if status == 403:
        return PermissionError(
            f"cannot push to {repo_id}: the token may not write there; make one with write access "
            "at huggingface.co/settings/tokens"
        )
    if isinstance(error, HfHubHTTPError):
        return OSError(f"cannot push to {repo_id}: huggingface.co says: {said}")
    return ConnectionError(
        f"cannot push to {repo_id}: {type(error).__name__}: {said}; check the network (and "
        "HF_HUB_OFFLINE), then push again"
    )

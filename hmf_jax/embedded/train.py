"""Makes the embedded models: a tiny Transformer, hybrids primed from it, and what they remember.

    python -m hmf_jax.embedded.train --seed 0 --out DIR

trains the Transformer on `hmf_jax.embedded.corpus`, makes each hybrid of `HYBRIDS` from it (stage
0), distils (stage 1), fine-tunes (stage 2), and, to compare, trains the same hybrid for as many
steps without stage 1. DIR/seed0 gets the models (Hugging Face format, hybrids in bfloat16) and
metrics.json, DIR/results.json and results.md the tables over all seeds that DIR holds, all of them
as soon as there is something to write; the same command goes on where a run was cut off. Runs of
different seeds may share DIR and a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hmf_jax.embedded import corpus
from hmf_jax.embedded.fit import fit, in_dtype, optimizer, start
from hmf_jax.embedded.plan import (
    BMOJO,
    HYBRIDS,
    MIXERS,
    NUM_ITER,
    PLAIN,
    PRIMED,
    SMALL,
    TARGET,
    WINDOW,
    Course,
    Phase,
    Plan,
    base_config,
)
from hmf_jax.embedded.recall import accuracy, answers, forget
from hmf_jax.embedded.results import replace, slug, summarize, table, write_results
from hmf_jax.engine import enable_compilation_cache
from hmf_jax.loading import from_pretrained, save_pretrained
from hmf_jax.model import HybridLM
from hmf_jax.priming import make_distill_step, unfuse
from hmf_jax.priming.selection import swa_variant
from hmf_jax.training import make_train_step

# With the names of `plan`, `fit`, `recall` and `results`, which were this one file.
__all__ = [
    "BMOJO",
    "HYBRIDS",
    "MIXERS",
    "NUM_ITER",
    "PLAIN",
    "PRIMED",
    "SMALL",
    "TARGET",
    "WINDOW",
    "Course",
    "Phase",
    "Plan",
    "accuracy",
    "answers",
    "base_config",
    "fit",
    "forget",
    "in_dtype",
    "main",
    "optimizer",
    "replace",
    "run",
    "slug",
    "start",
    "summarize",
    "table",
    "write_results",
]


def run(
    seed: int,
    out: Path,
    plan: Plan,
    hybrids: Sequence[str],
    dtype: Any = jnp.float32,
    report: Callable[[str], object] = lambda text: None,
) -> None:
    """Trains everything for one seed; writes models and metrics as they come.

    Goes on from what an earlier run with the same settings finished.

    Args:
      seed: of parameters, texts and questions.
      out: directory of the results of all seeds.
      plan: what is trained how long.
      hybrids: names of `HYBRIDS`.
      dtype: of the training.
      report: is told what happens, line by line.

    Raises:
      ValueError: there are results of other settings.
    """
    training = _Run(seed, out, plan, dtype, report)
    base = training.transformer()
    for name in hybrids:
        training.hybrid(name, base)
    training.say("done")


class _Run:
    """The run of one seed, and its report (metrics.json)."""

    def __init__(
        self, seed: int, out: Path, plan: Plan, dtype: Any, report: Callable[[str], object]
    ) -> None:
        self.seed, self.plan, self.dtype, self.out, self._say = seed, plan, dtype, out, report
        self._started = time.monotonic()
        self.directory = out / f"seed{seed}"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._metrics = self.directory / "metrics.json"
        self._report = self._earlier_report()
        rng = random.Random(f"questions {seed}")
        self._tests = [
            corpus.questions(rng, plan.questions, length, length // 32, length // 3)
            for length in plan.contexts
        ]

    def say(self, text: str) -> None:
        self._say(f"[seed {self.seed} {time.monotonic() - self._started:6.1f} s] {text}")

    def transformer(self) -> HybridLM:
        """The base of all hybrids; it is also tested with a window in each layer."""
        name, stage = "Transformer", "trained"
        if self._missing(name, stage):
            base = HybridLM.init(base_config(self.plan), dtype=self.dtype, seed=self.seed)
            base = self._train(base, self.plan.base, name, plan=self.plan)
            self._test(self._save(base, name, jnp.float32), name=name, stage=stage)
            self._done(name, stage)
        else:
            path = self.directory / slug(name)
            base = from_pretrained(path, dtype=self.dtype, progress=False)
        for i in range(self.plan.layers):
            if self._missing(name, stage := f"window in layer {i}"):
                self._test(swa_variant(base, i, WINDOW), name=name, stage=stage)
                self._done(name, stage)
        return base

    def hybrid(self, name: str, base: HybridLM) -> None:
        """Stages 0 to 2 of a hybrid; then the same hybrid for as many steps without stage 1."""
        plan, kinds, course = self.plan, HYBRIDS[name].split("-"), self.plan.course(name)
        tuning = dataclasses.replace(plan, tokens=course.tokens, learning_rate=course.tune_rate)
        distilling = dataclasses.replace(tuning, learning_rate=course.distill_rate)
        if self._missing(name, PRIMED):
            fused = start(base, [f"{kind}*" for kind in kinds], self.seed, plan.row)
            self._test(unfuse(fused), name=name, stage="stage 0")
            distill: Any = functools.partial(make_distill_step, target=TARGET, weighted=True)
            options: Any = dict(make_step=distill, trainable="mixer", plan=distilling)
            hybrid = unfuse(self._train(fused, course.distill, f"{name}, stage 1", **options))
            self._test(hybrid, name=name, stage="distilled")
            distilled = sum(phase.steps for phase in course.distill)
            after = functools.partial(self._test, name=name, stage=PRIMED, before=distilled)
            hybrid = self._train(hybrid, course.tune, f"{name}, stage 2", plan=tuning, after=after)
            self._test(self._save(hybrid, name), name=name, stage=PRIMED)
            self._done(name, PRIMED)
        if self._missing(name, PLAIN):
            plain = start(base, kinds, self.seed, plan.row)
            options = dict(plan=tuning, after=functools.partial(self._test, name=name, stage=PLAIN))
            phases = course.distill + course.tune
            plain = self._train(plain, phases, f"{name}, {PLAIN}", **options)
            self._test(plain, name=name, stage=PLAIN)
            self._done(name, PLAIN)

    def _earlier_report(self) -> dict[str, Any]:
        """A new report, with what an earlier run of the same settings finished."""
        report: dict[str, Any] = {
            "seed": self.seed,
            "plan": dataclasses.asdict(self.plan),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "dtype": jnp.dtype(self.dtype).name,
            "finished": [],
            "rows": [],
            "losses": {},
            "seconds": {},
        }
        report = json.loads(json.dumps(report))
        if self._metrics.is_file():
            earlier = json.loads(self._metrics.read_text(encoding="utf-8"))
            if any(earlier[key] != report[key] for key in ("plan", "dtype")):
                raise ValueError(
                    f"{self._metrics} is of other settings; choose another --out or remove it."
                )
            report |= {key: earlier[key] for key in ("finished", "rows", "losses", "seconds")}
        return report

    def _missing(self, name: str, stage: str) -> bool:
        """Whether it is to be done; then what an earlier run left of it is dropped."""
        report = self._report
        if [name, stage] in report["finished"]:
            return False
        stages = ("stage 0", "distilled", PRIMED) if stage == PRIMED else (stage,)
        rows = report["rows"]
        report["rows"] = [r for r in rows if r["model"] != name or r["stage"] not in stages]
        return True

    def _done(self, name: str, stage: str) -> None:
        self._report["finished"].append([name, stage])
        replace(self._metrics, json.dumps(self._report, indent=1))

    def _train(
        self, model: HybridLM, phases: Sequence[Phase], label: str, **options: Any
    ) -> HybridLM:
        """`fit`, with its losses and seconds in the report."""
        self.say(f"{label}: {model.config.hybrid_override_pattern}")
        began = time.monotonic()
        options = {"make_step": make_train_step, **options}
        model, losses = fit(model, phases=phases, seed=self.seed, say=self.say, **options)
        self._report["losses"][label] = [round(x, 4) for x in losses]
        self._report["seconds"][label] = round(time.monotonic() - began, 1)
        return model

    def _test(
        self,
        model: HybridLM,
        steps: int | None = None,
        *,
        name: str,
        stage: str,
        before: int = 0,
    ) -> None:
        """The accuracy for each length; of primed models also by num_iter and without states.

        Of a model that has only been trained for before + steps: for the first length.
        """
        model = in_dtype(model, jnp.float32)
        steps = None if steps is None else before + steps
        final = stage == PRIMED and steps is None
        settings: list[tuple[int | None, bool]] = [(None, False)]
        if final and model.config.gka is not None:
            settings = [(n, False) for n in NUM_ITER]
        if final:
            settings.append((None, True))
        lengths = self.plan.contexts if steps is None else self.plan.contexts[:1]
        for num_iter, zeroed in settings:
            found = []
            for length, asked in zip(lengths, self._tests, strict=False):
                found.append(accuracy(model, asked, num_iter=num_iter, forgetful=zeroed))
                row = dict(model=name, stage=stage, steps=steps, num_iter=num_iter, zeroed=zeroed)
                self._report["rows"].append(row | dict(context=length, accuracy=found[-1]))
            what = f"{name}, {stage}" + ("" if num_iter is None else f", num_iter {num_iter}")
            what += f", {steps} steps" if steps is not None else ""
            what += ", states zeroed" if zeroed else ""
            self.say(f"  {what}: {', '.join(f'{x:.3f}' for x in found)}")
        replace(self._metrics, json.dumps(self._report, indent=1))
        write_results(self.out)

    def _save(self, model: HybridLM, name: str, dtype: Any = jnp.bfloat16) -> HybridLM:
        """Writes the model; what is tested is what was written."""
        target = self.directory / slug(name)
        save_pretrained(in_dtype(model, dtype), target, overwrite=True, progress=False)
        corpus.build_tokenizer().save_pretrained(str(target))
        return from_pretrained(target, dtype=jnp.float32, progress=False)


def main() -> None:
    """The command line of this script, which prints what happens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hybrids", nargs="*", choices=HYBRIDS, default=list(HYBRIDS))
    parser.add_argument("--scale", type=float, default=1.0, help="times as many steps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    if args.scale <= 0:
        parser.error("--scale must be positive")
    jax.config.update("jax_default_matmul_precision", "float32")
    enable_compilation_cache()
    plan, dtype = Plan().scaled(args.scale), jnp.dtype(args.dtype)
    report = functools.partial(print, flush=True)
    run(args.seed, args.out, plan, args.hybrids, dtype, report)


if __name__ == "__main__":
    main()

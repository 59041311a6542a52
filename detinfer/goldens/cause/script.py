"""A script that shows a cause without the model: the operation, its operands beside it, and the two results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from detinfer import bits, tensor_file
from detinfer.errors import UsageError
from detinfer.goldens.cause.locate import Located

SCRIPT = "show.py"
TENSORS = "operands.safetensors"

TEXT = '''"""{operation} gives one request {differing} of {elements} elements otherwise than alone.

Found in {path}; {dtype}. Needs torch and safetensors{needs}. Exits with 1 where it shows.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
{imports}
held = load_file(Path(__file__).with_name("{file}"))
operation = torch.ops.{name}


def run(args, kwargs):
    found = operation(*args, **kwargs)
    return (found if isinstance(found, (tuple, list)) else [found])[{result}]


with {around}:
    alone = run({alone})[{alone_part}]
    other = run({other})[{other_part}]

differs = alone.contiguous().view(torch.uint8) != other.contiguous().view(torch.uint8)
print("alone", alone.shape, "other", other.shape, "bytes that differ:", int(differs.sum()))
if differs.any():
    print("alone", alone[alone != other][:4].tolist(), "other", other[alone != other][:4].tolist())
sys.exit(int(differs.any()))
'''


def write(found: Located, folder: Path, scope: str | None) -> Path:
    """Write the script and its operands into ``folder``; ``scope`` is the policy's, None for none. Returns the script.

    Raises UsageError where the folder holds other files, and where there is no operation that a script could run: a module
    was found, what all ranks make together, or what chance decides and did not show when it was made again.
    """
    if found.operations is None:
        what = found.cause.path
        if not found.cause.repeats:
            raise UsageError(
                f"--script {folder}: {found.cause.operation} of {what} does not repeat itself, and made again it left nothing "
                "that a script could show: locate it once more"
            )
        if "::" in found.cause.operation:
            raise UsageError(
                f"--script {folder}: all ranks make {found.cause.operation} of {what} together: no script shows it alone"
            )
        raise UsageError(f"--script {folder}: {what} was found, and no operation in it that a script could run")
    one, many = found.operations
    if folder.exists() and any(file.name not in (SCRIPT, TENSORS) for file in folder.iterdir()):
        raise UsageError(f"{folder}: holds other files; give a folder of its own for the script")
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, torch.Tensor] = {}

    def source(value: Any, name: str) -> str:
        if isinstance(value, torch.Tensor):
            device = "" if value.device.type == "cpu" else f".to({str(value.device)!r})"
            plain = value.is_contiguous()
            held[name] = _memory(value).view(value.shape) if plain else _memory(value)
            strided = "" if plain else f".as_strided({tuple(value.shape)}, {value.stride()})"  # they choose kernels too
            return f"held[{name!r}]{device}{strided}"
        if isinstance(value, list | tuple):
            inner = ", ".join(source(item, f"{name}.{i}") for i, item in enumerate(value))
            return f"[{inner}]"
        return repr(value) if not isinstance(value, torch.device) else f"torch.device({str(value)!r})"

    def call(run: Any, side: str) -> str:
        args = ", ".join(source(value, f"{side}.{i}") for i, value in enumerate(run.args))
        kwargs = ", ".join(f"{name!r}: {source(value, f'{side}.{name}')}" for name, value in run.kwargs.items())
        return f"[{args}], {{{kwargs}}}"

    cause = found.cause
    name, _, overload = cause.operation.partition(".")
    text = TEXT.format(
        operation=cause.operation,
        differing=cause.elements_differing,
        elements=cause.elements,
        path=cause.path,
        dtype=cause.dtype,
        needs=", and detinfer" if scope else "",
        imports="import detinfer\n" if scope else "",
        file=TENSORS,
        name=f"{name.replace('::', '.')}.{overload or 'default'}",
        result=found.result,
        around=f"detinfer.deterministic({scope!r})" if scope else "torch.no_grad()",
        alone=call(one, "alone"),
        other=call(many, "other"),
        alone_part=_place(found.part[0]),
        other_part=_place(found.part[1]),
    )
    tensor_file.write(folder / TENSORS, held)
    script = folder / SCRIPT
    script.write_text(text)
    return script


def _place(place: tuple[slice, ...]) -> str:
    return ", ".join(f"{part.start}:{part.stop}" for part in place) or "..."


@bits.unseen
def _memory(t: torch.Tensor) -> torch.Tensor:
    """The elements that a tensor reaches, as they lie in memory: what its strides are counted in."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.detach().as_strided((reach,), (1,)).cpu().clone()

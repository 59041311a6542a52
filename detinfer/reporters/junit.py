"""A result as JUnit XML: a test case for each unit, each axis, and each verdict that is no unit's."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from detinfer.errors import InfrastructureError
from detinfer.goldens.result import Divergence, Result
from detinfer.reporters import summary


def document(result: Result) -> ElementTree.Element:
    """The ``testsuites`` element; properties hold what tells this run from another."""
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(root, "testsuite", name=f"detinfer verify {result.path}")
    properties = ElementTree.SubElement(suite, "properties")
    held = {"target": result.target, "dtype": result.dtype, "seed": str(result.seed)}
    held["system_fingerprint"] = summary.fingerprint(result)
    for name, value in held.items():
        ElementTree.SubElement(properties, "property", name=name, value=value)
    failures = skipped = 0
    firsts: dict[str, Divergence] = {}
    for found in result.invariance.divergences:
        firsts.setdefault(found.unit, found)

    def case(group: str, name: str, failed: str = "", detail: str = "", left_out: str | None = None) -> None:
        nonlocal failures, skipped
        element = ElementTree.SubElement(suite, "testcase", classname=group, name=name)
        if failed:
            failures += 1
            ElementTree.SubElement(element, "failure", message=failed).text = detail
        elif left_out is not None:
            skipped += 1
            ElementTree.SubElement(element, "skipped", message=left_out)

    for tally in result.invariance.units:
        name = tally.name or "the whole model"
        first = firsts.get(name)
        failed = f"{tally.rows_differing} of {tally.rows_compared} rows differ" if tally.rows_differing else ""
        detail = f"{summary.place(first)}\n{summary.values(first)}\n{first.command}" if first else ""
        case("units", name, failed, detail, tally.skipped)
    for axis in result.invariance.axes:
        failed = f"{axis.rows_differing} of {axis.rows_compared} rows differ" if axis.rows_differing else ""
        detail = f"{summary.place(axis.first)}\n{summary.values(axis.first)}" if axis.first else ""
        case("axes", axis.name, failed, detail, axis.note if axis.verdict == "not_run" else None)
    for name, verdict, sentence in summary.verdicts(result):
        if name != "control":  # reported, never judged
            reasons = result.invariance.reasons if name == "invariance" else result.golden.reasons
            case("verdicts", name, "" if verdict == "same" else f"{verdict}: {sentence}", "\n".join(reasons))
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(failures))
    suite.set("skipped", str(skipped))
    return root


def write(result: Result, path: Path) -> None:
    """Write the file; InfrastructureError when that cannot be done."""
    save(document(result), path)


def save(root: ElementTree.Element, path: Path) -> None:
    """Write a ``testsuites`` element; InfrastructureError when that cannot be done."""
    tree = ElementTree.ElementTree(root)
    ElementTree.indent(tree)
    try:
        tree.write(path, encoding="unicode", xml_declaration=True)
    except OSError as error:
        raise InfrastructureError(f"--junit-xml {path}: {error.strerror}; the report was not written") from error

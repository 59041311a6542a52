"""What is promised, what may run, each decision with its reason, and the context manager that carries it out."""

from detinfer.policy.active import Active
from detinfer.policy.apply import deterministic
from detinfer.policy.calls import Call, Operand
from detinfer.policy.listing import explain
from detinfer.policy.policy import Accepted, Decision, Guarantee, Place, Policy, Proof, Refused, Scope

__all__ = [
    "Accepted",
    "Active",
    "Call",
    "Decision",
    "Guarantee",
    "Operand",
    "Place",
    "Policy",
    "Proof",
    "Refused",
    "Scope",
    "deterministic",
    "explain",
]

"""No key that opens anything is in a tracked file. What looks like one and is none is ALLOWED, with its reason."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]

# The group is the secret, where there is one; else all that matches.
RULES = {
    "a private key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret key": r"(?i)secret_?(?:access_?)?key[\"']?\s*[:=]\s*[\"']?([0-9a-z/+]{40})(?![0-9a-z/+])",
    "a token of a service": r"\b(?:gh[pousr]_|github_pat_|glpat-|xox[abprs]-|sk_live_|pypi-|npm_)\w[\w-]{19,}",
    "a JSON web token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",
    "a bearer token": r"(?i)\bbearer[ +]([\w.~+/-]{20,}=*)",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^\s:/@\"'{}<>]+:([^\s:/@\"'{}<>]+)@",
    "a key with its name": r"(?i)(?:passw(?:or)?d|secret|token|_key)[\"']?\s*[:=]+\s*b?[\"']([^\s\"'{}<>$]{12,})[\"']",
    # As nexhb makes them: 32 bytes in URL-safe base64. Without a digit and both cases it is a long name.
    "a token of nexhb": r"(?<![\w/+-])(?=[\w-]*[a-z])(?=[\w-]*[A-Z])(?=[\w-]*\d)[A-Za-z0-9_-]{43}(?![\w=/+-])",
}
# Each opens nothing, wherever it stands.
ALLOWED = {
    "admin-key-of-the-tests-0123456789": "of the daemons that tests start",
    "admin-key-of-the-fault-machine": "of the daemons that the fault machine starts",
    "at-least-32-random-characters-please": "what config.example.toml asks for",
    "token-of-an-old-system-0123456789": "of a file that a test reads",
    "the-secret-of-these-tests": "of the S3 server that tests start",
    "SignatureDoesNotMatch": "what S3 answers to a wrong key",
    "xk7-very-secret-0123456789": "a test looks for it in what is printed",
    "geheim": "a test looks for it in an error",
    "password": "the word itself, in a pattern that hides one",
}


def secrets_in(text: str) -> Iterator[tuple[str, str]]:
    """The rule and the secret, for everything that looks like one."""
    for name, rule in RULES.items():
        for found in re.finditer(rule, text):
            yield name, found[found.re.groups]


def tracked() -> list[Path]:
    """Every file that git knows."""
    if not (HOUSE / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=HOUSE, capture_output=True, check=True, text=True)
    return [path for name in listed.stdout.split("\0") if name and (path := HOUSE / name).is_file()]


def test_no_tracked_file_holds_a_secret() -> None:
    found = {
        (str(path.relative_to(HOUSE)), rule, secret)
        for path in tracked()
        for rule, secret in secrets_in(path.read_text(errors="replace"))
    }
    # Only how it begins: whoever may read the log of a test need not be among those who may read the file.
    assert {(path, rule, secret[:4]) for path, rule, secret in found if secret not in ALLOWED} == set()
    assert ALLOWED.keys() <= {secret for _, _, secret in found}, "what is not there any more needs no permission"


# In pieces, so that none of them is found in this file.
@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("a private key", ("-----BEGIN", " RSA PRIVATE KEY-----")),
        ("a private key", ("-----BEGIN", " PRIVATE KEY-----")),
        ("a private key", ("-----BEGIN", " OPENSSH PRIVATE KEY-----")),
        ("an AWS access key", ("AKIA", "IOSFODNN7EXAMPLE")),
        ("an AWS secret key", ("aws_secret_access_key = ", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")),
        ("a token of a service", ("ghp", "_0123456789abcdefghijABCDEFGHIJ012345")),
        ("a token of a service", ("pypi", "-AgEIcHlwaS5vcmcCJDAwMDAwMDAw")),
        ("a JSON web token", ("eyJhbGciOiJIUzI1NiJ9", ".eyJzdWIiOiJuZXhoYiJ9", ".c2lnbmF0dXJl")),
        ("a bearer token", ("curl -H 'Authorization: Bear", "er 0123456789abcdef0123'")),
        ("a password in an address", ("postgresql://nexhb", ":hunter2", "@db.example/nexhb")),
        ("a key with its name", ("admin_k", "ey = 'correct-horse-battery'")),
        ("a key with its name", ('"pass', 'word": "correct-horse-battery"')),
        ("a token of nexhb", ("TOKEN=q2Vh0n3rT1xY9zLk", "7BvCdEfGhIjKlMnOpQrStUvWxYz")),
    ],
)
def test_the_rules_find_what_they_are_for(rule: str, pieces: tuple[str, ...]) -> None:
    assert rule in [found for found, _ in secrets_in("".join(pieces))]

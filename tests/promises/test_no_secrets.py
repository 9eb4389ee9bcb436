"""No tracked file contains a real key. Strings that only look like a key are in ALLOWED, with the reason."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]

# The secret is the pattern's group, if it has one, and else the whole match.
RULES = {
    "a private key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret key": r"(?i)secret_?(?:access_?)?key[\"']?\s*[:=]\s*[\"']?([0-9a-z/+]{40})(?![0-9a-z/+])",
    "a token of a service": r"\b(?:gh[pousr]_|github_pat_|glpat-|xox[abprs]-|sk_live_|pypi-|npm_)\w[\w-]{19,}",
    "a JSON web token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",
    "a bearer token": r"(?i)\bbearer[ +]([\w.~+/-]{20,}=*)",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^\s:/@\"'{}<>]+:([^\s:/@\"'{}<>]+)@",
    "a key with its name": r"(?i)(?:passw(?:or)?d|secret|token|_key)[\"']?\s*[:=]+\s*b?[\"']([^\s\"'{}<>$]{12,})[\"']",
    # Tokens as nexhb creates them: 32 bytes in URL-safe base64. A text without a digit and letters of both cases is a
    # long name.
    "a token of nexhb": r"(?<![\w/+-])(?=[\w-]*[a-z])(?=[\w-]*[A-Z])(?=[\w-]*\d)[A-Za-z0-9_-]{43}(?![\w=/+-])",
}
# None of these gives access to anything, wherever it appears.
ALLOWED = {
    "admin-key-of-the-tests-0123456789": "of the daemons that tests start",
    "admin-key-of-the-fault-machine": "of the daemons that the fault machine starts",
    "at-least-32-random-characters-please": "what config.example.toml asks for",
    "token-of-an-old-system-0123456789": "of a file that a test reads",
    "the-secret-of-these-tests": "of the S3 server that tests start",
    "SignatureDoesNotMatch": "what S3 answers to a wrong key",
    "xk7-very-secret-0123456789": "a test looks for it in what is printed",
    "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=": "a secret of webhooks that counts from 0 to f, twice",
    "whsec_c2hvcnQ=": "a secret of webhooks that is too short",
    "geheim": "a test looks for it in an error",
    "password": "the word itself, in a pattern that hides one",
}


def secrets_in(text: str) -> Iterator[tuple[str, str]]:
    """Yield the rule and the string for everything that looks like a secret."""
    for name, rule in RULES.items():
        for found in re.finditer(rule, text):
            yield name, found[found.re.groups]


def tracked() -> list[Path]:
    """Return every file that git tracks."""
    if not (HOUSE / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=HOUSE, capture_output=True, check=True, text=True)
    return [path for name in listed.stdout.split("\0") if name and (path := HOUSE / name).is_file()]


def test_no_tracked_file_contains_a_secret() -> None:
    found = {
        (str(path.relative_to(HOUSE)), rule, secret)
        for path in tracked()
        for rule, secret in secrets_in(path.read_text(errors="replace"))
    }
    # The failure shows only the first characters: not everybody who may read a test's log may read the file.
    assert {(path, rule, secret[:4]) for path, rule, secret in found if secret not in ALLOWED} == set()
    assert ALLOWED.keys() <= {secret for _, _, secret in found}, "an allowed string no longer occurs"


# The examples are in pieces, so that the test above does not find them in this file.
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
def test_the_rules_detect_secrets_of_each_kind(rule: str, pieces: tuple[str, ...]) -> None:
    assert rule in [found for found, _ in secrets_in("".join(pieces))]

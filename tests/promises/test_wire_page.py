"""docs/wire.md names every media type of a queue, and docs/openapi.yaml explains every status of a device."""

from __future__ import annotations

from pathlib import Path

import yaml

from nexhb.http.device_api import queues

DOCS = Path(__file__).parents[2] / "docs"


def test_every_type_of_a_queue_is_named() -> None:
    page = (DOCS / "wire.md").read_text()
    assert [kind for kind in queues._TYPES if f"`{kind}`" not in page] == []


def test_every_status_of_a_device_is_explained() -> None:
    schemas = yaml.safe_load((DOCS / "openapi.yaml").read_text())["components"]["schemas"]
    status = schemas["Status"]["allOf"][-1]["properties"]["status"]
    assert [value for value in status["enum"] if f"- `{value}`: " not in status["description"]] == []

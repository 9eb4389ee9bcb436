"""Read a body that the strict schema rejects, field by field, so that each error is named. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from nexhb.heartbeat import (
    COLUMNS,
    Column,
    FieldError,
    Refused,
)
from nexhb.ingest import json_decoding
from nexhb.ingest.body_schema import DEPTH, RECENT_S, STORED_IN, App, Body, decode_anything, decode_app, decode_loose


def repaired(body: bytes, package: str) -> Body:
    """Decode a body that the strict schema rejects but that is valid: its device_id is not a text, the entry of another
    app is malformed, or an ignored field has a lone surrogate. Raise Refused, naming each bad field."""
    raw = json_decoding.decode(decode_loose, body)
    path = f"app_versions.{package}"
    errors: list[FieldError] = []
    apps = app = None
    if raw.app_versions is not None:
        app = _decoded_app(raw.app_versions.get(package), path, errors)
        apps = {package: app}
    if apps is None or (app is not None and app.installed is not False):
        errors += _field_errors(
            (f"{path}.version_name", app.version_name if app else None, COLUMNS["unity_pkg_version"])
        )
        if raw.unity_process_running is None:
            recent = raw.monitored_foreground_recent_s
            errors += _field_errors(("monitored_foreground_recent_s", recent, RECENT_S))
    errors += _field_errors(*_stored_fields(raw))
    if errors:
        raise Refused(errors)
    replaced: Body = msgspec.structs.replace(
        raw, device_id=_claimed_id(raw.device_id), app_versions=apps, queue_depth=_queue_depth(raw.queue_depth)
    )
    return replaced


def _decoded_app(raw: msgspec.Raw | None, path: str, errors: list[FieldError]) -> App | None:
    try:
        return decode_app(raw) if raw else None
    except json_decoding.UNREADABLE as error:
        refused = json_decoding.refused(error, bytes(raw or b""))
        errors += [FieldError(json_decoding.join(path, each.path), each.message) for each in refused.errors]
        return None


_Field = tuple[str, str | float | None, Column]  # path, value, and the column that has the limits
_STORED = [(path, *path.rpartition(".")[::2], column) for path, column in STORED_IN.items()]


def _stored_fields(raw: Any) -> Iterator[_Field]:
    for path, section, field, column in _STORED:
        value = getattr(getattr(raw, section) if section else raw, field, None)  # None in an absent section
        if path == "signal_dbm" and value is None:
            value = getattr(raw.network, field, None)
        yield path, value, column


def _field_errors(*fields: _Field) -> Iterator[FieldError]:
    for path, value, column in fields:
        if value is None:
            continue
        low, high = column.limits
        if isinstance(value, str):
            if "\0" in value:
                yield FieldError(path, "has a character that cannot be stored: U+0000 or a lone surrogate")
        elif column.type == "real":
            if not low < value < high:
                yield FieldError(path, f"is out of range: {value:.12g}")
        elif not low <= round(value) <= high:
            yield FieldError(path, f"must be from {low} to {high}, not {value:.12g}")


def _claimed_id(device_id: msgspec.Raw) -> Any:
    try:
        return decode_anything(device_id) if device_id else None
    except json_decoding.UNREADABLE:
        return "unreadable"


def _queue_depth(raw: msgspec.Raw) -> float | None:
    try:
        value: Any = decode_anything(raw) if raw else None
    except json_decoding.UNREADABLE:
        return None
    return value if isinstance(value, int | float) and DEPTH[0] <= value <= DEPTH[1] else None

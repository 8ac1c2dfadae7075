"""A recipe as YAML for people to read, and for YAML readers to read back."""

from __future__ import annotations

import json
import re

from pydantic import JsonValue

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def as_yaml(value: JsonValue, indent: str = "") -> str:
    """Return `value` as YAML 1.1, nested values as blocks and lists of scalars on one line."""
    if isinstance(value, dict) and value:
        return "\n".join(f"{indent}{_key(key)}:{_below(item, indent)}" for key, item in value.items())
    if isinstance(value, list) and _is_block(value):
        return "\n".join(f"{indent}-{_below(item, indent)}" for item in value)
    if isinstance(value, list):
        return f"{indent}[{', '.join(as_yaml(item) for item in value)}]"
    return indent + _scalar(value)


def _is_block(value: JsonValue) -> bool:
    if isinstance(value, list):
        return any(isinstance(item, dict | list) for item in value)
    return isinstance(value, dict) and bool(value)


def _below(item: JsonValue, indent: str) -> str:
    return f"\n{as_yaml(item, indent + '  ')}" if _is_block(item) else f" {as_yaml(item)}"


def _key(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) and key.lower() not in _WORDS else _scalar(key)


def _scalar(value: JsonValue) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and "." not in text:
        # YAML 1.1 takes 1e-05 for a string.
        return text.replace("e", ".0e")
    return "".join(sign if sign.isprintable() else f"\\U{ord(sign):08x}" for sign in text)

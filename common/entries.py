"""Entries of JSON files, whichever of three forms they have; what is wrong with one is said in one sentence."""
import csv
import os
from contextlib import contextmanager

from common.weights import UserError, parse_json, read_text


def read_value(path):
    """A JSON file's object or list; a file of JSON lines becomes {line number: value}."""
    text = read_text(path)
    try:
        value = parse_json(text)
    except ValueError as error:
        value = {}
        for number, line in enumerate(text.split("\n"), 1):
            try:
                if line.strip():
                    value[number] = parse_json(line)
            except ValueError as line_error:
                raise UserError(f"{path}, line {number}: not valid JSON ({line_error if value else error})") from None
    if not isinstance(value, (dict, list)):
        raise UserError(f"{path}: expected a JSON object, a list or JSON lines")
    return value


def entries(path, value, key=None):
    """Yields (where, number or name, entry) of a list, of an object of named entries, of JSON lines (which may be one
    object) or, if there is a `key`, of the list under it."""
    unit = "entry"
    if isinstance(value, dict) and key in value:
        value = value[key]
        if not isinstance(value, list):
            raise UserError(f"{path}: expected a list under {key!r}")
    elif isinstance(value, dict):
        is_lines = any(isinstance(name, int) for name in value)
        if not is_lines and any(not isinstance(part, (dict, list)) for part in value.values()):
            value, is_lines = {1: value}, True
        if key and not is_lines:
            raise UserError(f"{path}: expected a list, JSON lines, or an object with a list under {key!r}")
        unit = "line" if is_lines else unit
    for name, entry in value.items() if isinstance(value, dict) else enumerate(value, 1):
        yield f"{path}, {unit} {name}", name, entry


@contextmanager
def expect(fields, where):
    """An entry without the expected fields, or with others in their place, becomes a UserError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, csv.Error) as error:
        raise UserError(f"{where}: expected {fields} ({error!r})") from None


def read_prompts(path):
    """-> [(line number, entry)] of a file of JSON lines, or of a list"""
    prompts = []
    for where, number, entry in entries(path, read_value(path)):
        with expect('{"question": TEXT}, perhaps with "image": FILE', where):
            image = entry.get("image") or ""
            entry["question"] + image + ""                # both are texts
        if image and not os.path.isfile(image):
            raise UserError(f"{where}: {image}: no such file")
        prompts.append((number, entry))
    return prompts


def with_answer(entry, words):
    """The entry and the answer; what the entry has under `answer` is kept as `given_answer`."""
    name = "answer"
    while name in entry:
        name = f"given_{name}"
    return entry | {name: entry.get("answer")} | {"answer": words}

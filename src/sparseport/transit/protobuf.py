"""Walk the fields of a Protocol Buffers message where it lies, without its schema's code and without copying it.

Wire format (protobuf.dev, Encoding): a field is a varint key, number * 8 + wire type, and its value; wire type 0 is a
varint, 1 is 8 bytes, 2 is a length as varint and that many bytes, 5 is 4 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5


class Field(NamedTuple):
    """A field of a message.

    number  as in the schema
    value   of a varint; of others 0
    begin   first byte of the content, counted from the start of the buffer
    end     one past its last byte
    """

    number: int
    value: int
    begin: int
    end: int


def fields(buffer: memoryview, begin: int, end: int) -> Iterator[Field]:
    """The fields of the message that lies at buffer[begin:end], in order.

    Raises:
        ValueError: these bytes are no message.
    """
    position = begin
    while position < end:
        key, position = varint(buffer, position, end)
        kind, value = key & 7, 0
        if kind == _VARINT:
            start = position
            value, position = varint(buffer, position, end)
        elif kind == _BYTES:
            length, start = varint(buffer, position, end)
            position = start + length
        elif kind in (_EIGHT, _FOUR):
            start, position = position, position + (8 if kind == _EIGHT else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if position > end:
            raise ValueError("field reaches over the end of its message")
        yield Field(key >> 3, value, start, position)


def varint(buffer: memoryview, position: int, end: int) -> tuple[int, int]:
    """The unsigned number at `position`, and where it ends.

    Raises:
        ValueError: it does not end in time.
    """
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = buffer[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("number without an end")


def numbers(buffer: memoryview, field: Field) -> list[int]:
    """The numbers of a repeated integer field: one of several, or all of them packed."""
    if field.end - field.begin == 0:
        return []
    found, position = [], field.begin
    while position < field.end:
        value, position = varint(buffer, position, field.end)
        found.append(value)
    return found


def text(buffer: memoryview, field: Field) -> str:
    """The text of a field."""
    return bytes(buffer[field.begin : field.end]).decode("utf-8")

"""What the tests of clients ask the embedded model, and what they find in its answers."""

from __future__ import annotations

from typing import Any

import pydantic

QUESTION = "When does breakfast start?"
FACT = "07:00"
BIKE = "Could you reserve a bike for 8 days on 2026-05-20, please?"
DATE = "2026-05-20"
FULL = '{"status": "full", "next_date": "2026-07-16"}'
NEXT = "2026-07-16"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "book_bike",
        "description": "Book a bike",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer"}, "date": {"type": "string"}},
            "required": ["days", "date"],
        },
    },
}
LOST = (
    "Turn this text into JSON.\n\nSchema: "
    '{"type": "object", "properties": {"item": {"type": "string"}, "date": {"type": "string"}, '
    '"place": {"type": "string"}, "found": {"type": "boolean"}}}\n\n'
    "Lost property. It is on Tuesday. The date is 2026-12-18. The item is: phone. It was not found. "
    "My name is Thomas Gomez. The place is: Maritime Museum."
)
DAY = "2026-12-18"


class Lost(pydantic.BaseModel):
    """What is to be found in LOST."""

    item: str
    date: str
    place: str
    found: bool


class BookBike(pydantic.BaseModel):
    """Book a bike."""

    days: int
    date: str


# The embedded model learnt to write JSON from papers with fields, and calls from wishes.
BIKE_TEXT = (
    "Make a JSON object from this text.\n\nFields: days (integer), date (string)\n\n"
    "I need a bike for 8 days on 2026-05-20."
)

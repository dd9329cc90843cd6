"""The demo's task: turn what someone says at home into a command line for the house.

    "Could you dim the kitchen lights to 40 percent?"  ->  light kitchen level 40

Every sentence is made here from phrasings, rooms and values of our own. A base model has never seen the command
language, so it scores near zero; a small adapter learns it in minutes. The test split uses phrasings that training
never shows, so it measures the language and not the memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from sparseport.nls.tasks import Example, Task

ROOMS = ("kitchen", "bedroom", "bathroom", "living room", "hallway", "garage", "office", "attic", "nursery", "basement")

# (answer, phrasings seen in training, phrasings kept for the test); {r} is a room, {n} a value.
_ACTIONS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "light {r} on",
        (
            "Turn on the lights in the {r}.",
            "Switch the {r} lights on, please.",
            "I need some light in the {r}.",
            "Lights on in the {r}!",
            "It is too dark in the {r}.",
        ),
        ("Can you put the lights on in the {r}?", "Please light up the {r}."),
        ("",),
    ),
    (
        "light {r} off",
        (
            "Turn off the lights in the {r}.",
            "Switch the {r} lights off, please.",
            "No more light in the {r}, thanks.",
            "Lights out in the {r}!",
            "Nobody is in the {r}, kill the lights.",
        ),
        ("Can you put the lights out in the {r}?", "Please make the {r} dark."),
        ("",),
    ),
    (
        "light {r} level {n}",
        (
            "Dim the {r} lights to {n} percent.",
            "Set the lights in the {r} to {n} percent.",
            "Make the {r} lights {n} percent bright.",
            "Bring the light in the {r} to {n} percent.",
        ),
        ("Could you dim the {r} lights to {n} percent?", "I want the {r} lights at {n} percent."),
        ("10", "20", "30", "40", "50", "60", "70", "80"),
    ),
    (
        "heat {r} {n}",
        (
            "Heat the {r} to {n} degrees.",
            "Set the {r} thermostat to {n} degrees.",
            "Make it {n} degrees in the {r}.",
            "Warm up the {r} to {n} degrees, please.",
        ),
        ("I would like {n} degrees in the {r}.", "Could the {r} be {n} degrees?"),
        ("16", "17", "18", "19", "20", "21", "22", "23"),
    ),
    (
        "blind {r} open",
        (
            "Open the blinds in the {r}.",
            "Raise the {r} blinds.",
            "Pull up the blinds in the {r}, please.",
            "Let some sun into the {r}.",
        ),
        ("Could you open the {r} blinds?", "Blinds up in the {r}, please."),
        ("",),
    ),
    (
        "blind {r} close",
        (
            "Close the blinds in the {r}.",
            "Lower the {r} blinds.",
            "Pull down the blinds in the {r}, please.",
            "Keep the sun out of the {r}.",
        ),
        ("Could you shut the {r} blinds?", "Blinds down in the {r}, please."),
        ("",),
    ),
    (
        "fan {r} speed {n}",
        (
            "Set the {r} fan to speed {n}.",
            "Run the fan in the {r} at speed {n}.",
            "Fan in the {r} on level {n}.",
            "Turn the {r} fan to {n}.",
        ),
        ("Could the {r} fan run at speed {n}?", "Put the fan in the {r} on {n}, please."),
        ("1", "2", "3"),
    ),
    (
        "music {r} play {n}",
        (
            "Play some {n} in the {r}.",
            "Put on {n} in the {r}, please.",
            "I want to hear {n} in the {r}.",
            "Start {n} music in the {r}.",
        ),
        ("Could you play {n} in the {r}?", "Some {n} for the {r}, please."),
        ("jazz", "rock", "soul", "blues", "techno"),
    ),
    (
        "music {r} stop",
        (
            "Stop the music in the {r}.",
            "Silence in the {r}, please.",
            "Turn the music off in the {r}.",
            "No more music in the {r}.",
        ),
        ("Could you end the music in the {r}?", "Please be quiet in the {r}."),
        ("",),
    ),
    (
        "door {r} lock",
        (
            "Lock the {r} door.",
            "Make sure that the {r} door is locked.",
            "Bolt the door of the {r}.",
            "Please lock up the {r}.",
        ),
        ("Could you lock the door of the {r}?", "Secure the {r} door."),
        ("",),
    ),
)

TRAIN_ITEMS = 960
VALIDATION_ITEMS = 64
TEST_ITEMS = 200


def home_commands() -> Task:
    """The task's three splits, always the same items in the same order.

    Order and choice follow the SHA-256 of each sentence, so they depend on no random generator.
    """
    seen = _mixed(_sentences(test=False))
    held_out = _mixed(_sentences(test=True))
    return Task(
        "home-commands",
        train=tuple(seen[VALIDATION_ITEMS : VALIDATION_ITEMS + TRAIN_ITEMS]),
        validation=tuple(seen[:VALIDATION_ITEMS]),
        test=tuple(held_out[:TEST_ITEMS]),
    )


def _sentences(test: bool) -> Iterator[Example]:
    for answer, training, testing, values in _ACTIONS:
        for phrasing in testing if test else training:
            for room in ROOMS:
                for value in values:
                    yield Example(phrasing.format(r=room, n=value), answer.format(r=room.replace(" ", "_"), n=value))


def _mixed(items: Iterator[Example]) -> list[Example]:
    return sorted(items, key=lambda item: hashlib.sha256(item.prompt.encode("utf-8")).digest())

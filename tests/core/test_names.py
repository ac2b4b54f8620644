# SPDX-License-Identifier: Apache-2.0
"""Vocabularies, and how pydantic reads choices by them."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from chunkgrpo.core.kl import AnyKl, NoKl, RateKl, TransitionKl
from chunkgrpo.core.names import ByKind, OneOf, check_name, unknown_name

TABLE = {"forward": 1, "backward": 2, "central": 3}


@dataclass(frozen=True)
class Round:
    radius: float = 1.0
    rule: Annotated[str, OneOf(TABLE)] = "forward"
    kind: Literal["round"] = field(default="round", kw_only=True, repr=False)

    def __post_init__(self):
        check_name("rule", self.rule, TABLE)
        if self.radius < 0:
            raise ValueError(f"radius is {self.radius}; it must not be negative")


@dataclass(frozen=True)
class Square:
    side: float
    kind: Literal["square"] = field(default="square", kw_only=True, repr=False)


class Drawing(BaseModel):
    shape: Annotated[Round | Square, ByKind()] = Round()
    rule: Annotated[str, OneOf(TABLE)] = "central"


# --- messages -----------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    assert unknown_name("rule", "foward", TABLE) == (
        "unknown rule 'foward'; did you mean 'forward'?; known: forward, backward, central"
    )
    assert unknown_name("rule", "xyz", iter(TABLE)) == (
        "unknown rule 'xyz'; known: forward, backward, central"
    )
    assert unknown_name("rule", "x", ()) == "unknown rule 'x'; known: "


def test_known_names_pass_and_others_do_not():
    for name in TABLE:
        check_name("rule", name, iter(TABLE))
    with pytest.raises(ValueError, match="unknown rule 'centre'; did you mean 'central'"):
        check_name("rule", "centre", iter(TABLE))
    with pytest.raises(ValueError, match="unknown rule ''; known: forward"):
        check_name("rule", "", TABLE)


# --- one of several names -----------------------------------------------------------------------


def test_names_are_listed_in_the_schema_and_text_is_text():
    schema = Drawing.model_json_schema()["properties"]["rule"]
    assert schema == {
        "type": "string",
        "enum": ["forward", "backward", "central"],
        "default": "central",
        "title": "Rule",
    }
    # Where settings are read other names are refused, before the class that has the field is made.
    with pytest.raises(ValidationError, match="unknown name 'elsewhere'; known: forward, backward"):
        Drawing(rule="elsewhere")
    with pytest.raises(ValidationError, match="valid string"):
        Drawing(rule=3)
    assert OneOf(iter("abc")).names == ("a", "b", "c")


# --- a class by its kind ------------------------------------------------------------------------


def test_classes_are_found_by_their_kind():
    assert ByKind.kinds(Round | Square) == {"round": Round, "square": Square}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("round", Round()),
        ({"kind": "round"}, Round()),
        ({"kind": "round", "radius": 2, "rule": "backward"}, Round(2.0, "backward")),
        ({"kind": "square", "side": 3.5}, Square(3.5)),
    ],
)
def test_the_kind_chooses_the_class(given, expected):
    assert Drawing(shape=given).shape == expected
    assert Drawing.model_validate_json(
        f'{{"shape": {TypeAdapter(dict | str).dump_json(given).decode()}}}'
    ).shape == expected  # fmt: skip


def test_objects_and_defaults_pass():
    assert Drawing().shape == Round()
    assert Drawing(shape=Square(1.0)).shape == Square(1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("circle", "'circle' found using 'kind' does not match any of the expected tags"),
        ({"radius": 1.0}, "Unable to extract tag using discriminator 'kind'"),
        # Only the class of the kind is tried, so that the message is about it alone.
        ("square", "1 validation error for Drawing\nshape.square.side\n  Field required"),
        ({"kind": "round", "radius": -1}, "radius is -1.0; it must not be negative"),
        ({"kind": "round", "rule": "centre"}, "unknown name 'centre'; did you mean 'central'"),
        (7, "1 validation error for Drawing\nshape"),
    ],
)
def test_what_is_no_choice_is_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        Drawing(shape=given)


def test_the_schema_allows_a_class_or_a_kind_alone():
    schema = Drawing.model_json_schema()["properties"]["shape"]
    by_class, by_kind = schema["anyOf"]
    assert by_kind == {"enum": ["round", "square"], "type": "string"}
    assert set(by_class["discriminator"]["mapping"]) == {"round", "square"}


def test_what_was_read_is_written_and_read_again():
    adapter = TypeAdapter(AnyKl)
    for choice in (NoKl(), TransitionKl(0.1), RateKl(0.04)):
        written = adapter.dump_python(choice)
        assert written["kind"] == choice.kind
        assert adapter.validate_python(written) == choice

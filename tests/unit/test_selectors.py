"""Which devices a request may have: names, families, beginnings, models and labels."""

import pytest

from manager.core.selectors import (
    FAMILIES,
    LABELS_MAX,
    MODELS_MAX,
    architectures_of,
    device_model_of,
    has_architecture,
    has_labels,
    has_model,
    labels_of,
)
from manager.core.shapes import Resources


@pytest.mark.parametrize(
    ("named", "architecture", "fits"),
    [
        ((), "gfx942", True),
        ((), "", True),
        (("gfx942",), "gfx942", True),
        (("gfx942",), "gfx940", False),
        (("gfx94*",), "gfx942", True),
        (("gfx94*",), "gfx90a", False),
        (("sm_9*",), "sm_90", True),
        (("cdna3",), "gfx942", True),
        (("cdna3",), "gfx90a", False),
        (("rdna3", "sm_90"), "gfx1100", True),
        (("rdna3", "sm_90"), "sm_90", True),
        (("rdna3", "sm_90"), "sm_80", False),
        (("gfx942",), "", False),
    ],
)
def test_an_architecture_matches_by_name_family_or_beginning(named, architecture, fits):
    assert has_architecture(Resources(1, architectures=architectures_of(named)), architecture) is fits


def test_every_member_of_a_family_is_a_name_of_its_own():
    for family, members in FAMILIES.items():
        assert architectures_of([family]) == (family,)
        assert architectures_of(members) == tuple(sorted(members))
        assert all(has_architecture(Resources(1, architectures=(family,)), member) for member in members)


@pytest.mark.parametrize("wrong", ["", "mi300x", "gfx", "gfx9x", "*", "gfx*94", "sm90", "gfx942;", "gfx942\n*", "х"])
def test_what_is_no_architecture_is_refused(wrong):
    with pytest.raises(ValueError, match="write a name such as 'gfx942' or 'sm_90'"):
        architectures_of([wrong])


@pytest.mark.parametrize(
    ("named", "model", "fits"),
    [
        ("", "anything", True),
        ("MI300X", "AMD Instinct MI300X (simulated)", True),
        ("mi300x", "AMD Instinct MI300A", False),
        ("7900 radeon", "AMD Radeon RX 7900 XTX", True),
        ("MI300X | MI325X", "AMD Instinct MI325X", True),
        ("MI300X|MI325X", "NVIDIA H100", False),
    ],
)
def test_a_model_matches_by_its_words(named, model, fits):
    assert has_model(Resources(1, device_model=device_model_of(named)), model) is fits


@pytest.mark.parametrize("wrong", ["|", "mi300x|", "-x", "a" * 64, "|".join(f"m{n}" for n in range(MODELS_MAX + 1))])
def test_what_is_no_model_is_refused(wrong):
    with pytest.raises(ValueError, match=r"such as 'MI300X'|may name"):
        device_model_of(wrong)


def test_all_labels_that_are_named_must_be_there():
    node = labels_of([("zone", "a"), ("tier", "spot")])
    assert node == (("tier", "spot"), ("zone", "a"))
    assert has_labels(Resources(1), ())
    assert has_labels(Resources(1, labels=(("zone", "a"),)), node)
    assert not has_labels(Resources(1, labels=(("zone", "b"),)), node)
    assert not has_labels(Resources(1, labels=(("zone", "a"), ("x", "y"))), node)


@pytest.mark.parametrize("pair", [("", "a"), ("a", ""), ("-a", "b"), ("a", "b c"), ("a" * 64, "b"), ("a", "b\n")])
def test_what_is_no_label_is_refused(pair):
    with pytest.raises(ValueError, match="a letter or digit at both ends"):
        labels_of([pair])


def test_labels_have_a_limit():
    with pytest.raises(ValueError, match=f"more than the {LABELS_MAX}"):
        labels_of((f"l{n}", "x") for n in range(LABELS_MAX + 1))

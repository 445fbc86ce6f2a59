"""What is asked for: every field from what people write to its one form, with errors that say what would be right."""

import pytest

from manager.core.quantities import GIB, MIB
from manager.core.requests import ResourceRequest
from manager.core.shapes import Resources, shape_id, shape_of
from manager.core.wanted import WrongField, resources_of, words_of

DEFAULT = Resources(GIB)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("memory", "24GiB", {"memory_bytes": 24 * GIB}),
        ("gpus", 64, {"gpus": 64}),
        ("share", 0.5, {"share_milli": 500}),
        ("share", "50%", {"share_milli": 500}),
        ("share", " 12.5 % ", {"share_milli": 125}),
        ("share", "0.25", {"share_milli": 250}),
        ("share", 1, {"share_milli": 1000}),
        ("share", 0, {}),
        ("share", 0.00001, {"share_milli": 1}),
        ("architecture", "GFX942", {"architectures": ("gfx942",)}),
        ("architecture", "sm_90, cdna3", {"architectures": ("cdna3", "sm_90")}),
        ("architecture", ["gfx94*", "gfx942", "gfx942"], {"architectures": ("gfx94*", "gfx942")}),
        ("architecture", "", {}),
        ("architecture", [], {}),
        ("device_model", "  MI300X ", {"device_model": "mi300x"}),
        ("device_model", "MI325X|MI300X", {"device_model": "mi300x|mi325x"}),
        ("device_model", "", {}),
        ("labels", {"zone": "a", "tier": "spot"}, {"labels": (("tier", "spot"), ("zone", "a"))}),
        ("labels", {}, {}),
        ("cpus", 0.5, {"cpu_milli": 500}),
        ("cpus", 4, {"cpu_milli": 4000}),
        ("host_memory", "512MiB", {"host_memory_bytes": 512 * MIB}),
        ("host_memory", 0, {}),
        ("exclusive", True, {"exclusive": True}),
        ("model", "meta/llama-3:8b", {"model": "meta/llama-3:8b"}),
    ],
)
def test_each_field_is_read(field, value, expected):
    assert resources_of(ResourceRequest(**{field: value}), DEFAULT) == Resources(**{"memory_bytes": GIB, **expected})


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("memory", "x", "such as '24GiB'"),
        ("gpus", 65, "from 1 to 64"),
        ("gpus", 0, "from 1 to 64"),
        ("share", 50, "such as '50%'"),
        ("share", "150%", "such as '50%'"),
        ("share", "half", "such as '50%'"),
        ("share", -0.1, "from 0 to 1"),
        ("share", float("nan"), "from 0 to 1"),
        ("architecture", "cdan3", "did you mean 'cdna3'"),
        ("architecture", ["gfx942", ""], "'gfx942' or 'sm_90'"),
        ("architecture", ["gfx942"] * 17, "more than the 16"),
        ("device_model", "a" * 100, "such as 'MI300X'"),
        ("labels", {"": "a"}, "letter or digit"),
        ("labels", {"zone": "a b"}, "letter or digit"),
        ("cpus", -1, "such as 4 or 0.5"),
        ("cpus", float("inf"), "such as 4 or 0.5"),
        ("host_memory", "-1", "such as '24GiB'"),
        ("model", "a\nb", "cannot name a model"),
    ],
)
def test_what_cannot_be_read_says_what_would_be_right(field, value, says):
    with pytest.raises(WrongField) as refused:
        resources_of(ResourceRequest(**{field: value}), DEFAULT)
    assert refused.value.field == field
    assert says in str(refused.value)


def test_what_is_left_out_is_the_functions_and_what_is_empty_is_nothing():
    default = Resources(GIB, 2, 500, ("gfx942",), "mi300x", (("zone", "a"),), 1000, GIB, exclusive=True, model="m")
    assert resources_of(ResourceRequest(), default) == default
    without = ResourceRequest(
        share=0, architecture="", device_model="", labels={}, cpus=0, host_memory=0, exclusive=False, model=""
    )
    assert resources_of(without, default) == Resources(GIB, 2)


def test_without_a_default_memory_must_be_named():
    assert resources_of(ResourceRequest(memory=5)) == Resources(5)
    with pytest.raises(WrongField, match="such as '24GiB'"):
        resources_of(ResourceRequest(gpus=2))


def test_equal_requests_are_one_shape_however_they_are_written():
    one = ResourceRequest(architecture=("sm_90", "GFX942"), labels={"b": "1", "a": "2"}, share="50%", device_model="MI300X ")
    other = ResourceRequest(architecture="gfx942,sm_90", labels={"a": "2", "b": "1"}, share=0.5, device_model="mi300x")
    ids = {shape_id(shape_of("t", "e", resources_of(each, DEFAULT))) for each in (one, other)}
    assert len(ids) == 1


def test_words_name_everything_that_is_asked_for():
    asked = Resources(
        24 * GIB, 2, 500, ("cdna3", "gfx950"), "mi300x|mi325x", (("zone", "a"),), 4000, 32 * GIB, exclusive=True, model="m"
    )
    assert words_of(asked) == (
        "2 × 24 GiB on one node, cdna3 or gfx950, device 'mi300x' or 'mi325x', 50 % of the compute, alone on the devices, "
        "4 CPUs, 32 GiB of the host, zone=a, model m"
    )
    assert words_of(Resources(24 * GIB)) == "24 GiB"
